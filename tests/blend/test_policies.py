"""What each policy selects, on a prompt small enough to select by hand.

position  0 1 2 | 3 4 5 6 | 7 | 8 9 | 10 11
          prefix  chunk a   gap  b    question
"""

from __future__ import annotations

import pytest
import torch
from support.blend import span

from chunkcache.blend import POLICIES, Plan
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.full import Full
from chunkcache.blend.link import Link
from chunkcache.blend.policy import Check
from chunkcache.blend.prefix import Prefix
from chunkcache.blend.query import Look, Query
from chunkcache.blend.reuse import Reuse
from chunkcache.errors import PolicyError
from chunkcache.kv import ChunkKV

IDS = range(50, 62)
EVERY = [kind() for kind in POLICIES.values()]


def segment(start, end, exact=False):
    ids = IDS[start:end]
    return span(start, ChunkKV.of(ids, 0, [torch.zeros(2, 1, len(ids), 2)]), 0, len(ids), exact)


PLAN = Plan.of(IDS, [segment(0, 3, exact=True), segment(3, 7), segment(8, 10)])
CHOICE = [3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize("policy", EVERY, ids=str)
@pytest.mark.parametrize(
    "plan",
    [PLAN, Plan.of(IDS), Plan.of(IDS, [segment(0, 12, exact=True)])],
    ids=["chunks", "nothing stored", "all exact"],
)
def test_a_selection_is_sorted_distinct_and_out_of_the_inexact(policy, plan):
    selected = policy.select(plan)
    assert selected.dtype == torch.int64
    assert selected.tolist() == sorted(set(selected.tolist()) & set(plan.inexact.tolist()))


@pytest.mark.parametrize(
    ("policy", "selected"),
    [
        (Full(), CHOICE),
        (Prefix(), CHOICE),
        (Reuse(), []),
        (Link(k=0), []),
        (Link(k=1), [3, 8]),
        (Link(k=3), [3, 4, 5, 8, 9]),
        (Link(k=999), CHOICE),
        (CacheBlend(), CHOICE),
    ],
    ids=str,
)
def test_what_is_recomputed_from_layer_0_on(policy, selected):
    assert policy.select(PLAN).tolist() == selected


def test_only_full_reuses_nothing_and_only_prefix_remembers():
    assert [policy.name for policy in EVERY if not policy.reuses] == ["full"]
    assert [policy.name for policy in EVERY if policy.stores_in_context] == ["prefix", "exact"]


def test_which_policies_look_again():
    assert [policy.name for policy in EVERY if policy.filter_layers(30)] == ["cacheblend", "cachecraft", "kvshift"]
    assert CacheBlend(layer=3).filter_layers(30) == [3]


def filter_rows(policy, plan, rows, fresh, stored, layer=1, layers=30):
    return policy.filter_rows(Check(plan, layer, layers, rows, [], lambda: (fresh, stored)))


def narrowed(ratio, deviations, keys=0.0):
    """Rows that go on at the check layer, of all but the prefix; `deviations` are those of values 3 to 11."""
    rows = torch.arange(3, 12)
    stored = torch.randn(2, 2, len(rows), 4)
    fresh = stored.clone()
    fresh[0] += keys
    fresh[1, 1, :, 2] += torch.tensor(deviations)
    return rows[filter_rows(CacheBlend(ratio=ratio), PLAN, rows, fresh, stored)].tolist()


#             3    4    5    6    7    8    9   10   11
DEVIATIONS = [0.1, 3.0, 0.2, -4.0, 0.0, 2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        (0.0, []),
        (0.01, [6]),
        (1 / 6, [6]),
        (0.2, [4, 6]),
        (0.5, [4, 6, 8]),
        (0.75, [4, 5, 6, 8, 9]),
        (1.0, CHOICE),
    ],
)
def test_cacheblend_keeps_the_share_whose_values_deviate_most_and_all_that_is_not_reused(ratio, kept):
    assert narrowed(ratio, DEVIATIONS) == sorted([*kept, 7, 10, 11])


def test_cacheblend_scores_values_and_not_keys():
    keys = torch.linspace(9, 0, 9)[None, :, None]
    assert narrowed(0.3, DEVIATIONS, keys) == [4, 6, 7, 10, 11]


def test_cacheblend_sums_over_heads_and_dimensions():
    rows = torch.arange(3, 12)
    stored = torch.zeros(2, 2, 9, 4)
    fresh = stored.clone()
    fresh[1, 0, 1, 0] = 3.0  # row 4: 9 in one place
    fresh[1, :, 3, :] = 1.1  # row 6: 1.21 in eight places
    assert rows[filter_rows(CacheBlend(ratio=0.1), PLAN, rows, fresh, stored)].tolist() == [6, 7, 10, 11]


