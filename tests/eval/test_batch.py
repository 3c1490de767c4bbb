"""The measurement of offline batches: what is asked, its rows, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
from support.llm import TEXTS, chat_tokenizer, plain, prompt_ids, tiny_model, wrapped

from chunkcache.blend.hydragen import SharedCache
from chunkcache.eval import batch, batch_summary
from chunkcache.eval.attention_time import time_attention
from chunkcache.eval.batch import Batching, bench_batch, plain_batches, summary, workload
from chunkcache.eval.data import Case

CASES = [Case(f"Question {number}, on the bridge?", TEXTS[number % 2 :], ("1931",)) for number in range(4)]


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch):
    monkeypatch.setattr(batch, "BATCHES", (2,))
    monkeypatch.setattr(batch, "LENGTHS", (16,))


def run(path=None, policies=("full", "reuse", "query:ratio=0.3"), **options):
    cases = workload(CASES, 2, 2)
    model, tokenizer = tiny_model(), chat_tokenizer()
    return bench_batch(model, tokenizer, cases, Batching(policies, new_tokens=4, **options), {"data": "tiny"}, path)


def test_the_questions_of_a_set_share_chunks_and_neighbouring_sets_one():
    cases = workload([Case(str(n), (f"a{n}", f"b{n}"), (str(n),)) for n in range(7)], 3, 2)
    sets = list(dict.fromkeys(case.chunks for case in sorted(cases, key=lambda case: int(case.question))))
    assert sets == [("a0", "a1", "b0"), ("a2", "a3", "a0"), ("a4", "a5", "a2")]
    assert len(cases) == 6
    assert all(case.answers == (case.question,) for case in cases)


def test_a_row_for_every_pass_and_a_summary_from_the_rows_alone():
    results = run()
    passes = [row for row in results.rows if row["kind"] == "pass"]
    assert {(row["policy"], row["way"]) for row in passes} == {
        *((policy, way) for policy in results.settings["policies"] for way in ("one by one", "grouped")),
        ("full", "plain batches"),
    }
    found = summary(results)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for policy, ways in found["policies"].items():
        assert ways["grouped"]["new_tokens_per_s"] > 0
        assert sum(ways["grouped"]["loads"].values()) <= sum(ways["one by one"]["loads"].values())
        if policy != "query:ratio=0.3":
            assert ways["grouped"]["equal"] == 1
    full = found["policies"]["full"]
    assert full["grouped"]["kl_first"][0] < 1e-6
    assert full["plain batches"]["kl_first"][0] < 1e-6
    assert (full["plain batches"]["equal"], full["plain batches"]["gain_over_batches"]) == (1, [1.0])
    assert full["plain batches"]["kv_bytes"] > full["grouped"]["kv_bytes"]  # each sequence has a copy of all
    assert full["one by one"]["gain"] == [1.0]
    assert found["policies"]["reuse"]["grouped"]["kl_first"][0] > 1e-6
    for each in found["tables"]:
        assert all(len(row) == len(each["columns"]) for row in each["rows"])
    assert [each["kind"] for each in found["plots"]] == ["bars", "lines"]


def test_plain_batches_give_what_the_model_alone_gives():
    llm = wrapped()
    requests = [(case.question, case.chunks) for case in CASES]
    seen = []
    got = plain_batches(llm, requests, 3, seen.append, {"max_new_tokens": 4, "do_sample": False})
    assert [each.token_ids for each in got] == [
        plain(llm.model, prompt_ids(llm, *each), max_new_tokens=4, do_sample=False) for each in requests
    ]
    assert [len(batch.requests) for batch in seen] == [2, 2]
    assert (seen[-1].done, seen[-1].total) == (4, 4)


def test_each_way_comes_first_once_in_three_rounds(monkeypatch):
    row = {"policy": "full", "seconds": 1.0}
    monkeypatch.setattr(batch._Passes, "run", lambda self, policy, way: {**row, "policy": policy, "way": way})
    rows = [row for row in run(policies=("full",), rounds=3).rows if row["kind"] == "pass"]
    for place in range(3):
        assert len({row["way"] for row in rows[place::3]}) == 3


def test_a_gain_is_of_one_round_and_has_an_interval_where_there_are_enough():
    slow = [{"round": n, "seconds": 4.0 * 2**n} for n in range(6)]  # the machine drifts, and all with it
    fast = [{"round": n, "seconds": 2.0**n * (1 + n / 10)} for n in range(6)]
    assert batch_summary._gain(slow[:3], fast[:3]) == pytest.approx([4 / 1.1])
    value, low, high = batch_summary._gain(slow, fast)
    assert low < value < high
    assert batch_summary._gain([], fast) is None


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "batch.jsonl"
    whole = run(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n")
    passes = []
    real = batch._Passes.run
    monkeypatch.setattr(batch._Passes, "run", lambda *args: passes.append(args[1:]) or real(*args))
    again = run(path)
    assert len(passes) == len([row for row in whole.rows if row["kind"] == "pass"]) - 3
    kl = [
        [answer["kl_first"] for row in each.rows if "answers" in row for answer in row["answers"]]
        for each in (whole, again)
    ]
    assert kl[0] == pytest.approx(kl[1], abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_attention_is_timed_both_ways_and_without_windows(name, monkeypatch):
    caches = []
    attend = SharedCache.attend
    monkeypatch.setattr(SharedCache, "attend", lambda *args: caches.append(args[0]) or attend(*args))
    row = time_attention(tiny_model(name), 2, 16, repeats=1)
    assert row["shared_s"] > 0
    assert row["repeated_s"] > 0
    assert {getattr(layer, "sliding_window", None) for layer in caches[0].layers} == {None}
