"""On an accelerator layers are put in place in groups: bit for bit what one chunk and one layer at a time are."""

from __future__ import annotations

import pytest
import torch
import zoo
from pretend import PretendDevice
from support import blend as h
from support.blend import span

from chunkcache.blend import FusedCache, Plan
from chunkcache.blend.assembly import MOST_LAYERS, Assembler, place
from chunkcache.kv import ChunkKV
from chunkcache.kv.quantised import GROUP, QuantisedLayer

LENGTHS = (5, GROUP + 3, 2 * GROUP)
IDS = tuple(range(1, 240))
LAYERS = 12


def stored(heads, bits, dtype=torch.bfloat16):
    """Chunk KV behind one another, with a gap before each, and its layers; the first of them never quantised."""
    spans, start = [], 0
    for index, length in enumerate(LENGTHS):
        start += 2 * index
        layers = [torch.randn(2, heads[0], length, heads[1]).to(dtype) for _ in range(LAYERS)]
        if bits and index:
            layers = [QuantisedLayer.of(layer, bits) for layer in layers]
        spans.append(span(start, ChunkKV.of(IDS[start : start + length], 40 * index, layers)))
        start += length
    return Plan.of(IDS, spans)


def assembled(plan, rotary, device):
    heads, dim = plan.reused[0].kv.layers[0].shape[1::2]
    like = torch.empty(1, heads, 1, dim, dtype=torch.bfloat16, device=device)
    on_device = [[each.kv.layers[index].to(device) for each in plan.reused] for index in range(LAYERS)]
    assembler = Assembler(plan)
    size = assembler.layers_at_once(like)
    groups = [on_device[first : first + size] for first in range(0, LAYERS, size)]
    return [both.cpu() for group in groups for both in assembler.assemble_group(group, rotary, like)]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "cohere", "glm"])
def test_a_group_is_bit_for_bit_what_chunks_are_one_by_one(name, bits):
    decoder = h.decoder(name)
    plan, rotary = stored(decoder.heads[0], bits), decoder.rotaries[0]
    with PretendDevice() as device:
        got = assembled(plan, rotary, "cuda:0")
        assert not device.total.violations
    for index, both in enumerate(got):
        assert both.shape[2] == len(IDS)
        for each in plan.reused:
            here = both[:, :, each.start : each.stop]
            place(each, each.kv.layers[index], rotary, expected := torch.empty_like(here))
            assert torch.equal(here, expected)


def test_chunks_that_are_quantised_in_several_ways_are_put_in_place_all_the_same():
    decoder = h.decoder("llama")
    plan = stored(decoder.heads[0], 8)
    other = [QuantisedLayer.of(layer.dense(), 4) for layer in plan.reused[2].kv.layers]
    plan = Plan.of(
        IDS, [*plan.reused[:2], span(plan.reused[2].start, ChunkKV.of(plan.reused[2].chunk_ids, 80, other))]
    )
    with PretendDevice():
        got = assembled(plan, decoder.rotaries[0], "cuda:0")
    for each in plan.reused:
        here = got[3][:, :, each.start : each.stop]
        place(each, each.kv.layers[3], decoder.rotaries[0], expected := torch.empty_like(here))
        assert torch.equal(here, expected)


def test_groups_grow_and_hold_layers_of_one_kind_only():
    decoder = h.decoder("llama")
    plan = stored(decoder.heads[0], None)
    rotaries = [decoder.rotaries[0]] * 10 + [None] * 2
    cache = FusedCache(decoder.config, plan, rotaries)
    with PretendDevice() as device:
        like = torch.empty(1, *decoder.heads[0][:1], 1, decoder.heads[0][1], dtype=torch.bfloat16, device="cuda")
        sizes = []
        for index in range(LAYERS):
            with device.watch() as seen:
                cache.assemble(index, like)
            sizes.append(seen.ops["cat"])
        cache.stop_loading()
    assert sizes == [1, 2, 0, 4, 0, 0, 0, 3, 0, 0, 2, 0]
    assert max(sizes) <= MOST_LAYERS
    assert zoo.LAYERS < LAYERS


def test_large_layers_are_put_in_place_one_by_one():
    plan = Plan.of(range(100))
    with PretendDevice():
        like = torch.empty(1, 1 << 20, 1, 128, dtype=torch.bfloat16, device="cuda")
        assert Assembler(plan).layers_at_once(like) == 1
    assert Assembler(plan).layers_at_once(torch.empty(1, 2, 1, 16)) == 1
