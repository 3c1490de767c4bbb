"""Chunks are precomputed in each way, and rows say how many stood behind their nearest, and behind how much of it."""

from __future__ import annotations

import json

import zoo
from support.llm import VOCAB, chat_tokenizer

from chunkcache.eval import Results
from chunkcache.eval.precompute import BENCH, WAYS, bench_precompute, summary

TEXTS = [f"Ship {number} left the harbour on day {number} with {number} barrels." for number in range(4)]
NEAREST = [[other for other in TEXTS if other != text] for text in TEXTS]


def test_each_way_is_timed_against_the_lead_in_alone():
    results = Results(BENCH, {"texts": len(TEXTS)}, {})
    model = zoo.new("llama", vocab_size=VOCAB, max_position_embeddings=4096)  # room for the lead-in
    for lost in (0, 3):  # and goes on after rows were lost
        del results.rows[len(results.rows) - lost :]
        bench_precompute(results, model, chat_tokenizer(), TEXTS, NEAREST, rounds=2)
        assert [(row["round"], row["way"]) for row in results.rows] == [(n, way) for n in range(2) for way in WAYS]
    found = {row["way"]: row for row in summary(results)["ways"]}
    assert found["packaged"]["ratio"] == 1
    assert found["packaged"]["overlap"] == found["packaged"]["near"] == 0
    alone, once = found["neighbours, first=False, extra=0"], found["neighbours, first=False"]
    assert 0 < alone["near"] < 1  # the first has nothing to stand behind
    assert once["near"] == 1  # it is computed again
    assert alone["overlap"] < once["overlap"] <= found["neighbours"]["overlap"]
    assert all(row["ratio"] > 0 for row in found.values())
    assert [row[0] for row in summary(results)["tables"][0]["rows"]] == list(WAYS)
    assert summary(Results(BENCH, {"texts": 4}, {}))["ways"] == []  # interrupted before its first row


def test_one_chunk_alone_has_none_that_is_nearest(command_line, tmp_path):
    data = tmp_path / "one.json"
    data.write_text(json.dumps([{"question": "?", "answers": [], "ctxs": [{"title": "", "text": TEXTS[0]}]}]))
    code, _, error = command_line("bench", "precompute", str(data), "--model", "/no/such/model")
    assert code == 2
    assert "has 1 chunk: none is nearest" in " ".join(error.split())
