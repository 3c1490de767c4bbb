"""The measurement of offline batches: what is asked, its rows, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
from helpers_llm import TEXTS, chat_tokenizer, tiny_model

from chunkcache.eval import batch
from chunkcache.eval.batch import bench_batch, summary, time_attention, workload
from chunkcache.eval.data import Case

CASES = [Case(f"Question {number}, on the bridge?", TEXTS[number % 2 :], ("1931",)) for number in range(4)]


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch):
    monkeypatch.setattr(batch, "BATCHES", (2,))
    monkeypatch.setattr(batch, "LENGTHS", (16,))


def run(path=None, policies=("full", "reuse", "query:ratio=0.3")):
    cases = workload(CASES, 2, 2)
    return bench_batch(tiny_model(), chat_tokenizer(), cases, policies, {"data": "tiny"}, path, new_tokens=4)


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
        (policy, way) for policy in results.settings["policies"] for way in ("one by one", "grouped")
    }
    found = summary(results)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for policy, ways in found["policies"].items():
        assert ways["grouped"]["new_tokens_per_s"] > 0
        assert sum(ways["grouped"]["loads"].values()) <= sum(ways["one by one"]["loads"].values())
        if policy != "query:ratio=0.3":
            assert ways["grouped"]["equal"] == 1
    assert found["policies"]["full"]["grouped"]["kl_first"][0] < 1e-6
    assert found["policies"]["reuse"]["grouped"]["kl_first"][0] > 1e-6
    for each in found["tables"]:
        assert all(len(row) == len(each["columns"]) for row in each["rows"])
    assert [each["kind"] for each in found["plots"]] == ["bars", "lines"]


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


def test_attention_is_timed_both_ways():
    row = time_attention(tiny_model(), 2, 16, repeats=1)
    assert row["shared_s"] > 0
    assert row["repeated_s"] > 0
