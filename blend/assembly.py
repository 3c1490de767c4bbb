"""Puts one layer's stored KV in place for a prompt: short chunks at once, with one rotation of all keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.rotary import Rotary
from chunkcache.blend.triton import serve
from chunkcache.kv import Layer, Span
from chunkcache.kv.quantised import GROUP, QuantisedLayer

if TYPE_CHECKING:
    from chunkcache.blend.triton.assembly import Placer

LONG = 256  # tokens of a chunk from which on a CPU is no slower with one chunk at a time: its parts stay in the cache


class Assembler:
    """Assembles the layers of one plan.

    Args:
        plan: what is reused where.

    Attributes:
        plan: as given.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._moved = any(span.delta for span in plan.reused)
        self._long = sum(map(len, plan.reused)) >= LONG * len(plan.reused)
        self._angles: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def assemble(self, layers: Sequence[Layer], rotary: Rotary | None, like: Tensor) -> Tensor:
        """Return `[2, kv_heads, tokens, head_dim]` with stored KV in place; what no KV are stored of is undefined.

        Args:
            layers: the layer of each of `plan.reused`, `[2, kv_heads, tokens, head_dim]`, whole.
            rotary: how its keys are rotated; None for not at all.
            like: any tensor `[1, kv_heads, n, head_dim]` of the dtype and device wanted.
        """
        plan, heads, head_dim = self.plan, like.shape[1], like.shape[3]
        if serve(like.device):
            both = like.new_empty(2, heads, len(plan), head_dim)
            self._placer.place(layers, rotary, both)
            return both
        one_by_one = self._long and like.device.type == "cpu"
        if one_by_one or any(isinstance(layer, QuantisedLayer) for layer in layers):
            both = like.new_empty(2, heads, len(plan), head_dim)
            for span, layer in zip(plan.reused, layers, strict=True):
                place(span, layer, rotary, both[:, :, span.start : span.stop])
            return both
        parts, end = [], 0
        for span, layer in zip(plan.reused, layers, strict=True):
            assert isinstance(layer, Tensor)
            stored = layer[:, :, span.offset : span.offset + len(span)]
            parts += [like.new_empty(2, heads, span.start - end, head_dim), stored.to(like, non_blocking=True)]
            end = span.stop
        both = torch.cat([*parts, like.new_empty(2, heads, len(plan) - end, head_dim)], dim=2)
        if rotary is not None and self._moved:
            rotary.turn(both[0, :, :end], *self._angles_of(rotary, like.device))
        return both

    @cached_property
    def _placer(self) -> Placer:
        from chunkcache.blend.triton.assembly import Placer

        return Placer(self.plan.reused)

    def _angles_of(self, rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin `[tokens, rotary_dim / 2]` of how far each token up to the last reused one has moved."""
        key = id(rotary), device
        if key not in self._angles:
            runs, end = [], 0
            for span in self.plan.reused:
                runs += [(span.start - end, 0), (len(span), span.delta)]
                end = span.stop
            deltas = list(dict.fromkeys(delta for _, delta in runs))
            lengths = torch.tensor([length for length, _ in runs])
            which = torch.tensor([deltas.index(delta) for _, delta in runs]).repeat_interleave(lengths)
            which = which.to(device, non_blocking=True)
            tables = zip(*(rotary.rotation(delta) for delta in deltas), strict=True)
            cos, sin = (torch.stack(table).to(device).index_select(0, which) for table in tables)
            self._angles[key] = cos, sin
        return self._angles[key]


def place(span: Span, layer: Layer, rotary: Rotary | None, target: Tensor) -> None:
    """Write one layer of a span's stored KV to its place, keys rotated to their positions.

    Args:
        span: which tokens of the layer, and how far they moved.
        layer: `[2, kv_heads, tokens, head_dim]`, whole.
        rotary: how its keys are rotated; None for not at all.
        target: `[2, kv_heads, length, head_dim]`.
    """
    if isinstance(layer, QuantisedLayer):
        if rotary is not None and span.offset == 0 and target.dtype == torch.float32:
            _place_scaled(span, layer, rotary, target)
            return
        layer = layer.dense()
    stored = layer[:, :, span.offset : span.offset + len(span)]
    target[1].copy_(stored[1], non_blocking=True)
    if rotary is None:
        target[0].copy_(stored[0], non_blocking=True)
    else:
        rotary.shift(stored[0], span.delta, target[0])


def _place_scaled(span: Span, layer: QuantisedLayer, rotary: Rotary, target: Tensor) -> None:
    """Dequantise while placing: the keys in the pass that rotates them, group by group of tokens."""
    target[1].copy_(layer.values()[:, : len(span)])
    codes = layer.keys()
    whole = len(span) // GROUP * GROUP
    scale, zero = layer.key_scale.float()[:, :, None], layer.key_zero.float()[:, :, None]
    if whole:
        keys, out = (part[:, :whole].view(len(part), -1, GROUP, part.shape[2]) for part in (codes, target[0]))
        groups = whole // GROUP
        rotary.shift_scaled(keys, scale[:, :groups], zero[:, :groups], span.delta, out)
    if whole < len(span):
        rest, group = slice(whole, len(span)), whole // GROUP
        rotary.shift_scaled(codes[:, rest], scale[:, group], zero[:, group], span.delta, target[0][:, rest])
