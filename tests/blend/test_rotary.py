"""Re-rotation: by the model's own rotary function, for any two positions, and nothing but the rotated dimensions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chunkcache.blend.decoder import Decoder
from chunkcache.blend.rotary import Rotary
from chunkcache.errors import UnsupportedModelError

positions = st.integers(0, zoo.MAX_POSITIONS // 2 - 6)  # below the switch of longrope


@cache
def rotaries(name):
    """Every different rotary of a model, with its layer type."""
    decoder = Decoder(zoo.build(name, zoo.FAMILIES[name].attentions[0]))
    types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * zoo.LAYERS
    return dict(zip(decoder.rotaries, types, strict=True))


@torch.no_grad()
def rotated(rotary, keys, position):
    """`keys` `[kv_heads, tokens, head_dim]` as the model itself rotates them, the first one for `position`."""
    where = torch.arange(position, position + keys.shape[1])[None]
    cos, sin = rotary._embedding(keys[None], where, **rotary._arguments)
    taken, rest = keys[None].split((rotary._basis, rotary._head_dim - rotary._basis), dim=-1)
    return torch.cat((rotary._apply(taken, taken, cos, sin)[1], rest), dim=-1)[0]


def shifted(rotary, keys, delta):
    out = torch.full_like(keys, torch.nan)
    rotary.shift(keys, delta, out)
    return out


def llama_rotary(**options):
    return Decoder(zoo.new("llama", **options)).rotaries[0]


@pytest.mark.parametrize("name", zoo.FAMILIES)
@given(old=positions, new=positions)
def test_keys_moved_between_any_positions_are_those_the_model_rotates_there(name, old, new):
    for rotary in rotaries(name):
        keys = torch.randn(2, 5, rotary._head_dim, generator=torch.Generator().manual_seed(0))
        moved = shifted(rotary, rotated(rotary, keys, old), new - old)
        torch.testing.assert_close(moved, rotated(rotary, keys, new), atol=1e-4, rtol=0)


def test_the_angles_are_those_of_the_paper():
    rotary = llama_rotary()
    angles = 7 * 10000 ** -(torch.arange(0, 16, 2) / 16)
    cos, sin = rotary.rotation(7)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


@pytest.mark.parametrize("name", ["llama-yarn", "phi3-longrope"])
def test_attention_scaling_is_not_applied_a_second_time(name):
    assert zoo.build(name).model.rotary_emb.attention_scaling > 1
    cos, sin = next(iter(rotaries(name))).rotation(9)
    torch.testing.assert_close(cos * cos + sin * sin, torch.ones_like(cos))


def test_layer_types_with_different_thetas_turn_by_different_angles():
    by_type = {kind: rotary.rotation(5)[0] for rotary, kind in rotaries("gemma3").items()}
    assert set(by_type) == {"sliding_attention", "full_attention"}
    assert not torch.allclose(*by_type.values())


@pytest.mark.parametrize(("name", "rotary_dim"), [("llama", 16), ("glm4", 8), ("phi", 8), ("gpt-neox", 4)])
def test_dimensions_that_are_not_rotary_are_copied_as_they_are(name, rotary_dim):
    rotary = next(iter(rotaries(name)))
    keys = torch.randn(2, 3, 16)
    moved = shifted(rotary, keys, 3)
    assert rotary.rotary_dim == rotary_dim
    assert torch.equal(moved[..., rotary_dim:], keys[..., rotary_dim:])
    assert not torch.isclose(moved[..., : rotary_dim // 2], keys[..., : rotary_dim // 2]).all()


def test_a_delta_of_zero_changes_no_bit():
    keys = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(shifted(llama_rotary(), keys, 0), keys)


@pytest.mark.parametrize("delta", [5, -5])
def test_half_precision_is_rotated_in_float32_and_rounded_once(delta):
    keys = torch.randn(2, 3, 16).to(torch.bfloat16)
    rotary = llama_rotary()
    assert torch.equal(shifted(rotary, keys, delta), shifted(rotary, keys.float(), delta).to(torch.bfloat16))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_stored_keys_of_another_dtype_are_converted(stored, wanted):
    rotary = llama_rotary()
    keys = torch.randn(2, 3, 16)
    out = torch.empty(2, 3, 16, dtype=wanted)
    rotary.shift(keys.to(stored), 4, out)
    torch.testing.assert_close(out.float(), shifted(rotary, keys, 4), atol=0.05, rtol=0)


def test_only_the_given_slice_is_written():
    whole = torch.zeros(2, 9, 16)
    llama_rotary().shift(torch.ones(2, 3, 16), 2, whole[:, 4:7])
    assert (whole[:, 4:7] != 0).any(dim=2).all()
    assert whole[:, :4].count_nonzero() == whole[:, 7:].count_nonzero() == 0


def test_the_stored_keys_are_left_as_they_were():
    keys = torch.randn(2, 3, 16)
    before = keys.clone()
    shifted(llama_rotary(), keys, 2)
    assert torch.equal(keys, before)


class Angles(nn.Module):
    """A rotary embedding of 16 dimensions, as plain as can be."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(8))

    def forward(self, x, position_ids):
        angles = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def crosswise(q, k, cos, sin, unsqueeze_dim=1):
    """Pair dimension i with dimension 15 - i, as no model does."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin


def clockwise(q, k, cos, sin, unsqueeze_dim=1):
    """Pair two halves and turn them the other way round, as NanoChat does."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q_turned, k_turned = (torch.cat((x[..., 8:], -x[..., :8]), dim=-1) for x in (q, k))
    return q * cos + q_turned * sin, k * cos + k_turned * sin


def test_pairs_may_turn_the_other_way_round():
    rotary = Rotary(Angles(), clockwise, 16, "full_attention")
    keys = torch.randn(2, 5, 16)
    moved = shifted(rotary, rotated(rotary, keys, 3), 4)
    torch.testing.assert_close(moved, rotated(rotary, keys, 7))


def nothing(q, k, cos, sin, unsqueeze_dim=1):
    return q, k


@pytest.mark.parametrize("apply", [crosswise, nothing])
def test_pairs_of_an_unknown_kind_are_refused(apply):
    with pytest.raises(UnsupportedModelError, match=r"Angles pairs the key dimensions in an unknown way"):
        Rotary(Angles(), apply, 16, "full_attention")


@pytest.mark.parametrize("name", ["llama-yarn", "llama-dynamic-ntk", "gemma3", "phi3-longrope", "cohere"])
def test_the_angles_of_several_deltas_are_those_of_each(name):
    for rotary in rotaries(name):
        deltas = [3, -7, 0, 3, 100]
        for delta, row in zip(deltas, rotary.rotations(deltas), strict=True):
            cos, sin = rotary.rotation(delta)
            alone = rotary._angles([delta])[0]
            assert torch.equal(row, alone)
            assert torch.equal(row[: rotary.rotary_dim][rotary._second], cos)
            assert torch.equal(row[rotary.rotary_dim :], sin)


def test_angles_are_remembered_up_to_a_number_of_them(monkeypatch):
    monkeypatch.setattr("chunkcache.blend.rotary.MOST_KNOWN", 4)
    rotary = llama_rotary()
    first = rotary.rotations(range(10)).clone()
    assert torch.equal(rotary.rotations(range(5, 15))[:5], first[5:])
    assert len(rotary._known) <= 15
