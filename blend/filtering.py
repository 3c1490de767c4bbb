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
from chunkcache.blend.rows import cut_to, with_hidden


class RowFilter:
    """Hooks that cut the rows again at a policy's check layers, and in every layer above."""

    def __init__(self, decoder: Decoder, policy: Policy, cache: FusedCache) -> None:
        self._decoder = decoder
        self._policy = policy
        self._cache = cache
        self._checks = frozenset(policy.filter_layers(len(decoder.layers)))
        self._attention: list[Tensor] = []
        self._kept: Tensor | None = None  # indices into the rows that the model started with
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
        self._attention.append(self._policy.pool(weights.float()))

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._kept is not None:  # the model's own loop still passes what fits the rows it started with
            kwargs = self._cut(index, kwargs, self._kept)
        if index in self._checks:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            kv = partial(self._cache.probe, layer, index, args, kwargs)
            rows = self._cache.rows_on(hidden.device)
            check = Check(self._cache.plan, index, len(self._decoder.layers), rows, self._attention, kv)
            with self._cache.selecting():
                keep = self._policy.filter_rows(check)
            if keep is not None:
                self._kept = keep if self._kept is None else self._kept[keep]
                self._cache.go_on_with(self._cache.rows[keep.cpu()])
                self._masks = self._decoder.masks(self._cache.rows_on(keep.device), len(self._cache.plan))
                args, kwargs = with_hidden(args, self._cut(index, kwargs, keep), lambda h: h.index_select(1, keep))
        return args, kwargs

    def _cut(self, index: int, kwargs: dict[str, Any], keep: Tensor) -> dict[str, Any]:
        return cut_to(kwargs, keep, self._cache, self._decoder.mask(index, self._masks))
