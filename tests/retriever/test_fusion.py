"""Fusion: the paper's sums, and an order that does not depend on chance."""

from __future__ import annotations

from itertools import permutations

import pytest

from chunkcache.retriever.fusion import fuse


def test_scores_are_sums_of_reciprocal_ranks():
    fused = dict(fuse([["a", "b"], ["b", "c"]]))
    assert fused["b"] == pytest.approx(1 / 62 + 1 / 61)
    assert fused["a"] == pytest.approx(1 / 61)
    assert fused["c"] == pytest.approx(1 / 62)
    assert dict(fuse([["a"]], k=9)) == {"a": pytest.approx(0.1)}


def test_what_both_have_beats_what_one_has_first():
    assert [item for item, _ in fuse([["a", "b", "c"], ["d", "c", "b"]])] == ["b", "c", "a", "d"]


def test_equal_sums_are_ordered_by_best_rank_then_by_ranking():
    assert [item for item, _ in fuse([["a", "b"], ["c", "d"]])] == ["a", "c", "b", "d"]
    assert [item for item, _ in fuse([["a", "b"], ["b", "a"]])] == ["a", "b"]
    assert [item for item, _ in fuse([["b", "a"], ["a", "b"]])] == ["b", "a"]


def test_the_order_of_rankings_does_not_change_sums():
    rankings = [["a", "b", "c", "d"], ["d", "a", "b", "c"], ["c", "d", "a", "b"]]
    sums = {tuple(sorted(fuse(order))) for order in permutations(rankings)}
    assert len(sums) == 1


def test_no_rankings_and_empty_ones_give_nothing():
    assert fuse([]) == fuse([[], []]) == []
    assert [item for item, _ in fuse([[], ["a"]])] == ["a"]
