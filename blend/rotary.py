"""Re-rotation: moving stored keys from the positions they were computed at to those of this prompt.

RoPE rotates pairs of key dimensions by an angle proportional to the position, and rotations compose: keys
rotated for position p and rotated again by the angles of d are the keys for position p + d (RoFormer,
arXiv 2104.09864, eq. 34). Which dimensions form a pair, and by which angle each turns, is read off the
model's own functions, so that scaled, partial and interleaved variants need no code of their own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.errors import UnsupportedModelError

ApplyRotary = Callable[..., tuple[Tensor, Tensor]]
MOST_KNOWN = 4096  # deltas whose angles are remembered


class Rotary:
    """Rotates keys by a position delta, the way one layer type of one model does.

    Angles are found on the CPU, wherever the model is: nothing waits for a device, and no two streams share them.

    Args:
        embedding: the model's rotary embedding module, `(x, position_ids[, layer_type]) -> (cos, sin)`.
        apply: the model's own `apply_rotary_pos_emb(q, k, cos, sin)`.
        head_dim: size of the last dimension of a key.
        layer_type: passed to `embedding` where it takes one (models with several RoPEs).

    Raises:
        UnsupportedModelError: the pairs are neither two halves nor neighbours.
    """

    def __init__(self, embedding: nn.Module, apply: ApplyRotary, head_dim: int, layer_type: str) -> None:
        self._embedding = _on_host(embedding)
        self._apply = apply
        self._head_dim = head_dim
        takes_type = "layer_type" in inspect.signature(embedding.forward).parameters
        self._arguments: dict[str, Any] = {"layer_type": layer_type} if takes_type else {}
        self._basis = self._find_basis()
        self._first, self._second, self.rotary_dim = self._find_pairs()
        self._known: dict[int, Tensor] = {}
        self.rotation = lru_cache(maxsize=1024)(self._rotation)

    @property
    def pairs(self) -> tuple[slice, slice]:
        """The first and the second dimension of each pair that is turned."""
        return self._first, self._second

    @torch.no_grad()
    def rotations(self, deltas: Sequence[int]) -> Tensor:
        """Return the angles of several deltas for `turn`, `[deltas, rotary_dim * 3 / 2]` float32, on the CPU.

        In each row stands the cosine for each rotated dimension, then the sine for each pair of them.
        """
        known = {delta: self._known.get(delta) for delta in deltas}
        missing = [delta for delta, row in known.items() if row is None]
        if missing:
            found = dict(zip(missing, self._angles(missing), strict=True))
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            self._known.update(found)
            known.update(found)
        return torch.stack([row for delta in deltas if (row := known[delta]) is not None])

    def shift(self, keys: Tensor, delta: int, out: Tensor) -> None:
        """Write `keys` `[..., head_dim]`, rotated by `delta` positions, into `out` of that shape."""
        if delta == 0:
            out.copy_(keys, non_blocking=True)
            return
        cos, sin = (part.to(out.device, non_blocking=True) for part in self.rotation(delta))
        keys = keys.to(out.device, non_blocking=True)
        if out.dtype == torch.float32:
            self._turn(keys.float(), cos, sin, out)
        else:  # rotated in float32, and rounded once
            self._turn(keys.float(), cos, sin, turned := torch.empty_like(keys, dtype=torch.float32))
            out.copy_(turned)

    def turn(self, keys: Tensor, angles: Tensor) -> None:
        """Rotate keys in place, each token by angles of its own.

        Args:
            keys: `[..., tokens, head_dim]`. If they are not float32 they are rotated as such, and rounded once.
            angles: `[tokens, rotary_dim * 3 / 2]`, rows of `rotations`, on their device.
        """
        first, second, size = self._first, self._second, self.rotary_dim
        cos, sin = angles[:, :size], angles[:, size:]
        keys = keys[..., :size]
        # A GPU casts in the kernels that rotate; the CPU is faster with one cast for all of them.
        source = keys.float() if keys.device.type == "cpu" else keys
        turned = torch.mul(source, cos)
        turned[..., first].addcmul_(source[..., second], sin, value=-1)
        turned[..., second].addcmul_(source[..., first], sin)
        keys.copy_(turned)

    def shift_scaled(self, codes: Tensor, scale: Tensor, zero: Tensor, delta: int, out: Tensor) -> None:
        """Write the keys `codes * scale + zero`, rotated by `delta` positions, into `out`, all in one pass.

        Rotation is linear: scaling goes into the angles, and the zero point is rotated by itself.

        Args:
            codes: float32 `[..., tokens, head_dim]`.
            scale: float32 `[..., 1, head_dim]`.
            zero: like `scale`.
            delta: positions.
            out: float32, of the shape of `codes`.
        """
        cos, sin = (part.to(out.device, non_blocking=True) for part in self.rotation(delta))
        first, second, rest = self._first, self._second, slice(self.rotary_dim, None)
        turned = torch.empty_like(zero)
        self._turn(zero, cos, sin, turned)
        for mine, other, sign in ((first, second, -1), (second, first, 1)):
            torch.addcmul(turned[..., mine], codes[..., mine], scale[..., mine] * cos, out=out[..., mine])
            out[..., mine].addcmul_(codes[..., other], scale[..., other] * sin, value=sign)
        if self.rotary_dim < self._head_dim:
            torch.addcmul(zero[..., rest], codes[..., rest], scale[..., rest], out=out[..., rest])

    def _turn(self, keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        first, second = keys[..., self._first], keys[..., self._second]
        torch.mul(first, cos, out=out[..., self._first]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., self._second]).addcmul_(first, sin)
        if self.rotary_dim < self._head_dim:
            out[..., self.rotary_dim :].copy_(keys[..., self.rotary_dim :])

    def _rotation(self, delta: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin `[rotary_dim / 2]` of the angles of `delta` positions, float32, on the CPU."""
        (row,) = self.rotations([delta])
        return row[: self.rotary_dim][self._first], row[self.rotary_dim :]

    def _angles(self, deltas: Sequence[int]) -> Tensor:
        """Return what `rotations` does, free of attention scaling, without looking at what is known."""
        probe = torch.zeros(self._basis)
        probe[self._first] = 1.0  # of each pair; the other one becomes the sine
        turned = self._turned(probe[None], *self._cos_sin(deltas))[:, 0]
        cos, sin = turned[:, self._first], turned[:, self._second]
        scale = torch.sqrt(cos * cos + sin * sin)  # YaRN and longrope scale cos and sin alike
        angles = cos.new_empty(len(deltas), self.rotary_dim * 3 // 2)
        angles[:, self._first] = angles[:, self._second] = cos / scale
        angles[:, self.rotary_dim :] = sin / scale
        return angles

    def _cos_sin(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what the model multiplies keys at these positions with, each `[positions, 1, n]`."""
        probe = torch.zeros(1, 1, 1)
        cos, sin = self._embedding(probe, torch.tensor([positions]), **self._arguments)
        return cos.transpose(0, 1), sin.transpose(0, 1)

    def _turned(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return `[positions, vectors, basis]`: what the model makes of `vectors` `[vectors, basis]` at each."""
        count, size = len(cos), len(vectors)
        keys = vectors.expand(count, 1, size, -1)
        _, turned = self._apply(keys, keys, cos.expand(count, size, -1), sin.expand(count, size, -1))
        return turned[:, 0]

    @torch.no_grad()
    def _find_basis(self) -> int:
        """Return how many dimensions the model's function takes: a whole key, or only those that are rotated."""
        cos, sin = self._cos_sin([1])
        for size in (self._head_dim, cos.shape[-1]):
            probe = torch.zeros(1, 1, 1, size)
            with suppress(RuntimeError):  # the shapes do not fit
                self._apply(probe, probe, cos, sin)
                return size
        raise UnsupportedModelError(
            f"apply_rotary_pos_emb takes neither keys of {self._head_dim} dimensions nor of {cos.shape[-1]}"
        )

    @torch.no_grad()
    def _find_pairs(self) -> tuple[slice, slice, int]:
        """Turn every pair by a right angle and see which dimension each unit vector lands on."""
        cos, sin = self._cos_sin([1])
        (turned,) = self._turned(torch.eye(self._basis), torch.zeros_like(cos), torch.ones_like(sin)).round()
        rotary_dim = int((turned.diagonal() == 0).sum())
        halves = slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim)
        neighbours = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
        for first, second in (halves, halves[::-1], neighbours, neighbours[::-1]):
            expected = torch.eye(self._basis)
            expected[:rotary_dim, :rotary_dim] = 0
            expected[first, second] = torch.eye(rotary_dim // 2)
            expected[second, first] = -torch.eye(rotary_dim // 2)
            if rotary_dim and torch.equal(turned, expected):
                return first, second, rotary_dim
        raise UnsupportedModelError(
            f"{type(self._embedding).__name__} pairs the key dimensions in an unknown way, so stored keys "
            "cannot be moved to other positions"
        )


def _on_host(embedding: nn.Module) -> nn.Module:
    """Return a module without parameters that computes on the CPU what `embedding` does, whoever hooks that one."""
    twin = copy.copy(embedding)
    for name in ("forward", "_old_forward", "_hf_hook"):  # of accelerate: they move the input to the model's device
        twin.__dict__.pop(name, None)
    tensors = {name: value.cpu() for name, value in vars(embedding).items() if isinstance(value, Tensor)}
    buffers = {name: buffer if buffer is None else buffer.cpu() for name, buffer in embedding._buffers.items()}
    twin.__dict__.update(tensors, _buffers=buffers)
    return twin
