"""What every hook that changes the rows of a decoder layer on its way does with the layer's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from chunkcache.blend.cache import FusedCache


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states `[1, rows, hidden]` among the arguments of a decoder layer."""
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a decoder layer with its hidden states `[1, rows, hidden]` changed."""
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    return (change(args[0]), *args[1:]), kwargs


class RowCut:
    """Cuts the keywords of decoder layers to some of the rows that the model was given.

    Args:
        keep: indices `[n]` of these rows.
        cache: goes on with just these.

    Attributes:
        keep: as given.
    """

    def __init__(self, keep: Tensor, cache: FusedCache) -> None:
        self.keep, self._cache = keep, cache
        self._embeddings: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}  # of each RoPE

    def keywords(self, kwargs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
        """Return the keywords that the model passes to a layer, for these rows; `mask` is the layer's for them."""
        cos, sin = kwargs["position_embeddings"]
        if id(cos) not in self._embeddings:
            keep = self.keep.to(cos.device, non_blocking=True)
            self._embeddings[id(cos)] = cos, (cos.index_select(1, keep), sin.index_select(1, keep))
        return {
            **kwargs,
            "position_embeddings": self._embeddings[id(cos)][1],
            "position_ids": self._cache.rows_on(cos.device)[None],
            "attention_mask": mask,
        }
