"""Quantised layers: within half a step of what they stand for, and put in place as a dense layer would be."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blend import span

from chunkcache.blend import Decoder
from chunkcache.blend.assembly import place
from chunkcache.kv import ChunkKV
from chunkcache.kv.quantised import GROUP, QuantisedLayer, dense

LENGTHS = [1, 2, 63, 64, 65, 128, 130]
BITS = [8, 4]


def layer_of(tokens, heads=2, dim=16, dtype=torch.float32):
    """A layer as models make them: some channels of the keys are large, and off centre."""
    layer = torch.randn(2, heads, tokens, dim)
    layer[0, :, :, 3] = layer[0, :, :, 3] * 20 + 50
    return layer.to(dtype)


def bounds(layer, bits):
    """The error that is allowed of every number: half a step, and what rounding zero and scale to float16 costs."""
    levels, half = 2**bits - 1, 2.0**-11
    keys, values = layer.float()
    spans = [group.amax(1, keepdim=True) - group.amin(1, keepdim=True) for group in keys.split(GROUP, dim=1)]
    sizes = [group.shape[1] for group in keys.split(GROUP, dim=1)]
    span = torch.cat([each.expand(-1, size, -1) for each, size in zip(spans, sizes, strict=True)], dim=1)
    each = torch.stack((span, (values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)).expand_as(values)))
    largest = torch.stack(
        (keys.abs().amax(1, keepdim=True).expand_as(keys), values.abs().amax(-1, keepdim=True) + 0 * values)
    )
    return each / levels * 0.51 + each * half * 2 + largest * half * 2 + 4e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_number_is_within_half_a_step_of_its_group(tokens, bits):
    layer = layer_of(tokens)
    kept = QuantisedLayer.of(layer, bits)
    assert ((kept.dense() - layer).abs() <= bounds(layer, bits)).all()
    assert torch.equal(kept.values(), kept.dense()[1])
    assert kept.key_scale.shape == (2, -(-tokens // GROUP), 16)
    assert kept.value_scale.shape == (2, tokens, 1)


@pytest.mark.parametrize("bits", BITS)
def test_an_outlier_among_the_keys_costs_its_own_channel_and_group_only(bits):
    layer = torch.randn(2, 2, 2 * GROUP, 16)
    before = (QuantisedLayer.of(layer, bits).dense() - layer).abs()
    layer[0, 1, 5, 7] = 1000.0
    after = (QuantisedLayer.of(layer, bits).dense() - layer).abs()
    worse = (after != before).nonzero()
    assert worse.tolist()
    assert all((which, head, dim) == (0, 1, 7) and token < GROUP for which, head, token, dim in worse.tolist())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fill", [0.0, 1.0, -3.0, 60000.0, 1e-6])
def test_a_constant_layer_stays_what_it_is(fill, bits):
    layer = torch.full((2, 1, 5, 4), fill)
    torch.testing.assert_close(QuantisedLayer.of(layer, bits).dense(), layer, atol=1e-6, rtol=2**-10)


@pytest.mark.parametrize("bits", BITS)
def test_numbers_beyond_float16_are_cut_off_and_never_become_nan(bits):
    layer = torch.randn(2, 1, 9, 4)
    layer[0, 0, 3, 1], layer[1, 0, 4, 2] = 1e30, -1e30
    assert QuantisedLayer.of(layer, bits).dense().isfinite().all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_comes_back(dtype, bits):
    kept = QuantisedLayer.of(layer_of(5, dtype=dtype), bits)
    assert (kept.dtype, kept.dense().dtype) == (dtype, dtype)
    assert kept.codes.dtype == torch.uint8
    assert {part.dtype for part in list(kept.parts())[1:]} == {torch.float16}


@pytest.mark.parametrize(("bits", "per_number"), [(8, 1), (4, 0.5)])
def test_bytes_are_those_of_codes_and_scales(bits, per_number):
    kept = QuantisedLayer.of(layer_of(130), bits)
    assert kept.shape == (2, 2, 130, 16)
    assert kept.nbytes == 2 * 2 * 130 * 16 * per_number + 2 * 2 * (2 * 3 * 16) + 2 * 2 * (2 * 130)
    assert kept.nbytes == sum(part.nbytes for part in kept.parts())


@settings(max_examples=50)
@given(heads=st.integers(1, 3), tokens=st.integers(1, GROUP), half=st.integers(1, 9))
def test_four_bits_are_packed_and_unpacked(heads, tokens, half):
    codes = torch.randint(0, 16, (2, heads, tokens, 2 * half))
    layer = codes.float()
    layer[0, :, :1] = 0  # every channel spans all 15 steps where there are two tokens
    layer[0, :, -1:] = 15
    kept = QuantisedLayer.of(layer, 4)
    assert kept.codes.shape == (2, heads, tokens, half)
    if tokens > 1:
        assert torch.equal(kept.keys(), layer[0])
    assert ((kept.dense() - layer).abs() < 0.51).all()


def test_quantising_again_what_was_quantised_changes_little():
    once = QuantisedLayer.of(layer_of(70), 8).dense()
    twice = QuantisedLayer.of(once, 8).dense()
    assert ((twice - once).abs() <= bounds(once, 8)).all()


@pytest.mark.parametrize("bits", BITS)
def test_it_moves_to_a_device_with_all_its_parts(bits):
    kept = QuantisedLayer.of(layer_of(5), bits)
    moved = kept.to("meta")
    assert {part.device.type for part in moved.parts()} == {"meta"}
    assert (moved.bits, moved.dtype, moved.shape) == (kept.bits, kept.dtype, kept.shape)
    assert torch.equal(kept.to("cpu").dense(), kept.dense())


def test_dense_takes_either():
    layer = layer_of(5)
    assert dense(layer) is layer
    kept = QuantisedLayer.of(layer, 8)
    assert torch.equal(dense(kept), kept.dense())


# In their place


@cache
def rotaries(name):
    decoder = Decoder(zoo.build(name, zoo.FAMILIES[name].attentions[0]))
    return [rotary for rotary in dict.fromkeys(decoder.rotaries) if rotary is not None]


def placed(rotary, layer, first, length, start):
    """Put `length` tokens from `first` on of a layer computed at position 3 to `start` of a prompt."""
    heads, tokens, dim = layer.shape[1:]
    kv = ChunkKV.of(range(tokens), 3, [layer])
    whole = torch.full((2, heads, 400, dim), torch.nan)
    segment = span(start, kv, first, length)
    place(segment, layer, rotary, whole[:, :, segment.start : segment.stop])
    assert whole[:, :, : segment.start].isnan().all()
    assert whole[:, :, segment.stop :].isnan().all()
    return whole[:, :, segment.start : segment.stop]


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("bits", BITS)
def test_scaling_and_rotating_in_one_pass_is_the_same_as_one_after_the_other(name, bits):
    for rotary in rotaries(name):
        kept = QuantisedLayer.of(layer_of(130, dim=rotary._head_dim), bits)
        for length, start in ((130, 50), (1, 0), (64, 3), (100, 4), (128, 200)):
            torch.testing.assert_close(
                placed(rotary, kept, 0, length, start),
                placed(rotary, kept.dense(), 0, length, start),
                atol=2e-4,
                rtol=1e-5,
            )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("first", "length"), [(0, 130), (0, 7), (5, 60), (63, 2), (64, 64), (64, 66), (129, 1)])
@pytest.mark.parametrize("rotated", [True, False])
def test_any_part_of_a_quantised_layer_is_put_in_its_place(first, length, rotated, bits):
    kept = QuantisedLayer.of(layer_of(130), bits)
    rotary = rotaries("llama")[0] if rotated else None
    torch.testing.assert_close(
        placed(rotary, kept, first, length, 40), placed(rotary, kept.dense(), first, length, 40), atol=2e-4, rtol=1e-5
    )


@pytest.mark.parametrize("first", [0, 5])
def test_into_half_precision_too(first):
    kept = QuantisedLayer.of(layer_of(70, dtype=torch.bfloat16), 8)
    kv = ChunkKV.of(range(70), 3, [kept])
    target = torch.empty(2, 2, 60, 16, dtype=torch.bfloat16)
    place(span(40, kv, first, 60), kept, rotaries("llama")[0], target)
    expected = placed(rotaries("llama")[0], kept.dense().float(), first, 60, 40)
    torch.testing.assert_close(target.float(), expected, atol=0.02, rtol=0.02)


def test_what_is_stored_is_never_written_to():
    kept = QuantisedLayer.of(layer_of(70), 8)
    before = [part.clone() for part in kept.parts()]
    placed(rotaries("llama")[0], kept, 0, 70, 9)
    placed(None, kept, 0, 70, 9)
    assert all(map(torch.equal, before, kept.parts()))
