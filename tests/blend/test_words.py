"""Tokens next to the question's own words, marks in a sliding window, and the first of each chunk."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch

from chunkcache.blend import Plan
from chunkcache.blend.policy import Check
from chunkcache.blend.query import Query
from chunkcache.blend.words import FADING, POWER, REACH, marks, near_words
from chunkcache.errors import PolicyError
from chunkcache.kv import ChunkKV, Span

PREFIX, EXACT = (900, 901), (7, 7, 902)


def plan_of(chunks, question):
    """Return a plan of a prefix and a chunk that are exact, chunks that are not, and a question."""
    spans, end = [], len(PREFIX)
    for ids in (EXACT, *chunks):
        kv = ChunkKV.of(ids, 0, [torch.zeros(2, 1, len(ids), 2)])
        spans.append(Span(end, end + len(ids), ids, kv=kv, exact=ids == EXACT))
        end += len(ids)
    ids = (*PREFIX, *(token for span in spans for token in span.chunk_ids), *question)
    return Plan.of(ids, spans)


def scores_of(plan, question):
    """Return the score of each inexact token, by its definition."""
    ids, inexact = plan.token_ids, plan.inexact.tolist()
    of_chunks = [ids[at] for at in inexact]
    weight = {word: math.log(len(inexact) / of_chunks.count(word)) ** POWER for word in question if word in of_chunks}
    return {
        at: sum(
            weight.get(ids[other], 0.0) * FADING ** abs(other - at) for other in inexact if abs(other - at) <= REACH
        )
        for at in inexact
    }


def test_it_takes_what_scores_highest():
    generator = torch.Generator().manual_seed(1)
    chunks = [tuple(torch.randint(0, 60, (length,), generator=generator).tolist()) for length in (70, 40, 90)]
    question = (3, 17, 58, 59, 1000)
    plan = plan_of(chunks, question)
    scores = scores_of(plan, question)
    for count in (1, 8, 40):
        chosen = near_words(plan, count).tolist()
        left = set(scores).difference(chosen)
        assert len(chosen) == count
        assert min(scores[at] for at in chosen) >= max(scores[at] for at in left) - 1e-3


def test_a_rare_word_decides_and_what_no_word_is_near_is_left():
    common, rare = (5, *[1] * 99) * 2, (*[1] * 50, 6, *[1] * 49)
    plan = plan_of([common, rare], (5, 6, 8))
    at = plan.chunks[2].start + 50
    assert near_words(plan, 3).sort().values.tolist() == [at - 1, at, at + 1]
    near = near_words(plan, 1000)
    reached = {place + step for place in (5, 105, at) for step in range(-REACH, REACH + 1)}
    assert set(near.tolist()) == reached & set(plan.inexact.tolist())
    assert near_words(plan_of([common], (8, 9)), 10).tolist() == []
    assert near_words(plan_of([], (7, 7)), 10).tolist() == []  # its words are in the exact chunk alone


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 24), ({"words": 8}, 8), ({"words": 0}, 0), ({"most": 0.005}, 6), ({"most": 0.0}, 0), ({"ratio": 0.1}, 0)],
)
def test_query_takes_them_where_it_does_not_look(options, count):
    ids = tuple(range(1200))
    plan = plan_of([ids], (3, 500, 700))
    policy = Query(**options)
    assert policy.ratio != "auto" or not policy.wants_attention(plan)
    assert len(policy.select(plan)) == count


@pytest.mark.parametrize(
    ("tokens", "options", "count"),
    [(2048, {}, 24), (2049, {}, 25), (6400, {}, 75), (6400, {"words": 4}, 13), (6400, {"words": 0}, 0)],
)
def test_of_more_tokens_it_takes_more(tokens, options, count):
    plan = plan_of([tuple(range(tokens))], tuple(range(100, 1100, 100)))
    assert not Query(**options).wants_attention(plan)
    assert len(Query(**options).select(plan)) == count


@pytest.mark.parametrize("window", [0, 60, 100_000])
@pytest.mark.parametrize(("words", "chunks", "first"), [(40, 4, 2), (20, 4, 1), (19, 4, 0), (40, 8, 1), (39, 8, 0)])
def test_up_to_a_fifth_are_the_first_of_each_chunk_and_two_fifths_marks_in_a_window(words, chunks, first, window):
    question = (137, 181)
    plan = plan_of([(*range(100 * n, 100 * n + 90), 5, 5) for n in range(1, chunks + 1)], question)
    selected = set(Query(words=words, window=window, most=1.0).select(plan).tolist())
    heads = set(plan.first_of_each(first).tolist())
    count = math.ceil(words * 2 / 5) if window == 60 else 0  # of a window that the prompt does not fit in
    chosen = heads | set(marks(plan, window, count).tolist())
    scores = scores_of(plan, question)
    left = scores.keys() - selected
    assert len(selected) == words
    assert heads == selected & set(plan.first_of_each(3).tolist())
    assert chosen <= selected
    assert min(scores[at] for at in selected - chosen) >= max(scores[at] for at in left) - 1e-3


def test_marks_are_the_last_token_and_the_commonest_ones_in_the_window():
    stop, end, space = 1, 2, 3
    chunks = [(*range(100, 140), *[stop] * 9, end), (200, stop, 201, stop, space, 202, stop, space, 203, end)]
    plan = plan_of(chunks, (9, 10))
    first, second = (span.start for span in plan.chunks[1:])
    assert marks(plan, 60, 0).tolist() == []
    assert marks(plan, 60, 1).tolist() == [second + 9]
    assert marks(plan, 60, 4).tolist() == [second + 9, second + 6, second + 3, second + 1]
    assert marks(plan, 60, 13).tolist() == [*(second + at for at in (9, 6, 3, 1)), *range(first + 48, first + 39, -1)]
    assert marks(plan, 60, 15)[13:].tolist() == [second + 7, second + 4]
    assert marks(plan, 11, 7).tolist() == [*(second + at for at in (9, 6, 3, 1, 7, 4)), first + 49]
    assert marks(plan, 4, 100).sort().values.tolist() == [*range(second + 6, second + 10)]


def test_what_is_asked_for_is_taken_in_any_case_and_once():
    plan = plan_of([tuple(range(100, 200)), tuple(range(200, 300))], (100, 250))
    first = plan.first_of_each(3)
    assert Query(k=3, words=5).select(plan).tolist() == first.tolist()
    selected = Query(k=3, words=8, most=1.0).select(plan).tolist()
    assert selected == sorted({*first.tolist(), *near_words(plan, 8, first).tolist()})
    assert len(selected) == 8
    assert len(near_words(plan, 6, torch.cat((first, first)))) == 6


@pytest.mark.parametrize(
    ("options", "before", "within"),
    [
        ({}, 10, 18),
        ({"depth": (0.5, 0.5)}, None, 15),
        ({"depth": (0.2, 1.0)}, 6, None),
        ({"depth": (1.0, 1.0)}, None, None),
    ],
)
def test_of_a_prompt_that_does_not_fit_in_the_window_rows_end_on_the_way_up(options, before, within):
    plan = plan_of([tuple(range(100, 200)), tuple(range(200, 300))], (100, 250))
    policy = Query(window=60, most=1.0, **options)
    fresh, selected = set(plan.fresh.tolist()), set(policy.select(plan).tolist())
    near = {at for at in selected if at >= len(plan) - 60}
    assert near
    assert near < selected
    rows = torch.tensor(sorted(fresh | selected))
    left = {end: kept for end, kept in ((before, fresh | near), (within, fresh)) if end is not None}
    assert policy.filter_layers(30) == list(left)
    for end, expected in left.items():
        kv = Mock()
        kept = policy.filter_rows(Check(plan, end, 30, rows, [], kv))
        assert set(rows[kept].tolist()) == expected
        assert kv.called == (end == within)


def test_without_a_window_or_behind_a_look_rows_end_nowhere():
    plan = plan_of([tuple(range(100, 200)), tuple(range(200, 300))], (100, 250))
    for options in ({}, {"window": 0}, {"window": 60, "ratio": 0.1}, {"window": 60, "guard": 0.1}):
        assert not Query(**options).filter_layers(30)
    for options in ({"window": len(plan)}, {"window": 60, "least": 100}):
        assert Query(**options).filter_rows(Check(plan, 10, 30, plan.fresh, [], fail)) is None


def fail():
    raise AssertionError("no keys and values are wanted")


@pytest.mark.parametrize("depth", [(0.5,), (0.0, 0.5), (0.6, 0.5), (0.5, 1.1), (0.2, 0.3, 0.4)])
def test_depths_that_are_none_are_refused(depth):
    with pytest.raises(PolicyError, match="are not two rising shares of the depth"):
        Query(depth=depth)


@pytest.mark.parametrize(("most", "first"), [(0.001, 0), (0.01, 1), (0.03, 2), (0.3, 2)])
def test_where_it_looks_it_takes_what_the_question_looks_at_and_the_first_of_each_chunk(most, first):
    plan = plan_of([tuple(range(1000))], (500,))
    at = plan.chunks[1].start + 100
    seen = torch.zeros(1, len(plan), dtype=torch.float64)
    # The first of them holds most of it: the least share is taken.
    seen[0, at : at + 300] = 0.1 ** torch.arange(300, dtype=torch.float64)
    highest = range(at, at + math.ceil(Query(most=most).look.least_share * 1000))
    selected = Query(most=most).select_by_attention(plan, seen).tolist()
    assert selected == [*plan.first_of_each(first).tolist(), *highest]


def test_a_number_of_words_below_none_is_refused():
    with pytest.raises(PolicyError, match="words=-1 is negative"):
        Query(words=-1)
