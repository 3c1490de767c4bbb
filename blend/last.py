"""Computes in the last layer only the rows whose logits are wanted.

Of all other rows nothing is needed there but their keys and values. That takes some launches more, so it is for a
CPU, where rows cost more than these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkcache.blend.cache import FusedCache
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.rows import RowCut, hidden_of, with_hidden


class LastLayer:
    """Hooks on the last layer of a prefill.

    Args:
        decoder: a decoder over the shadow that serves the request.
        cache: the request's cache.
        wanted: rows at the end whose logits are wanted.
    """

    def __init__(self, decoder: Decoder, cache: FusedCache, wanted: int) -> None:
        self._decoder, self._cache, self._wanted = decoder, cache, wanted
        self._rows: Tensor | None = None  # whose keys and values are computed, where that is more than are wanted

    def hook(self) -> list[RemovableHandle]:
        """Register, behind what else changes the rows of the layer."""
        layer = self._decoder.layers[-1]
        return [
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
        ]

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache, decoder, last = self._cache, self._decoder, len(self._decoder.layers) - 1
        device = hidden_of(args, kwargs).device
        rows = cache.rows_on(device)
        if len(rows) <= self._wanted:
            return args, kwargs
        cache.probe(layer, last, args, kwargs)
        self._rows = rows
        keep = torch.arange(len(rows) - self._wanted, len(rows), device=device)
        cache.narrow(keep)
        mask = decoder.mask(last, decoder.masks(cache.rows_on(device), len(cache.plan)))
        kwargs = RowCut(keep, cache).keywords(kwargs, mask)
        return with_hidden(args, kwargs, lambda hidden: hidden[:, -self._wanted :])

    def _after(self, *_: Any) -> None:
        if self._rows is not None:
            self._cache.computed_rows[-1] = self._rows
