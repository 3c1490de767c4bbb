"""Hints are measured on real stores; they know what was retrieved, and nothing that comes later."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chunkcache.errors import DocumentError
from chunkcache.eval import Results
from chunkcache.eval.hints import BENCH, VARIANTS, Variant, bench_hints, summary
from chunkcache.eval.traces import Retrieval, Trace, block_trace, session_trace, zipf_trace

LRU, LFU = Variant("lru", "lru"), Variant("lfu", "lfu")
HINTS = Variant("lfu, hints", "lfu", remembers=True, hints={"least": 0.0})


def trace(*retrievals, chunks=10):
    return Trace("made", 0, (4,) * chunks, tuple(Retrieval(*each) for each in retrievals))


def replay(*args, **options):
    return bench_hints(Results(BENCH, {}, {}), *args, **options)


def rates(results):
    return {(row["budget"], row["variant"]): (row["held"], row["ready"], row["fetched"]) for row in results.rows}


def test_what_is_counted_is_what_the_nearest_tier_held():
    again = trace(((0, 1),), ((0, 2),), ((3, 4),), ((0, 1),))
    found = rates(replay([again], (0.2, 1.0), [LRU, HINTS], in_time=1))
    assert found[1.0, "lru"] == (3 / 8, 3 / 8, 5 / 8)
    assert found[0.2, "lru"] == (1 / 8, 1 / 8, 7 / 8)
    assert found[1.0, HINTS.name] == (3 / 8, 6 / 8, 5 / 8)  # one of what is missing is fetched in time
    nothing = rates(replay([again], (1.0,), [HINTS], in_time=0))
    assert nothing[1.0, HINTS.name] == (3 / 8, 3 / 8, 5 / 8)


def test_guesses_are_fetched_before_the_next_retrieval():
    guessed = trace(((0,), (1, 2)), ((1,), (2,)), ((2,), ()))
    assert rates(replay([guessed], (1.0,), [LRU, HINTS]))[1.0, HINTS.name] == (2 / 3, 1.0, 1.0)
    wary = replace(HINTS, hints={"least": 0.5})
    assert rates(replay([guessed], (1.0,), [wary]))[1.0, HINTS.name][0] == 0


def test_a_run_repeats_itself():
    traces = [zipf_trace(seed, retrievals=25, documents=20) for seed in (0, 1)]
    one, other = (replay(traces, (0.05, 0.2), VARIANTS[::2]) for _ in range(2))
    assert one.rows == other.rows
    runs = 2 * len(VARIANTS[::2])
    assert len(one.rows) == 2 * runs
    [lru, *_] = summary(one)["variants"]
    assert (lru["variant"], lru["held_gain"], lru["seeds"]) == ("lru", 0, 2)
    assert lru["held"] == pytest.approx((one.rows[0]["held"] + one.rows[runs]["held"]) / 2)
    del other.rows[3:]
    assert bench_hints(other, traces, (0.05, 0.2), VARIANTS[::2]).rows == one.rows  # it goes on


def test_gains_are_over_lru_where_there_is_one():
    traces = [zipf_trace(seed, retrievals=25, documents=20) for seed in (0, 1)]
    results = replay(traces, (0.2,), [LRU, HINTS])
    lru, hints = summary(results)["variants"]
    assert hints["held_gain"] == pytest.approx(hints["held"] - lru["held"])
    assert hints["held_gain_spread"] > 0
    results.rows = [row for row in results.rows if row["variant"] != "lru"]
    [hints] = summary(results)["variants"]
    assert hints["held_gain"] is None
    assert summary(results)["tables"][0]["rows"][0][4] == "n/a"


def test_hints_raise_the_hit_rate_over_lru_on_follow_ups():
    traces = [zipf_trace(0, retrievals=500, documents=40)]
    found = rates(replay(traces, (0.1,), [LRU, Variant("lfu, hints", "lfu", remembers=True, hints={})]))
    assert found[0.1, "lfu, hints"][0] > found[0.1, "lru"][0] + 0.01


def test_a_trace_draws_from_its_seed_and_stays_within_its_documents():
    one = zipf_trace(3, retrievals=50, documents=10, chunks=6)
    assert one == zipf_trace(3, retrievals=50, documents=10, chunks=6)
    assert one != zipf_trace(4, retrievals=50, documents=10, chunks=6)
    assert len(one.tokens) == 60
    for each in one.retrievals:
        assert len(set(each.chunks)) == 5
        assert not set(each.chunks) & set(each.likely)
        assert all(0 <= number < 60 for number in (*each.chunks, *each.likely))


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_sessions_are_read_and_interleaved_and_guesses_come_from_the_past(tmp_path):
    turns = [[{"document_ids": [f"{name}{i}", f"{name}{i + 1}"]} for i in range(6)] for name in "ab"]
    path = lines(tmp_path / "sessions.jsonl", [{"session_id": str(i), "turns": each} for i, each in enumerate(turns)])
    read = session_trace(path, seed=0, sessions=2)
    assert len(read.retrievals) == 12
    assert len(read.tokens) == 14
    assert all(each.likely == () for each in read.retrievals)  # nothing came twice
    again = lines(tmp_path / "again.jsonl", [{"turns": turns[0]}, {"turns": turns[0]}])
    one, other = (
        session_trace(again, 0, sessions=1).retrievals[:6],
        session_trace(again, 0, sessions=1).retrievals[6:],
    )
    assert all(each.likely == () for each in one)
    assert [each.likely[0] for each in other[:5]] == [each.chunks[1] for each in other[1:]]


def test_blocks_are_read_and_guessed_from_what_stood_behind(tmp_path):
    rows = [{"timestamp": i, "hash_ids": ids} for i, ids in enumerate(([7, 8, 9], [7, 8], [7, 5], [1]))]
    read = block_trace(lines(tmp_path / "blocks.jsonl", rows), limit=3)
    assert read.retrievals == (Retrieval((0, 1, 2)), Retrieval((0, 1), (2,)), Retrieval((0, 3)))


@pytest.mark.parametrize("reader", [lambda path: session_trace(path, 0), block_trace])
def test_other_files_are_refused(reader, tmp_path):
    with pytest.raises(DocumentError, match="cannot be read"):
        reader(tmp_path / "nothing")
    (tmp_path / "text").write_text("no json", encoding="utf-8")
    with pytest.raises(DocumentError, match="cannot be read as JSON Lines"):
        reader(tmp_path / "text")
    with pytest.raises(DocumentError, match="holds no"):
        reader(lines(tmp_path / "other", [{"a": 1}]))
