"""Sequences of any lengths decode together, each over a cache of its own (as Orca's selective batching, OSDI 2022).

One token of each goes through the linear layers in one batch, which reads the weights once; attention runs for one
sequence after the other. So nothing is padded, and a sequence may join or leave between any two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from chunkcache.blend.attention import flash, register
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.hydragen import KV, NAME, merge_sinks, partial_attention, shared_attention


class RaggedDecoder:
    """Decodes one token of several sequences at a time.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        register(NAME, shared_attention)
        twin = decoder.shadow(NAME)
        self._device = decoder.device
        self._model: Any = twin.model
        self._caches = _Caches([decoder.window(layer) for layer in range(len(decoder.layers))])
        for index, module in enumerate(twin.attentions):
            vars(module)["chunkcache_shared"] = partial(self._caches.attend, index)

    @torch.no_grad()
    def step(self, token_ids: Sequence[int], caches: Sequence[Cache]) -> Tensor:
        """Append a token to each sequence; return the logits `[sequences, vocab]` of those that follow.

        Args:
            token_ids: one for each sequence.
            caches: the KV of what each has before it, which grow by that token.
        """
        lengths = [cache.get_seq_length() for cache in caches]
        self._caches.each = caches
        try:
            output = self._model(
                input_ids=torch.tensor(token_ids, device=self._device)[:, None],
                position_ids=torch.tensor(lengths, device=self._device)[:, None],
                past_key_values=self._caches,
                use_cache=True,
            )
        finally:
            self._caches.each = ()
        logits: Tensor = output.logits[:, -1]
        return logits


class _Caches(DynamicCache):
    """The caches of all sequences of a step, which the model takes for one."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__()
        self.each: Sequence[Cache] = ()
        self._windows = windows
        self._seen: list[tuple[Tensor, Tensor]] = []  # of each sequence, in the layer that is computed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the longest sequence."""
        return max((cache.get_seq_length() for cache in self.each), default=0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append fresh KV `[sequences, kv_heads, 1, head_dim]`, each to its own cache; return them as they are."""
        self._seen = [
            cache.update(key_states[row : row + 1], value_states[row : row + 1], layer_idx)
            for row, cache in enumerate(self.each)
        ]
        return key_states, value_states

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        fresh: KV,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend from a token `[sequences, heads, 1, head_dim]` of each; return `[sequences, 1, heads, head_dim]`.

        `fresh` are the KV of these tokens, which `update` has appended.
        """
        first = -(self._windows[layer_idx] or 0)
        rows = []
        for row, (keys, values) in enumerate(self._seen):
            asked, keys, values = query[row : row + 1], keys[:, :, first:], values[:, :, first:]
            if softcap is None and sinks is None:
                if (output := flash(asked, keys, values, scaling)) is None:
                    # Heads that share a KV head are rows of one, so that it is read once. One token has no mask.
                    together = asked.reshape(1, keys.shape[1], -1, asked.shape[3])
                    output = F.scaled_dot_product_attention(together, keys, values, scale=scaling)
                    output = output.reshape(asked.shape).transpose(1, 2)
                rows.append(output)
            else:
                stacked = (asked * (scaling or query.shape[3] ** -0.5)).reshape(1, keys.shape[1], -1, query.shape[3])
                part = partial_attention(stacked, keys, values, None, softcap)
                rows.append(merge_sinks(part, sinks).reshape(asked.shape).to(query.dtype).transpose(1, 2))
        self._seen = []
        return torch.cat(rows)
