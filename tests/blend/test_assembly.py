"""One layer's KV put in place: all chunks at once is, bit for bit, what one by one is."""

from __future__ import annotations

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import Plan, assembly
from chunkcache.blend.assembly import Assembler, place
from chunkcache.kv import ChunkKV

IDS = tuple(range(40, 60))


def stored(decoder, ids, position, dtype):
    layers = [torch.randn(2, *decoder.heads[i][:1], len(ids), decoder.heads[i][1]) for i in range(zoo.LAYERS)]
    return ChunkKV.of(ids, position, [layer.to(dtype) for layer in layers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_all_chunks_at_once_are_bit_for_bit_what_they_are_one_by_one(name, dtype):
    decoder = h.decoder(name, zoo.FAMILIES[name].attentions[0])
    a, b, c = (stored(decoder, IDS[i:j], at, dtype) for i, j, at in ((0, 4, 0), (6, 12, 2), (12, 18, 40)))
    plan = Plan.of(IDS, [span(0, a), span(7, b, 1, 4), span(12, c)])
    assembler = Assembler(plan)
    for index, rotary in enumerate(decoder.rotaries):
        like = torch.empty(1, a.layers[index].shape[1], 1, a.layers[index].shape[3], dtype=dtype)
        layers = [kv.layers[index] for kv in (a, b, c)]
        both = assembler.assemble(layers, rotary, like)
        assert both.shape[2] == len(IDS)
        for each, layer in zip(plan.reused, layers, strict=True):
            here = both[:, :, each.start : each.stop]
            expected = torch.empty_like(here)
            place(each, layer, rotary, expected)
            assert torch.equal(here, expected)


def test_long_chunks_are_put_in_place_one_by_one_and_come_out_the_same(monkeypatch):
    decoder = h.decoder("llama")
    a, b = (stored(decoder, IDS[i:j], at, torch.float32) for i, j, at in ((0, 8, 3), (8, 18, 0)))
    plan = Plan.of(IDS, [span(0, a), span(8, b)])
    like = torch.empty(1, *decoder.heads[0][:1], 1, decoder.heads[0][1])
    layers = [a.layers[0], b.layers[0]]
    at_once = Assembler(plan).assemble(layers, decoder.rotaries[0], like)
    monkeypatch.setattr(assembly, "LONG", 9)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("put together at once"))
    one_by_one = Assembler(plan).assemble(layers, decoder.rotaries[0], like)
    assert torch.equal(one_by_one[:, :, :18], at_once[:, :, :18])
