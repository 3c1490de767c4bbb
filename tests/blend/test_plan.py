"""Plans: where stored KV stand in a prompt, what is left to compute, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.blend import span

from chunkcache.blend import Plan
from chunkcache.kv import ChunkKV


def kv(token_ids, position=0):
    return ChunkKV.of(token_ids, position, [torch.zeros(2, 1, len(token_ids), 2)])


def segment(start, token_ids, position=0, first=0, length=None, exact=False):
    return span(start, kv(token_ids, position), first, length or len(token_ids) - first, exact)


def spans(plan):
    return [(span.start, span.stop) for span in plan.reused]


def test_a_span_knows_how_long_it_is_and_how_far_its_keys_move():
    moved = segment(10, range(8), position=3, first=2, length=4)
    assert (len(moved), moved.delta) == (4, 5)
    assert segment(0, range(8), position=3).delta == -3
    assert segment(5, range(8), position=3, first=2).delta == 0


def test_what_is_covered_is_not_fresh_and_what_is_exact_is_not_to_choose_from():
    ids = range(12)
    plan = Plan.of(ids, [segment(0, ids[:3], exact=True), segment(4, ids[4:7]), segment(8, ids[8:10])])
    assert len(plan) == 12
    assert plan.fresh.tolist() == [3, 7, 10, 11]
    assert plan.inexact.tolist() == [4, 5, 6, 8, 9]
    assert plan.owner.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 2, 2, 0, 0]


def test_nothing_reused_leaves_everything_fresh():
    plan = Plan.of([5, 6, 7])
    assert plan.fresh.tolist() == [0, 1, 2]
    assert plan.inexact.tolist() == []
    assert plan.inexact.dtype == plan.fresh.dtype == torch.int64


def test_all_exact_leaves_nothing_to_choose_from():
    plan = Plan.of([5, 6, 7], [segment(0, [5, 6], exact=True)])
    assert (plan.fresh.tolist(), plan.inexact.tolist()) == ([2], [])


def test_the_last_token_is_never_reused():
    ids = [4, 5, 6, 7]
    assert spans(Plan.of(ids, [segment(0, ids)])) == [(0, 3)]
    assert spans(Plan.of(ids, [segment(0, ids[:3])])) == [(0, 3)]
    assert spans(Plan.of(ids, [segment(0, ids[:2]), segment(3, ids[3:])])) == [(0, 2)]
    assert spans(Plan.of(ids[:1], [segment(0, ids[:1])])) == []


def test_part_of_a_chunk_can_be_reused():
    plan = Plan.of([9, 5, 6, 9, 9], [segment(1, [4, 5, 6, 7], first=1, length=2)])
    assert spans(plan) == [(1, 3)]
    assert plan.reused[0].delta == 0


def test_the_same_chunk_can_stand_twice():
    chunk = kv([5, 6])
    plan = Plan.of([5, 6, 5, 6, 7], [span(0, chunk, 0, 2, exact=True), span(2, chunk, 0, 2)])
    assert plan.inexact.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("segments", "position"),
    [
        ([segment(1, [1, 2]), segment(2, [2, 3])], 2),  # overlap
        ([segment(3, [3, 4]), segment(1, [1, 2])], 1),  # out of order
        ([segment(1, [1, 5])], 1),  # other tokens
        ([segment(1, [1, 2], length=3)], 1),  # longer than what is stored
        ([segment(2, [0, 1], first=1, length=1)], 2),  # another part of it
    ],
)
def test_a_segment_that_does_not_fit_is_refused(segments, position):
    with pytest.raises(ValueError, match=f"span at position {position} does not fit"):
        Plan.of(range(8), segments)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=6), st.integers(0, 4))
def test_every_position_is_either_fresh_or_exact_or_to_choose_from(parts, tail):
    segments, exact, end = [], [], 0
    for gap, length, is_exact in parts:
        start, end = end + gap, end + gap + length
        segments.append(segment(start, range(start, end), exact=is_exact))
        exact += range(start, end) if is_exact else []
    plan = Plan.of(range(end + tail + 1), segments)
    together = [*plan.fresh.tolist(), *plan.inexact.tolist(), *exact]
    assert sorted(together) == list(range(len(plan)))
    assert plan.fresh.tolist()[-1] == len(plan) - 1
