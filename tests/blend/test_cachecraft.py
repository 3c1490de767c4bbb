"""Cache-Craft's formulas on numbers small enough to work by hand, and what the policy makes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.blend import span

from chunkcache.blend import Plan
from chunkcache.blend.cachecraft import (
    CacheCraft,
    context_impact,
    fix_overhead,
    focused,
    order_penalty,
    prefix_overlap,
)
from chunkcache.blend.policy import Check
from chunkcache.errors import PolicyError
from chunkcache.kv import ChunkKV, ContextAttention, chunk_name


def context(chunks="abc", inter=(6.0, 3.0, 1.0), a=0.02, b=0.04, outside=()):
    return ContextAttention(tuple(chunks), tuple(inter), intra=1.0, a=a, b=b, outside=torch.tensor(outside))


def test_context_impact():
    assert context_impact(0.0, 1.0) == 0.5
    assert context_impact(0.02, 0.04) == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert context_impact(1.0, 1e-3) == pytest.approx(1.0)
    assert context_impact(0.1, 0.0) == 1.0  # a chunk of one token looks at nothing within itself


@pytest.mark.parametrize(
    ("before", "beta"),
    [("abc", 1.0), ("cab", 1.0), ("a", 0.6), ("bc", 0.4), ("xaxb", 0.9), ("", 0.0), ("xyz", 0.0)],
)
def test_prefix_overlap_is_the_share_of_attention_whose_target_is_there_again(before, beta):
    assert prefix_overlap(context(), before) == pytest.approx(beta)


def test_a_chunk_computed_alone_overlaps_with_nothing():
    assert prefix_overlap(context("", ()), "abc") == prefix_overlap(context("", ()), "") == 0


@pytest.mark.parametrize(
    ("old", "new", "gamma"),
    [("abc", "abc", 0), ("abc", "cba", 1), ("abc", "acb", 1 / 3), ("abc", "xcya", 1), ("abc", "b", 0), ("ab", "", 0)],
)
def test_order_penalty_is_the_share_of_discordant_pairs(old, new, gamma):
    assert order_penalty(old, new) == pytest.approx(gamma)


def test_fix_overhead_by_hand():
    impact = 1 / (1 + math.exp(-0.5))
    assert fix_overhead(context(), "abc", alpha=1.0) == 0
    assert fix_overhead(context(), "a", alpha=1.0) == pytest.approx(impact * 0.4)
    assert fix_overhead(context(), "acb", alpha=1.0) == pytest.approx(impact * (1 - 2 / 3))
    assert fix_overhead(context(), "cba", alpha=0.5) == pytest.approx(0.5 * impact)
    assert fix_overhead(context(), "", alpha=9.0) == 1
    assert fix_overhead(context("", (), a=0.0), "abc", alpha=0.3) == pytest.approx(0.15)


def test_focused_is_the_smallest_set_that_holds_the_mass():
    attention = torch.tensor([1.0, 5.0, 1.0, 3.0])
    assert focused(attention, 0.5).tolist() == [False, True, False, False]
    assert focused(attention, 0.51).tolist() == [False, True, False, True]
    assert focused(attention, 1.0).all()


#  position  0 1 | 2 3 4 5 | 6 7 8 9 | 10 11
#            pre   chunk a   chunk b   question
IDS = tuple(range(50, 62))


def plan(b=None, exact=False):
    def segment(start, end, one=None, exact=False):
        layers = [torch.zeros(2, 1, end - start, 2)]
        return span(start, ChunkKV.of(IDS[start:end], 0, layers, one), 0, end - start, exact)

    return Plan.of(IDS, [segment(2, 6, exact=True), segment(6, 10, b, exact)], segment(0, 2, exact=True))


OUTSIDE = [0.1, 0.4, 0.2, 0.3]


def test_the_tokens_that_looked_most_outside_are_recomputed():
    seen = context("x", (1.0,), a=0.0, outside=OUTSIDE)
    assert CacheCraft(alpha=1.0).select(plan(seen)).tolist() == [7, 9]  # half of four
    assert CacheCraft(alpha=1.1).select(plan(seen)).tolist() == [7, 8, 9]  # 0.55 of them, rounded up
    assert CacheCraft(alpha=0.0).select(plan(seen)).tolist() == []


def test_nothing_is_recomputed_where_the_context_is_the_same_again():
    again = context([chunk_name(IDS[2:6])], (1.0,), outside=OUTSIDE)
    assert CacheCraft(alpha=2.0).select(plan(again)).tolist() == []


def test_of_a_chunk_that_was_not_recorded_the_first_tokens_are_recomputed():
    assert CacheCraft(alpha=1.0).select(plan()).tolist() == [6, 7]


def test_exact_chunks_are_left():
    assert CacheCraft(alpha=9.0).select(plan(exact=True)).tolist() == []


def narrowed(attention, layer=8, **options):
    rows = torch.tensor([2, 3, 7, 9, 10, 11])  # chunk a is exact, but computed for the sake of the test
    prefix, first, second = plan().reused
    one = Plan.of(IDS, [replace(first, kv=None, exact=False), second], prefix)
    kept = CacheCraft(**options).filter_rows(Check(one, layer, 32, rows, attention, fail))
    return None if kept is None else rows[kept].tolist()


def fail():
    raise AssertionError("the focus needs no keys and values")


def looks(*shares):
    """Attention per layer: chunk a gets `share`, chunk b the rest."""
    return [torch.tensor([0, 0, *[share / 4] * 4, *[(1 - share) / 4] * 4, 0, 0]) for share in shares]


def test_chunks_out_of_focus_are_left_once_the_focus_stands_still():
    assert narrowed(looks(*[0.95] * 8), focus=0.9) == [2, 3, 10, 11]
    assert narrowed(looks(*[0.6] * 8), focus=0.9) == [2, 3, 7, 9, 10, 11]
    assert narrowed(looks(*[0.95] * 4, *[0.1] * 4), focus=0.9) is None  # the set has just changed
    assert narrowed(looks(*[0.95] * 4, *[0.1] * 4), focus=0.9, stable=1) == [2, 3, 7, 9, 10, 11]


def test_what_is_not_reused_goes_on_though_it_is_out_of_focus():
    assert narrowed(looks(*[0.01] * 8), focus=0.9) == [2, 3, 7, 9, 10, 11]


def test_it_looks_eight_times_and_watches_all_layers_below():
    assert list(CacheCraft(stable=2).filter_layers(32)) == [8, 12, 16, 20, 24, 28]
    assert list(CacheCraft(stable=2).watched_layers(32)) == list(range(28))
    assert list(CacheCraft(stable=1).filter_layers(4)) == [1, 2, 3]
    assert not CacheCraft(focus=1).filter_layers(32)
    assert not CacheCraft(focus=1).watched_layers(32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"focus": 1.5}, "focus=1.5"),
        ({"stable": 0}, "stable=0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(PolicyError, match=message):
        CacheCraft(**options)


def test_auto_must_be_settled_before_the_prefill():
    with pytest.raises(PolicyError, match="alpha=auto"):
        CacheCraft(alpha="auto").select(plan())
