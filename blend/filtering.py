"""Filters the rows again inside the model, at a policy's filter layers (CacheBlend's gradual filtering)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkcache.blend.attention import Watch
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.policy import Check, Policy
from chunkcache.blend.rows import RowCut, hidden_of, with_hidden


class RowFilter:
    """Hooks that cut the rows again at a policy's check layers, and in every layer above."""

    def __init__(self, decoder: Decoder, policy: Policy, cache: FusedCache) -> None:
        self._decoder = decoder
        self._policy = policy
        self._cache = cache
        self._checks = frozenset(policy.filter_layers(len(decoder.layers)))
        self._attention: list[Tensor] = []
        self._cut: RowCut | None = None  # of the rows that the model started with
        self._masks: Any = None

    def hook(self) -> list[RemovableHandle | Watch]:
        """Register on every layer from the first check layer on, and where the question is watched."""
        handles: list[RemovableHandle | Watch] = [
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            for index, layer in enumerate(self._decoder.layers)
            if index >= min(self._checks)
        ]
        question = len(self._cache.plan) - self._cache.plan.end
        for index in self._policy.watched_layers(len(self._decoder.layers)):
            module = self._decoder.attentions[index]
            handles.append(Watch(module, question, self._see, most=self._cache.look_rows))
        return handles

    def _see(self, weights: Tensor, first: int) -> None:
        pooled = self._policy.pool(weights.float())
        before = self._attention[0] if self._attention else pooled  # layers may be on several devices
        self._attention.append(pooled.to(before.device, non_blocking=True))

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._cut is not None:  # the model's own loop still passes what fits the rows it started with
            kwargs = self._cut.keywords(kwargs, self._mask(index))
        if index in self._checks:
            hidden = hidden_of(args, kwargs)
            kv = partial(self._cache.probe, layer, index, args, kwargs)
            rows = self._cache.rows_on(hidden.device)
            layers = len(self._decoder.layers)
            check = Check(self._cache.plan, index, layers, rows, self._attention, kv, lambda: self._cache.rows)
            with self._cache.selecting():
                keep = self._policy.filter_rows(check)
            if keep is not None and len(keep) < len(rows):
                self._cache.narrow(keep)
                args, kwargs = self._narrowed(index, args, kwargs, keep.to(rows.device, non_blocking=True))
        return args, kwargs

    def _narrowed(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], keep: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of layer `index` for the rows `keep` `[n]`, indices into those up to here."""
        self._masks = self._decoder.masks(self._cache.rows_on(keep.device), len(self._cache.plan))
        kwargs = RowCut(keep, self._cache).keywords(kwargs, self._mask(index))
        before = self._cut
        self._cut = RowCut(keep if before is None else before.keep.to(keep.device)[keep], self._cache)
        return with_hidden(args, kwargs, lambda hidden: hidden.index_select(1, keep))

    def _mask(self, index: int) -> Any:
        return self._decoder.mask(index, self._masks)
