"""The self-check refuses keys that are rotated wrongly, in every family and dtype, whatever noise the model has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from support import blend as h
from torch import Tensor

from chunkcache.blend import Decoder, self_check
from chunkcache.blend.rotary import Rotary
from chunkcache.errors import SelfCheckError


class Turned:
    """Stands in for a layer's rotary, and turns each pair by an angle of its own choice.

    Args:
        right: the layer's own, whose pairs and angles are read off what it makes of the unit vectors.
        head_dim: size of a key.
        change: takes the angles `[rotary_dim]` of one position and of each the number of its pair, as a share of all;
            returns the angles to use, and what to multiply cos and sin with.
    """

    def __init__(
        self, right: Rotary, head_dim: int, change: Callable[[Tensor, Tensor], tuple[Tensor, float]]
    ) -> None:
        self.rotary_dim = size = right.rotary_dim
        one = torch.empty(head_dim, head_dim)
        right.shift(torch.eye(head_dim), 1, one)
        beside = one - torch.diag(one.diagonal())
        self._partner = beside[:size].abs().argmax(1)
        angles = torch.atan2(beside[:size].sum(1), one.diagonal()[:size])
        pair = torch.minimum(torch.arange(size), self._partner).unique(return_inverse=True)[1]
        self._angles, self._scale = change(angles, pair / (size // 2))
        self._head_dim = head_dim

    def shift(self, keys: Tensor, delta: int, out: Tensor) -> None:
        """As `Rotary.shift`."""
        matrix = torch.eye(self._head_dim)
        index = torch.arange(self.rotary_dim)
        matrix[index, index] = self._scale * torch.cos(delta * self._angles)
        matrix[index, self._partner] = self._scale * torch.sin(delta * self._angles)
        out.copy_(keys.float() @ matrix)


class Repaired:
    """Stands in for a layer's rotary, and pairs other dimensions: neighbours for halves, or halves for neighbours."""

    def __init__(self, right: Rotary, head_dim: int, halves: bool) -> None:
        self._right, self.rotary_dim = right, right.rotary_dim
        evens, odds = torch.arange(0, self.rotary_dim, 2), torch.arange(1, self.rotary_dim, 2)
        order = torch.cat((evens, odds, torch.arange(self.rotary_dim, head_dim)))
        self._order = order if halves else order.argsort()

    def shift(self, keys: Tensor, delta: int, out: Tensor) -> None:
        """As `Rotary.shift`."""
        self._right.shift(keys[..., self._order], delta, moved := torch.empty_like(out))
        out.copy_(moved[..., self._order.argsort()])


WRONG = {
    "sign": lambda angles, pair: (-angles, 1.0),
    "theta doubled": lambda angles, pair: (angles * 2.0**-pair, 1.0),
    "theta halved": lambda angles, pair: (angles * 0.5**-pair, 1.0),
    "positions halved": lambda angles, pair: (angles / 2, 1.0),
    "tables scaled": lambda angles, pair: (angles, 1.1),
}


def replaced(checked: Decoder, make: Callable[[Rotary, int], object]) -> Decoder:
    """Return an unchecked decoder of the model of `checked`, whose layers are rotated by `make(rotary, head_dim)`."""
    decoder = Decoder(checked.model)
    made = {}
    for rotary, (_, head_dim) in zip(decoder.rotaries, checked.heads or (), strict=True):
        made.setdefault(rotary, make(rotary, head_dim))
    decoder.rotaries = [made[rotary] for rotary in decoder.rotaries]
    return decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_wrong_rotation_is_refused(name, dtype):
    """None of these is the identity in any family here: each has layers with RoPE, and several rotated pairs."""
    checked = h.decoder(name, zoo.FAMILIES[name].attentions[0], dtype)
    right = replaced(checked, lambda rotary, size: Turned(rotary, size, lambda angles, pair: (angles, 1.0)))
    assert self_check(right).passed
    makers = {
        what: lambda rotary, size, change=change: Turned(rotary, size, change) for what, change in WRONG.items()
    }
    makers |= {
        f"pairs, {halves=}": lambda rotary, size, halves=halves: Repaired(rotary, size, halves)
        for halves in (True, False)
    }
    for make in makers.values():
        with pytest.raises(SelfCheckError, match="re-rotation"):
            self_check(replaced(checked, make))


@pytest.mark.parametrize("name", ["smollm3", "cohere2"])
def test_a_wrong_rotation_of_layers_without_rope_changes_nothing(name):
    """They are found by the same check, and their keys are left alone."""
    model = zoo.build(name, "sdpa", torch.bfloat16)
    decoder = Decoder(model)
    without = (1, 3)
    for index in without:
        decoder.rotaries[index] = Turned(decoder.rotaries[index], 16, WRONG["sign"])  # type: ignore[call-overload]
    assert self_check(decoder).passed
    assert [index for index, rotary in enumerate(decoder.rotaries) if rotary is None] == list(without)
