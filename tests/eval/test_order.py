"""Reordering is measured against the retriever's order, and what it alone does is told apart from what reuse does."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.eval import Case, Results
from chunkcache.eval.order import BENCH, bench_order, similar, summary

ONE = Case(QUESTION, TEXTS, ("1931",))
OTHER = Case("Who wrote down the weather?", (TEXTS[1], TEXTS[0], TEXTS[2]))
POLICIES = ("prefix", "query")


@pytest.fixture(scope="module")
def bench():
    return serve(Results(BENCH, {}, {}))


def serve(results, policies=POLICIES):
    return bench_order(results, tiny_model(), chat_tokenizer(), [ONE, OTHER, ONE], policies, (0, 1))


def rows(bench, policy, tolerance):
    found = [row for row in bench.rows if (row["policy"], row["tolerance"]) == (policy, tolerance)]
    return sorted(found, key=lambda row: row["request"])


def test_each_request_is_served_by_every_policy_at_every_tolerance(bench):
    assert len(bench.rows) == 3 * 2 * 2
    assert {(row["policy"], row["tolerance"]) for row in bench.rows} == {(p, t) for p in POLICIES for t in (0, 1)}
    assert all(row["ttft_ratio"] > 0 for row in bench.rows)


def test_prefix_reuses_more_when_chunks_may_move_and_stays_exact(bench):
    kept, moved = rows(bench, "prefix", 0), rows(bench, "prefix", 1)
    assert [row["moved"] for row in kept] == [0, 0, 0]
    assert [row["moved"] for row in moved] == pytest.approx([0, 2 / 3, 0])
    assert moved[1]["exact_share"] > kept[1]["exact_share"] + 0.3
    assert moved[1]["recomputed_share"] < kept[1]["recomputed_share"]
    assert kept[2]["exact_share"] > 0.7  # the first request once more
    assert all(abs(row["own_kl"]) < 1e-4 for row in (*kept, *moved))


def test_an_order_that_is_kept_costs_nothing_and_another_does(bench):
    for row in bench.rows:
        changed = row["moved"] > 0
        assert (abs(row["order_kl"]) > 1e-6) == changed
        assert row["order_agreement"] == 1 or changed
        if row["policy"] == "prefix":
            assert row["kl"] == pytest.approx(row["order_kl"], abs=1e-4)
    assert [row["kl"] > 1e-5 for row in rows(bench, "query", 0)] == [True] * 3


def test_answers_are_scored_where_there_are_any(bench):
    for row in bench.rows:
        assert (row["f1"] is None) == (row["order_f1"] is None) == (row["request"] == 1)
        if row["moved"] == 0 and row["policy"] == "prefix" and row["f1"] is not None:
            assert row["f1"] == row["order_f1"]


def test_the_table_has_a_row_for_each_policy_and_tolerance(bench):
    sums = summary(bench)
    groups = [(policy, tolerance) for policy in POLICIES for tolerance in (0, 1)]
    assert [(each["policy"], each["tolerance"], each["requests"]) for each in sums["orders"]] == [
        (policy, tolerance, 3) for policy, tolerance in groups
    ]
    [table] = sums["tables"]
    assert [row[:2] for row in table["rows"]] == [[policy, str(tolerance)] for policy, tolerance in groups]


def test_a_run_that_goes_on_serves_again_what_came_before():
    """Under `prefix` and `cachecraft`, what a request reuses depends on all that came before it."""
    policies = ("prefix", "cachecraft:alpha=0.3")
    whole = serve(Results(BENCH, {}, {}), policies)
    cut = serve(Results(BENCH, {}, {}, rows=whole.rows[:9]), policies)
    timeless = [
        [{name: value for name, value in row.items() if not name.startswith("ttft")} for row in results.rows]
        for results in (whole, cut)
    ]
    assert timeless[1][:9] == timeless[0][:9]
    assert timeless[1][9:] == timeless[0][8:]  # the request that was cut off is measured again, and counts once
    assert [each["requests"] for each in summary(cut)["orders"]] == [3] * 4


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
