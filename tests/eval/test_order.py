"""Reordering is measured against the retriever's order, and what it alone does is told apart from what reuse does."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.eval import Case
from chunkcache.eval.order import bench_order, repeated_share, similar

ONE = Case(QUESTION, TEXTS, ("1931",))
OTHER = Case("Who wrote down the weather?", (TEXTS[1], TEXTS[0], TEXTS[2]))
POLICIES = ("prefix", "query")


@pytest.fixture(scope="module")
def bench():
    return bench_order(tiny_model(), chat_tokenizer(), [ONE, OTHER, ONE], POLICIES, (0, 1))


def rows(bench, policy, tolerance):
    found = [row for row in bench.rows if (row.policy, row.tolerance) == (policy, tolerance)]
    return sorted(found, key=lambda row: row.request)


def test_each_request_is_served_by_every_policy_at_every_tolerance(bench):
    assert len(bench.rows) == 3 * 2 * 2
    assert {(row.policy, row.tolerance) for row in bench.rows} == {(p, t) for p in POLICIES for t in (0, 1)}
    assert all(row.ttft_ratio > 0 for row in bench.rows)


def test_prefix_reuses_more_when_chunks_may_move_and_stays_exact(bench):
    kept, moved = rows(bench, "prefix", 0), rows(bench, "prefix", 1)
    assert [row.moved for row in kept] == [0, 0, 0]
    assert [row.moved for row in moved] == pytest.approx([0, 2 / 3, 0])
    assert moved[1].exact_share > kept[1].exact_share + 0.3
    assert moved[1].recomputed_share < kept[1].recomputed_share
    assert kept[2].exact_share > 0.7  # the first request once more
    assert all(abs(row.own_kl) < 1e-4 for row in (*kept, *moved))


def test_an_order_that_is_kept_costs_nothing_and_another_does(bench):
    for row in bench.rows:
        changed = row.moved > 0
        assert (abs(row.order_kl) > 1e-6) == changed
        assert row.order_agreement == 1 or changed
        if row.policy == "prefix":
            assert row.kl == pytest.approx(row.order_kl, abs=1e-4)
    assert [row.kl > 1e-5 for row in rows(bench, "query", 0)] == [True] * 3


def test_answers_are_scored_where_there_are_any(bench):
    for row in bench.rows:
        assert (row.f1 is None) == (row.order_f1 is None) == (row.request == 1)
        if row.moved == 0 and row.policy == "prefix" and row.f1 is not None:
            assert row.f1 == row.order_f1


def test_it_goes_into_json(bench):
    as_dict = bench.as_dict()
    assert len(as_dict["rows"]) == 12
    assert [(each["policy"], each["tolerance"]) for each in as_dict["summary"]] == [
        (p, t) for p in POLICIES for t in (0, 1)
    ]
    assert {"exact_share", "ttft_ratio", "kl", "order_kl"} <= as_dict["summary"][0].keys()


def test_similar_requests_share_chunks_in_other_orders():
    cases = [ONE, Case("Another?", ("a", "b", "c", "d"))]
    requests = similar(cases, visits=20, noise=1.0, swap=0.3, seed=1)
    assert requests == similar(cases, visits=20, noise=1.0, swap=0.3, seed=1)
    assert requests != similar(cases, visits=20, noise=1.0, swap=0.3, seed=2)
    mine = [request.chunks for request in requests if request.question == QUESTION]
    assert len(mine) == 20
    assert len(set(mine)) > 3
    swapped = [chunks for chunks in mine if set(chunks) != set(TEXTS)]
    assert 0 < len(swapped) < 15
    assert all(set(chunks[:-1]) < set(TEXTS) for chunks in swapped)
    assert {each.chunks for each in similar([ONE], noise=0.0)} == {TEXTS}


def test_the_share_of_beginnings_that_repeat_needs_no_model():
    sequences = ["abc", "bac", "abd", "xyz"]
    assert repeated_share(sequences, 0) == 2 / 12
    assert repeated_share(sequences, 1) == 5 / 12
    assert repeated_share([], 1) == 0
