"""Puts stored KV in place for a prompt: short chunks at once, with one rotation of all keys.

On an accelerator the work is bound by the number of kernels, not by bytes: the layers of a group are rotated together
there, and dequantised together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.rotary import Rotary
from chunkcache.blend.triton import serve
from chunkcache.kv import Layer, Span
from chunkcache.kv.quantised import GROUP, QuantisedLayer, dense, group_of_tokens

if TYPE_CHECKING:
    from chunkcache.blend.triton.assembly import Placer

LONG = 256  # tokens of a chunk from which on a CPU is no slower with one chunk at a time: its parts stay in the cache
MOST_LAYERS = 8  # put in place together at most
GROUP_BYTES = 64 << 20  # of float32 keys of such a group; larger layers keep an accelerator busy one by one


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
        self._angles: dict[tuple[int, torch.device], Tensor] = {}
        self._groups: dict[torch.device, Tensor] = {}

    def layers_at_once(self, like: Tensor) -> int:
        """Return how many layers of the shape and device of `like` `[1, kv_heads, n, head_dim]` make a group."""
        if like.device.type == "cpu":
            return 1
        nbytes = 4 * like.shape[1] * len(self.plan) * like.shape[3]
        return min(max(1, GROUP_BYTES // nbytes), MOST_LAYERS)

    def assemble(self, layers: Sequence[Layer], rotary: Rotary | None, like: Tensor) -> Tensor:
        """Return `[2, kv_heads, tokens, head_dim]` with stored KV in place; the rest is undefined.

        Args:
            layers: the layer of each of `plan.reused`, `[2, kv_heads, tokens, head_dim]`, whole.
            rotary: how its keys are rotated; None for not at all.
            like: any tensor `[1, kv_heads, n, head_dim]` of the dtype and device wanted.
        """
        by_torch = like.device.type == "cpu" and not serve(like.device)
        if by_torch and (self._long or any(isinstance(layer, QuantisedLayer) for layer in layers)):
            both = self._empty(like, 2)
            for span, layer in zip(self.plan.reused, layers, strict=True):
                place(span, layer, rotary, both[:, :, span.start : span.stop])
            return both
        return self.assemble_group([layers], rotary, like)[0]

    def assemble_group(
        self, group: Sequence[Sequence[Layer]], rotary: Rotary | None, like: Tensor
    ) -> Sequence[Tensor]:
        """Return what `assemble` does, of several layers that are rotated alike; each is a view of one buffer."""
        every = self._empty(like, len(group), 2)
        if serve(like.device):
            for layers, both in zip(group, every, strict=True):
                self._placer.place(layers, rotary, both)
            return every.unbind()
        for layers, both in zip(self._dense(group, like.device), every, strict=True):
            torch.cat(self._parts(layers, like), dim=2, out=both)
        end = self.plan.reused[-1].stop if self.plan.reused else 0
        if rotary is not None and self._moved:
            rotary.turn(every[:, 0, :, :end], self._angles_of(rotary, like.device))
        return every.unbind()

    def _parts(self, layers: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """Return a layer piece by piece: what stands of each span, and what is undefined between them."""
        heads, head_dim = like.shape[1], like.shape[3]
        parts, end = [], 0
        for span, layer in zip(self.plan.reused, layers, strict=True):
            stored = layer[:, :, span.offset : span.offset + len(span)]
            parts += [like.new_empty(2, heads, span.start - end, head_dim), stored.to(like, non_blocking=True)]
            end = span.stop
        return [*parts, like.new_empty(2, heads, len(self.plan) - end, head_dim)]

    def _empty(self, like: Tensor, *outer: int) -> Tensor:
        return like.new_empty(*outer, like.shape[1], len(self.plan), like.shape[3])

    def _dense(self, group: Sequence[Sequence[Layer]], device: torch.device) -> Iterator[Sequence[Tensor]]:
        """Yield the layers of a group, those dequantised together that are quantised alike."""
        quantised = [[layer for layer in layers if isinstance(layer, QuantisedLayer)] for layers in group]
        lengths = [layer.shape[2] for layer in quantised[0]]
        alike = all([layer.shape[2] for layer in layers] == lengths for layers in quantised)
        flat = [layer.to(device, non_blocking=True) for layers in quantised for layer in layers]
        together: Iterator[Tensor] = iter(())
        if flat and alike and len({(layer.bits, layer.dtype) for layer in flat}) == 1:
            merged = QuantisedLayer.merged(flat).dense(self._groups_of(lengths, len(group), device))
            together = iter(torch.split(merged, lengths * len(group), dim=2))
        for layers in group:
            dense_of = (layer if isinstance(layer, Tensor) else next(together, layer) for layer in layers)
            yield [dense(layer) for layer in dense_of]

    def _groups_of(self, lengths: list[int], layers: int, device: torch.device) -> Tensor:
        """Return for each token of `layers` layers, chunk by chunk, which of all their key scales is its own."""
        if device not in self._groups:
            self._groups[device] = group_of_tokens(lengths * MOST_LAYERS).to(device, non_blocking=True)
        return self._groups[device][: sum(lengths) * layers]

    @cached_property
    def _placer(self) -> Placer:
        from chunkcache.blend.triton.assembly import Placer

        return Placer(self.plan.reused)

    def _angles_of(self, rotary: Rotary, device: torch.device) -> Tensor:
        """Return by what each token up to the last reused one is turned, as `Rotary.turn` takes it."""
        key = id(rotary), device
        if key not in self._angles:
            runs, end = [], 0
            for span in self.plan.reused:
                runs += [(span.start - end, 0), (len(span), span.delta)]
                end = span.stop
            order = {delta: index for index, delta in enumerate(dict.fromkeys(delta for _, delta in runs))}
            lengths = torch.tensor([length for length, _ in runs])
            which = torch.tensor([order[delta] for _, delta in runs]).repeat_interleave(lengths)
            table = rotary.rotations(list(order)).to(device, non_blocking=True)
            self._angles[key] = table.index_select(0, which.to(device, non_blocking=True))
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
