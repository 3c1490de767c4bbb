"""What every hook that changes the rows of a decoder layer on its way does with the layer's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from chunkcache.blend.cache import FusedCache


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a decoder layer with its hidden states `[1, rows, hidden]` changed."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    return (change(args[0]), *args[1:]), kwargs


def cut_to(kwargs: dict[str, Any], keep: Tensor, cache: FusedCache, mask: Tensor) -> dict[str, Any]:
    """Return the keywords of a decoder layer for some of the rows that the model was given.

    Args:
        kwargs: as the model passes them.
        keep: indices `[n]` of these rows.
        cache: goes on with just these.
        mask: of this layer for them.
    """
    cos, sin = kwargs["position_embeddings"]
    keep = keep.to(cos.device)
    return {
        **kwargs,
        "position_embeddings": (cos.index_select(1, keep), sin.index_select(1, keep)),
        "position_ids": cache.rows_on(cos.device)[None],
        "attention_mask": mask,
    }
