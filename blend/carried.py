"""Goes on from where a scout stopped, instead of computing a long question twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkcache.blend.rows import RowCut, with_hidden

if TYPE_CHECKING:
    from chunkcache.blend.cache import FusedCache
    from chunkcache.blend.decoder import Decoder


LAST = 16  # rows at the end of the prompt that are computed anew in any case: the answer begins there


@dataclass(frozen=True)
class Carried:
    """Where a scout stopped, for a prefill to go on.

    Attributes:
        layer: the first layer that it did not compute.
        hidden: what would have gone into it, `[1, rows, hidden]`, of the rows `plan.fresh`.
    """

    layer: int
    hidden: Tensor


class CarriedRows:
    """Hooks that let a prefill go on from where a scout stopped.

    Below that layer only the rows that were selected are computed, and the last of the prompt, over the KV that the
    other scouted rows have left in the cache; from it on, all. What these are below it they have become without the
    selected rows: that is the price of not computing them twice.

    Args:
        decoder: a decoder over the shadow that serves the request.
        cache: the request's cache, after the scout.
        carried: where the scout stopped.
        rows: sorted positions `[rows]`, scouted and selected, that the model is given.
    """

    def __init__(self, decoder: Decoder, cache: FusedCache, carried: Carried, rows: Tensor) -> None:
        self._decoder, self._cache, self._carried, self._rows = decoder, cache, carried, rows
        kept = torch.isin(rows, cache.plan.fresh[:-LAST])
        self._selected = rows[~kept]
        device = carried.hidden.device
        self._at_selected = (~kept).nonzero()[:, 0].to(device, non_blocking=True)
        self._at_kept = kept.nonzero()[:, 0].to(device, non_blocking=True)
        self._cut = RowCut(self._at_selected, cache)
        self._masks: Any = None

    def hook(self) -> list[RemovableHandle]:
        """Register on every layer up to the one where the scout stopped."""
        below = self._decoder.layers[: self._carried.layer]
        handles = [
            layer.register_forward_pre_hook(partial(self._below, index), with_kwargs=True)
            for index, layer in enumerate(below)
        ]
        layer = self._decoder.layers[self._carried.layer]
        return [*handles, layer.register_forward_pre_hook(self._join, with_kwargs=True)]

    def _below(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if index == 0:
            args, kwargs = with_hidden(args, kwargs, lambda hidden: hidden.index_select(1, self._at_selected))
            self._cache.go_on_with(self._selected)
            self._masks = self._decoder.masks(self._cache.rows_on(self._at_selected.device), len(self._cache.plan))
        mask = self._decoder.mask(index, self._masks)
        return args, self._cut.keywords(kwargs, mask)

    def _join(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def joined(hidden: Tensor) -> Tensor:
            both = hidden.new_empty(1, len(self._rows), hidden.shape[2])
            both.index_copy_(1, self._at_selected, hidden)
            return both.index_copy_(1, self._at_kept, self._carried.hidden[:, :-LAST].to(hidden.device))

        self._cache.go_on_with(self._rows)
        return with_hidden(args, kwargs, joined)
