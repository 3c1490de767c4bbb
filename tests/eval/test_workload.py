"""Requests are drawn as asked, and recorded ones read as they are."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from chunkcache.errors import DocumentError, InputError
from chunkcache.eval.data import Case
from chunkcache.eval.workload import (
    at_rate,
    interleaved,
    poisson,
    session_workload,
    trace_arrivals,
    zipf_draws,
    zipf_workload,
)

CASES = [Case(f"Question {i}?", tuple(f"chunk {i}-{j}" for j in range(4))) for i in range(5)]


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_poisson_arrivals_have_exponential_gaps_of_the_rate():
    arrivals = at_rate(poisson(20_000, 0), 4.0)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)
    assert poisson(5, 0) == poisson(5, 0) != poisson(5, 1)
    with pytest.raises(InputError, match="not above 0"):
        at_rate(arrivals, 0)


def test_a_trace_comes_at_the_rate_that_is_asked_for(tmp_path):
    times = (1000, 1000, 4000, 5000)
    path = lines(tmp_path / "trace.jsonl", [{"timestamp": t, "hash_ids": []} for t in times])
    assert trace_arrivals(path, 4) == [0, 0, 2.25, 3]
    assert at_rate(trace_arrivals(path, 4), 0.5) == [0, 0, 4.5, 6]
    with pytest.raises(DocumentError, match="holds 4 requests, not 5"):
        trace_arrivals(path, 5)
    with pytest.raises(DocumentError, match="all at once"):
        trace_arrivals(path, 2)
    with pytest.raises(DocumentError, match="holds no trace"):
        trace_arrivals(lines(tmp_path / "other.jsonl", [{"time": 1}]), 1)
    with pytest.raises(DocumentError, match="no trace in time order"):
        trace_arrivals(lines(tmp_path / "back.jsonl", [{"timestamp": 5}, {"timestamp": 2}]), 2)


def test_documents_come_as_often_as_the_zipf_law_says():
    drawn = zipf_draws(4, 1, 1.0, random.Random(0))
    counts = Counter(next(drawn)[0] for _ in range(30_000))
    whole = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for number in range(4):
        assert counts[number] / 30_000 == pytest.approx(1 / (number + 1) / whole, abs=0.01)


def test_later_ones_of_a_request_are_drawn_from_what_is_left():
    drawn = zipf_draws(3, 2, 1.0, random.Random(0))
    counts = Counter(next(drawn) for _ in range(30_000))
    weights = (1, 1 / 2, 1 / 3)
    for (one, two), count in counts.items():
        expected = weights[one] / sum(weights) * weights[two] / (sum(weights) - weights[one])
        assert count / 30_000 == pytest.approx(expected, abs=0.01)
    assert len(counts) == 6
    assert set(next(zipf_draws(50, 50, 5.0, random.Random(0)))) == set(range(50))  # and it comes to an end
    for skew in (-1, 5.1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="skew of"):
            zipf_draws(3, 2, skew, random.Random(0))


def test_requests_ask_for_different_chunks_with_a_question_of_their_case():
    workload = zipf_workload(CASES, 50, chunks=3, documents=10, skew=0.9, seed=0)
    assert len(workload.chunks) == 10
    assert workload == zipf_workload(CASES, 50, chunks=3, documents=10, skew=0.9, seed=0)
    for request in workload.requests:
        assert len(set(request.chunks)) == 3
        first = workload.texts(request)[0]
        assert any(first in case.chunks and case.question == request.question for case in CASES)
    with pytest.raises(DocumentError, match="too few"):
        zipf_workload(CASES, 1, chunks=3, documents=2, skew=1, seed=0)


def turn(*documents, question="Why [so]?"):
    prompt = "".join(f"[Document {i}: {text}]\n\n" for i, text in enumerate(documents, 1))
    return {"document_ids": list(documents), "prompt": f"Answer.\n\n{prompt}Question: {question}"}


def test_sessions_keep_the_order_of_their_turns_and_share_documents(tmp_path):
    sessions = [
        {"session_id": "a", "turns": [turn("one\n\ntwo [x]", "three"), turn("three", "four", question="And now?")]},
        {"session_id": "b", "turns": [turn("four")]},
    ]
    path = lines(tmp_path / "sessions.jsonl", sessions)
    workload = session_workload(path, 3, chunks=5, seed=0)
    assert set(workload.chunks) == {"one\n\ntwo [x]", "three", "four"}
    asked = [(request.question, workload.texts(request)) for request in workload.requests]
    assert asked.index(("Why [so]?", ["one\n\ntwo [x]", "three"])) < asked.index(("And now?", ["three", "four"]))
    assert [len(r.chunks) for r in session_workload(path, 3, chunks=1, seed=0).requests] == [1, 1, 1]
    with pytest.raises(DocumentError, match="holds 3 turns, not 4"):
        session_workload(path, 4, chunks=5, seed=0)


def test_sessions_without_texts_are_refused(tmp_path):
    bare = lines(tmp_path / "bare.jsonl", [{"turns": [{"document_ids": ["a"]}]}])
    with pytest.raises(DocumentError, match="texts are needed"):
        session_workload(bare, 1, chunks=5, seed=0)
    with pytest.raises(DocumentError, match="holds no sessions"):
        session_workload(lines(tmp_path / "other.jsonl", [{"a": 1}]), 1, chunks=5, seed=0)


def test_so_many_sessions_are_under_way_at_once():
    sessions = [[(i, j) for j in range(5)] for i in range(6)]
    seen = list(interleaved(sessions, random.Random(0), at_once=2))
    assert sorted(turn for _, turn in seen) == sorted(turn for each in sessions for turn in each)
    under_way: set[int] = set()
    for number, (_, j) in seen:
        under_way.add(number)
        assert len(under_way) <= 2
        if j == 4:
            under_way.remove(number)
