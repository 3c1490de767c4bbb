"""The assembly of a layer in Triton: all chunks in one launch, keys rotated and dequantised on the way.

The kernel finds the chunks by a table of addresses, strides, lengths and places. One launch serves all chunks that
are kept in one way: in one floating-point dtype, in 8 bits or in 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkcache.blend.rotary import Rotary
from chunkcache.kv import Layer, Span
from chunkcache.kv.quantised import GROUP, QuantisedLayer

TOKENS = 32  # of a tile
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}
COLUMNS = 14  # of the table, see `_entry`
Kind = tuple[torch.dtype, int]  # of what is stored: its dtype, and bits if it is quantised, else 0


@triton.jit
def _codes(stored, part, dim, mask, bits: tl.constexpr, head_dim: tl.constexpr):
    """Load floats, bytes or half bytes as float32; of half bytes, the later dimensions are the high ones."""
    if bits == 4:
        byte = tl.load(stored + part + dim % (head_dim // 2), mask=mask, other=0)
        code = tl.where(dim < head_dim // 2, byte & 15, byte >> 4).to(tl.float32)
    else:
        code = tl.load(stored + part + dim, mask=mask, other=0).to(tl.float32)
    return code


@triton.jit
def _keys(  # noqa: PLR0913 - a kernel takes each number by itself
    stored, part, dim, mask, scale, zero, group, bits: tl.constexpr, head_dim: tl.constexpr
):
    """Load keys as float32, with the scale and zero of their group of tokens and their channel."""
    keys = _codes(stored, part, dim, mask, bits, head_dim)
    if bits > 0:
        at = group * head_dim + dim
        keys = keys * tl.load(scale + at, mask=mask, other=0).to(tl.float32)
        keys = keys + tl.load(zero + at, mask=mask, other=0).to(tl.float32)
    return keys


@triton.jit
def _place(  # noqa: PLR0913 - likewise
    table, tiles, cos, sin, target,
    target_which, target_head, target_token,
    first_start, second_start, step,
    source: tl.constexpr, bits: tl.constexpr, head_dim: tl.constexpr, pairs: tl.constexpr,
    group_tokens: tl.constexpr, tokens: tl.constexpr, columns: tl.constexpr,
    padded_dim: tl.constexpr, padded_pairs: tl.constexpr, padded_rest: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = table + tl.load(tiles + 2 * tile) * columns
    token = (tl.load(tiles + 2 * tile + 1) + tl.arange(0, tokens))[:, None]
    inside = token < tl.load(entry + 6)
    index = token + tl.load(entry + 4)  # in what is stored
    stored = tl.load(entry).to(tl.pointer_type(source))
    part = head * tl.load(entry + 2) + index * tl.load(entry + 3)
    out = target + head * target_head + (token + tl.load(entry + 5)) * target_token
    kind = target.dtype.element_ty
    scale = tl.load(entry + 8).to(tl.pointer_type(tl.float16))
    zero = tl.load(entry + 9).to(tl.pointer_type(tl.float16))
    group = head * tl.load(entry + 12) + index // group_tokens

    if pairs > 0:
        pair = tl.arange(0, padded_pairs)[None, :]
        mask = inside & (pair < pairs)
        one, two = first_start + pair * step, second_start + pair * step
        first = _keys(stored, part, one, mask, scale, zero, group, bits, head_dim)
        second = _keys(stored, part, two, mask, scale, zero, group, bits, head_dim)
        angle = tl.load(entry + 7) * pairs + pair
        by_cos = tl.load(cos + angle, mask=pair < pairs, other=0)
        by_sin = tl.load(sin + angle, mask=pair < pairs, other=0)
        tl.store(out + one, (first * by_cos - second * by_sin).to(kind), mask=mask)
        tl.store(out + two, (second * by_cos + first * by_sin).to(kind), mask=mask)
    if 2 * pairs < head_dim:  # dimensions that no rotation turns
        rest = 2 * pairs + tl.arange(0, padded_rest)[None, :]
        mask = inside & (rest < head_dim)
        same = _keys(stored, part, rest, mask, scale, zero, group, bits, head_dim)
        tl.store(out + rest, same.to(kind), mask=mask)

    dim = tl.arange(0, padded_dim)[None, :]
    mask = inside & (dim < head_dim)
    values = _codes(stored, part + tl.load(entry + 1), dim, mask, bits, head_dim)
    if bits > 0:
        at = head * tl.load(entry + 13) + index
        times = tl.load(tl.load(entry + 10).to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0)
        plus = tl.load(tl.load(entry + 11).to(tl.pointer_type(tl.float16)) + at, mask=inside, other=0)
        values = values * times.to(tl.float32) + plus.to(tl.float32)
    tl.store(out + target_which + dim, values.to(kind), mask=mask)


class Placer:
    """Places layer after layer of one plan.

    Args:
        spans: what is reused, and where.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        deltas = list(dict.fromkeys(span.delta for span in spans))
        self._deltas = deltas
        self._angle = [deltas.index(span.delta) for span in spans]
        self._angles: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._tiles: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def place(self, layers: Sequence[Layer], rotary: Rotary | None, target: Tensor) -> None:
        """Write one layer of all spans to their places, keys rotated to their positions.

        Args:
            layers: the layer of each span, `[2, kv_heads, tokens, head_dim]`, whole.
            rotary: how its keys are rotated; None for not at all.
            target: `[2, kv_heads, length, head_dim]`, of any floating-point dtype and strides but the last.
        """
        moved = [_on(layer, target.device) for layer in layers]
        kinds = [_kind(layer) for layer in moved]
        for kind in dict.fromkeys(kinds):
            chosen = tuple(index for index, other in enumerate(kinds) if other == kind)
            self._launch(kind, chosen, moved, rotary, target)

    def _launch(
        self, kind: Kind, chosen: tuple[int, ...], layers: Sequence[Layer], rotary: Rotary | None, target: Tensor
    ) -> None:
        device, head_dim = target.device, target.shape[3]
        rows = [_entry(self._spans[index], layers[index], self._angle[index]) for index in chosen]
        table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        tiles = self._tiles_of(chosen, device)
        if rotary is None:
            pairs, starts, cos, sin = 0, (0, 0, 1), table, table  # the kernel reads no angles
        else:
            first, second = rotary.pairs
            pairs, starts = rotary.rotary_dim // 2, (first.start or 0, second.start or 0, first.step or 1)
            cos, sin = self._angles_of(rotary, device)
        _place[(len(tiles), target.shape[1])](
            table, tiles, cos, sin, target,
            target.stride(0), target.stride(1), target.stride(2), *starts,
            DTYPES[kind[0]], kind[1], head_dim, pairs, GROUP, TOKENS, COLUMNS,
            triton.next_power_of_2(head_dim), triton.next_power_of_2(max(1, pairs)),
            triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
        )  # fmt: skip

    def _tiles_of(self, chosen: tuple[int, ...], device: torch.device) -> Tensor:
        """Return for each tile its span's row of the table, and its first token in the span, `[tiles, 2]`."""
        key = chosen, device
        if key not in self._tiles:
            lengths = [len(self._spans[index]) for index in chosen]
            tiles = [(row, start) for row, length in enumerate(lengths) for start in range(0, length, TOKENS)]
            self._tiles[key] = torch.tensor(tiles).to(device, non_blocking=True)
        return self._tiles[key]

    def _angles_of(self, rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin `[deltas, rotary_dim / 2]`, float32."""
        key = id(rotary), device
        if key not in self._angles:
            angles = rotary.rotations(self._deltas)
            cos, sin = angles[:, : rotary.rotary_dim][:, rotary.pairs[0]], angles[:, rotary.rotary_dim :]
            cos, sin = (part.contiguous().to(device, non_blocking=True) for part in (cos, sin))
            self._angles[key] = cos, sin
        return self._angles[key]


def _on(layer: Layer, device: torch.device) -> Layer:
    """Return a layer on the device as the kernel reads it: contiguous, a dense one at least in its last dimension."""
    layer = layer.to(device, non_blocking=True)
    if isinstance(layer, Tensor):
        return layer if layer.stride(3) == 1 else layer.contiguous()
    if all(part.is_contiguous() for part in layer.parts()):
        return layer
    return QuantisedLayer(layer.bits, layer.dtype, *(part.contiguous() for part in layer.parts()))


def _kind(layer: Layer) -> Kind:
    return (torch.uint8, layer.bits) if isinstance(layer, QuantisedLayer) else (layer.dtype, 0)


def _entry(span: Span, layer: Layer, angle: int) -> list[int]:
    """Return a row of the table, which the kernel reads by number."""
    stored = layer.codes if isinstance(layer, QuantisedLayer) else layer
    row = [stored.data_ptr(), *stored.stride()[:3], span.offset, span.start, len(span), angle]
    if isinstance(layer, QuantisedLayer):
        scales = layer.key_scale, layer.key_zero, layer.value_scale, layer.value_zero
        return [*row, *(part.data_ptr() for part in scales), layer.key_scale.shape[1], stored.shape[2]]
    return row + [0] * (COLUMNS - len(row))
