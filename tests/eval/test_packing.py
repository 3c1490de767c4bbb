"""Throughput is measured for each context and length, and what runs one by one is what packs compute."""

from __future__ import annotations

import torch
from support.llm import chat_tokenizer, tiny_model

from chunkcache.blend import Decoder
from chunkcache.eval import Results
from chunkcache.eval.packing import BENCH, bench_packing, prefill_alone, summary
from chunkcache.library.encoder import Encoder


def test_there_is_a_row_for_each_context_and_length():
    results = Results(BENCH, {}, {})
    for lost in (0, 2):  # and goes on after two rows were lost
        del results.rows[len(results.rows) - lost :]
        bench_packing(results, tiny_model(), chat_tokenizer(), (4, 8), tokens=16, rounds=1)
        assert [(row["behind"], row["chunk_tokens"]) for row in results.rows] == [
            (behind, length) for behind in ("prefix", "prefix and lead-in") for length in (4, 8)
        ]
    assert all(min(row["one_by_one"], row["packed"], row["ratio"]) > 0 for row in results.rows)
    [table] = summary(results)["tables"]
    assert [row[:2] for row in table["rows"]] == [[row["behind"], str(row["chunk_tokens"])] for row in results.rows]


def test_both_ways_compute_the_same():
    decoder = Decoder(tiny_model())
    encoder = Encoder(decoder)
    context = next(encoder.encode(None, [(5, 6, 7)]))
    [packed] = encoder.encode(context, [(8, 9, 10, 11)])
    for layer, alone in zip(packed.layers, prefill_alone(decoder, context, (8, 9, 10, 11)), strict=True):
        torch.testing.assert_close(layer, alone)
