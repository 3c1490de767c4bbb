"""A layer of a dynamic cache with room behind its tokens: a decoding step fills a slot instead of copying all KV."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens of room behind what is there; twice as many each time it is full


class GrowingLayer(DynamicLayer):
    """Like its base, but the keys and values that it hands out are views of a larger buffer.

    Where somebody else put other tensors in their place, as a beam search does at each step, one step copies all, as
    the base does. So it does where gradients are wanted, and under `torch.compile`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = ROOM
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._handed: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the KV `[batch, kv_heads, n, head_dim]` of `n` more tokens; return those of all."""
        own = self._handed is None or (self.keys is self._handed[0] and self.values is self._handed[1])
        tokens = self.get_seq_length()
        if not own or not tokens or key_states.requires_grad or torch.compiler.is_compiling():
            self._buffers = None
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            self._handed = keys, values
            return keys, values
        end = tokens + key_states.shape[2]
        keys, values = self._roomy(tokens, end)
        keys[:, :, tokens:end], values[:, :, tokens:end] = key_states, value_states
        self.keys, self.values = self._handed = keys[:, :, :end], values[:, :, :end]
        return self._handed

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as many as the negative number says; their slots are free again."""
        handed = self._handed is not None and self.keys is self._handed[0]
        super().crop(tokens_to_remove)
        if handed and self.keys is not None and self.values is not None:
            self._handed = self.keys, self.values

    def reset(self) -> None:
        """Forget all."""
        super().reset()
        self._buffers = self._handed = None

    def _roomy(self, tokens: int, end: int) -> tuple[Tensor, Tensor]:
        """Return buffers for keys and values that hold the first `tokens` tokens, with room up to `end` at least."""
        buffers = self._buffers
        if buffers is not None and end <= buffers[0].shape[2] and _writable(buffers[0]):
            return buffers
        if buffers is not None:
            self._room *= 2
        made = []
        for part in (self.keys, self.values):
            assert part is not None
            buffer = part.new_empty(*part.shape[:2], end + self._room, part.shape[3])
            buffer[:, :, :tokens] = part
            made.append(buffer)
        self._buffers = made[0], made[1]
        return self._buffers


def _writable(buffer: Tensor) -> bool:
    return torch.is_inference_mode_enabled() or not buffer.is_inference()
