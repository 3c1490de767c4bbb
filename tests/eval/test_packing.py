"""Throughput is measured for each context and length, and what runs one by one is what packs compute."""

from __future__ import annotations

import torch
from support.llm import chat_tokenizer, tiny_model

from chunkcache.blend import Decoder
from chunkcache.eval.packing import _prefill_alone, bench_packing
from chunkcache.library.encoder import Encoder


def test_there_is_a_row_for_each_context_and_length():
    found = bench_packing(tiny_model(), chat_tokenizer(), (4, 8), tokens=16, rounds=1)
    assert [(each.behind, each.chunk_tokens) for each in found] == [
        (behind, length) for behind in ("prefix", "prefix and lead-in") for length in (4, 8)
    ]
    assert all(min(each.one_by_one, each.packed, each.ratio) > 0 for each in found)


def test_both_ways_compute_the_same():
    decoder = Decoder(tiny_model())
    encoder = Encoder(decoder)
    context = next(encoder.encode(None, [(5, 6, 7)]))
    [packed] = encoder.encode(context, [(8, 9, 10, 11)])
    for layer, alone in zip(packed.layers, _prefill_alone(decoder, context, (8, 9, 10, 11)), strict=True):
        torch.testing.assert_close(layer, alone)