def test_cacheblend_compares_in_float32():
    rows = torch.arange(3, 12)
    stored = torch.zeros(2, 1, 9, 1, dtype=torch.float16)
    fresh = stored.clone()
    fresh[1, 0, :, 0] = torch.tensor([300.0, 400, 500, 600, 0, 700, 800, 0, 0])  # squares beyond float16
    assert rows[filter_rows(CacheBlend(ratio=0.3), PLAN, rows, fresh, stored)].tolist() == [7, 8, 9, 10, 11]


def test_cacheblend_minds_neither_garbage_nor_nothing_where_nothing_is_reused():
    garbage = list(DEVIATIONS)
    garbage[4] = garbage[7] = torch.nan
    assert narrowed(0.5, garbage) == [4, 6, 7, 8, 10, 11]
    plan, rows, fresh = Plan.of(IDS), torch.arange(12), torch.randn(2, 1, 12, 4)
    assert filter_rows(CacheBlend(), plan, rows, fresh, fresh).tolist() == list(range(12))


#            0    1    2    3    4    5    6    7    8    9   10   11
ATTENTION = [9.0, 9.0, 9.0, 0.1, 0.9, 0.2, 0.3, 9.0, 0.8, 0.1, 9.0, 9.0]


@pytest.mark.parametrize(
    ("policy", "selected"),
    [
        (Query(ratio=0.0, k=0), []),
        (Query(ratio=0.01, k=0), [4]),
        (Query(ratio=0.5, k=0), [4, 6, 8]),
        (Query(ratio=1.0, k=0), CHOICE),
        (Query(ratio=0.2, k=1), [3, 4, 8]),
        (Query(ratio=0.0, k=2), [3, 4, 8, 9]),
    ],
    ids=str,
)
def test_query_selects_the_share_that_the_question_looks_at_most_and_the_first_of_each_chunk(policy, selected):
    first = torch.rand(12)
    seen = torch.stack((first, 2 * torch.tensor(ATTENTION) - first))  # two layers, which only their mean tells apart
    assert policy.select_by_attention(PLAN, seen).tolist() == selected


def test_query_looks_at_the_second_sixth_of_the_layers_and_in_the_middle_where_it_costs_nothing_or_is_worth_it():
    layers = 1, 3, 4, 30
    middle = [[0], [1], [2], [15, 16, 17, 18, 19]]
    assert [list(Query().attention_layers(count)) for count in layers] == [[0], [0], [0, 1], [5, 6, 7, 8, 9]]
    assert [list(Query(ratio=0.05).attention_layers(count)) for count in layers] == middle
    assert [list(Query(guard=0.05).attention_layers(count)) for count in layers] == middle
    assert [list(Query(later=0.15).layers_watched_for_later(count)) for count in layers] == middle
    assert Query(ratio=0.05).fitted(Look(0.2, 0.3, 0.1, 7)) == Query(ratio=0.05, most=0.1, least=7, words=24)


def test_query_looks_where_it_is_told_to():
    assert [list(Query(layers=(0.0, 0.2)).attention_layers(layers)) for layers in (1, 4, 30)] == [
        [0],
        [0],
        [*range(6)],
    ]
    assert list(Query(layers=(2 / 3, 1.0)).attention_layers(30)) == [*range(20, 30)]
    assert list(Query(layers=(0.99, 1.0)).attention_layers(3)) == [2]


def test_query_need_not_look_where_it_selects_nothing():
    short, long = (Plan.of(range(n), [span(0, wide(n), 0, n - 2)]) for n in (8193, 8194))
    assert not Query(ratio=0.0).wants_attention(long)
    assert Query(ratio=0.01).wants_attention(short)
    assert [Query(ratio="auto").wants_attention(plan) for plan in (short, long)] == [False, True]
    assert Query(ratio="auto", least=8191).wants_attention(short)
    assert not Query(ratio="auto", most=0.0).wants_attention(long)
    for question, wanted in ((127, False), (128, True)):
        plan = Plan.of(range(300 + question), [span(0, wide(300), 0, 300)])
        assert Query(ratio="auto").wants_attention(plan) is wanted


def test_the_ladder_of_a_guarded_query_rises_from_its_ratio():
    assert [step.ratio for step in Query(ratio=0.03).escalation()] == [0.03, 0.15, 0.4]
    assert [step.ratio for step in Query(ratio=0.2, k=3).escalation()] == [0.2, 0.4]
    assert {step.k for step in Query(ratio=0.2, k=3).escalation()} == {3}


