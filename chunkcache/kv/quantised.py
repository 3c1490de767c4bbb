"""One layer of chunk KV in few bits: keys per channel, values per token (KIVI, arXiv 2402.02750, section 3).

Keys have outliers in fixed channels, values have none: so a run of `GROUP` tokens shares one scale per key
channel, and every value vector has a scale of its own. Asymmetric: `x = code * scale + zero`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

GROUP = 64  # tokens that share one scale per key channel


@dataclass(frozen=True, eq=False)
class QuantisedLayer:
    """Keys and values `[2, kv_heads, tokens, head_dim]` of one layer, quantised.

    Attributes:
        bits: 8 or 4.
        dtype: of the layer before it was quantised.
        codes: uint8 `[2, kv_heads, tokens, head_dim]`; with 4 bits half the last dimension, dimension d of the
            first half in the low bits and d + head_dim / 2 in the high ones.
        key_scale: float16 `[kv_heads, groups, head_dim]`.
        key_zero: like it.
        value_scale: float16 `[kv_heads, tokens, 1]`.
        value_zero: like it.
    """

    bits: int
    dtype: torch.dtype
    codes: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_scale: Tensor
    value_zero: Tensor

    @classmethod
    def of(cls, layer: Tensor, bits: int) -> QuantisedLayer:
        """Quantise `layer` `[2, kv_heads, tokens, head_dim]`, a floating-point tensor with an even head_dim."""
        keys, values = layer.float()
        levels = 2**bits - 1
        tokens = keys.shape[1]
        grouped = [part.aminmax(dim=1) for part in keys.split(GROUP, dim=1)]
        low = torch.stack([part.min for part in grouped], dim=1)
        key_scale, key_zero = _scale(low, torch.stack([part.max for part in grouped], dim=1), levels)
        by_token = [part.repeat_interleave(GROUP, 1)[:, :tokens].float() for part in (key_zero, key_scale)]
        span = values.aminmax(dim=-1, keepdim=True)
        value_scale, value_zero = _scale(span.min, span.max, levels)
        codes = torch.stack(((keys - by_token[0]) / by_token[1], (values - value_zero.float()) / value_scale.float()))
        packed = codes.round_().clamp_(0, levels).to(torch.uint8)
        if bits == 4:
            low_half, high_half = packed.chunk(2, dim=-1)
            packed = low_half | high_half << 4
        return cls(bits, layer.dtype, packed, key_scale, key_zero, value_scale, value_zero)

    @classmethod
    def merged(cls, layers: Sequence[QuantisedLayer]) -> QuantisedLayer:
        """Return several layers of the same bits and dtype side by side, in one copy of each of their tensors.

        Key groups stay as they were: that of a token is told by `group_of_tokens` of the layers' lengths.
        """
        parts = (torch.cat(part, dim=-2) for part in zip(*(layer.parts() for layer in layers), strict=True))
        return cls(layers[0].bits, layers[0].dtype, *parts)

    @property
    def shape(self) -> torch.Size:
        """Shape of the layer that this stands for."""
        *outer, last = self.codes.shape
        return torch.Size([*outer, last * 8 // self.bits])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> Iterator[Tensor]:
        """Yield its tensors, in the order of the attributes."""
        yield from (part for field in fields(self) if isinstance(part := getattr(self, field.name), Tensor))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QuantisedLayer:
        """Return it on `device`."""
        moved = (part.to(device, non_blocking=non_blocking) for part in self.parts())
        return QuantisedLayer(self.bits, self.dtype, *moved)

    def pin_memory(self) -> QuantisedLayer:
        """Return it in page-locked memory."""
        return QuantisedLayer(self.bits, self.dtype, *(part.pin_memory() for part in self.parts()))

    def keys(self) -> Tensor:
        """Return the codes of the keys `[kv_heads, tokens, head_dim]` as float32, not yet scaled."""
        return self._codes(0)

    def values(self) -> Tensor:
        """Return the values `[kv_heads, tokens, head_dim]`, dequantised to float32."""
        return torch.addcmul(self.value_zero.float(), self._codes(1), self.value_scale.float())

    def dense(self, groups: Tensor | None = None) -> Tensor:
        """Return the layer `[2, kv_heads, tokens, head_dim]`, dequantised to its dtype.

        Args:
            groups: which key group each token `[tokens]` belongs to, on the layer's device; None for runs of `GROUP`.
        """
        tokens = self.shape[2]
        if groups is None:
            scale, zero = (p.repeat_interleave(GROUP, 1)[:, :tokens].float() for p in (self.key_scale, self.key_zero))
        else:
            scale, zero = (part.float().index_select(1, groups) for part in (self.key_scale, self.key_zero))
        return torch.stack((self.keys() * scale + zero, self.values())).to(self.dtype)

    def _codes(self, which: int) -> Tensor:
        codes = self.codes[which]
        if self.bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        return codes.float()


def group_of_tokens(lengths: Sequence[int]) -> Tensor:
    """Return which of all key groups each token `[tokens]` has, of layers of these lengths side by side."""
    groups, before = [], 0
    for length in lengths:
        groups.append(torch.arange(length) // GROUP + before)
        before += -(-length // GROUP)
    return torch.cat(groups)


def dense(layer: Tensor | QuantisedLayer) -> Tensor:
    """Return a layer `[2, kv_heads, tokens, head_dim]` as a tensor, whichever way it is kept."""
    return layer.dense() if isinstance(layer, QuantisedLayer) else layer


def _scale(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero in float16, the scale never 0; codes are chosen for them as they are after rounding."""
    limit = torch.finfo(torch.float16).max
    zero = low.clamp(-limit, limit).half()
    scale = ((high - zero.float()) / levels).clamp(1e-7, limit).half()
    return scale.clamp_min(torch.finfo(torch.float16).smallest_normal), zero