@pytest.mark.parametrize("score", ["k", "v", "kv"])
def test_cacheblend_scores_what_it_is_told_to(score):
    rows = torch.arange(3, 12)
    stored = torch.zeros(2, 1, 9, 1)
    fresh = stored.clone()
    fresh[0, 0, 1], fresh[1, 0, 3], fresh[:, 0, 5] = 3.0, 2.5, 2.4  # row 4 by keys, 6 by values, 8 by both
    kept = rows[filter_rows(CacheBlend(ratio=0.1, score=score), PLAN, rows, fresh, stored)].tolist()
    assert kept == sorted([7, 10, 11, {"k": 4, "v": 6, "kv": 8}[score]])


def test_cacheblend_filters_gradually_over_all_layers():
    policy = CacheBlend(gradual=(0.5, 1 / 3, 1 / 6))
    assert policy.ratio == pytest.approx(1 / 3)
    assert policy.filter_layers(31) == [1, 11, 21]
    rows, stored = torch.arange(3, 12), torch.zeros(2, 1, 9, 1)
    for layer, kept in ((1, [4, 6, 8]), (11, [4, 6]), (21, [6])):
        fresh = stored[:, :, : len(rows)].clone()
        fresh[1, 0, :, 0] = torch.tensor([DEVIATIONS[row - 3] for row in rows])
        rows = rows[filter_rows(policy, PLAN, rows, fresh, stored[:, :, : len(rows)], layer, 31)]
        assert rows.tolist() == sorted([*kept, 7, 10, 11])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "q"}, "score='q' is none of k, v, kv"),
        ({"gradual": (0.1, 0.2)}, "rises"),
        ({"gradual": (0.3, 0.1), "ratio": 0.4}, "averages to 0.2, not to ratio=0.4"),
        ({"gradual": (0.3, 0.1), "ratio": "auto"}, "averages to 0.2"),
        ({"gradual": (1.3, 0.1)}, "gradual=1.3"),
    ],
)
def test_cacheblend_refuses_options_that_make_no_sense(options, message):
    with pytest.raises(PolicyError, match=message):
        CacheBlend(**options)


def test_cacheblend_does_not_run_with_a_ratio_that_nobody_chose():
    with pytest.raises(PolicyError, match="ratio=auto"):
        narrowed("auto", DEVIATIONS)


@pytest.mark.parametrize("options", [{"ratio": -0.1}, {"ratio": 1.5}, {"k": -1}, {"most": 2.0}, {"least": -1}])
def test_query_refuses_options_out_of_range(options):
    [(name, value)] = options.items()
    with pytest.raises(PolicyError, match=rf"{name}={value} is"):
        Query(**options)


@pytest.mark.parametrize("layers", [(0.5,), (0.5, 0.5), (0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_query_refuses_layers_that_are_none(layers):
    with pytest.raises(PolicyError, match="layers"):
        Query(layers=layers)


@pytest.mark.parametrize(
    ("attention", "count"), [([1.0] * 100, 3), ([25.0, 20.0, 9.0, *[0.4] * 97], 3), ([99.0, 0.5, *[0.01] * 98], 2)]
)
def test_query_auto_takes_the_fewest_tokens_that_hold_most_attention(attention, count):
    plan = Plan.of(range(103), [span(0, wide(), 0, 1, exact=True), span(1, wide(), 1, 100)])
    seen = torch.tensor([[9.0, *attention, 9.0, 9.0]])
    selected = Query(ratio="auto").select_by_attention(plan, seen)
    assert len(selected) == count
    if attention[0] > attention[-1]:
        assert selected.tolist() == list(range(1, count + 1))


def wide(n=103):
    return ChunkKV.of(range(n), 0, [torch.zeros(2, 1, n, 2)])


def test_an_explicit_ratio_must_agree_with_the_schedule_also_where_it_is_the_default():
    assert CacheBlend(gradual=(0.4, 0.2)).ratio == pytest.approx(0.3)
    assert CacheBlend(ratio=0.3, gradual=(0.4, 0.2)).ratio == 0.3
    with pytest.raises(PolicyError, match=r"averages to 0\.3, not to ratio=0\.15"):
        CacheBlend(ratio=0.15, gradual=(0.4, 0.2))
    with pytest.raises(PolicyError, match="not to ratio=0"):
        CacheBlend(ratio=0.0, gradual=(0.4, 0.2))
