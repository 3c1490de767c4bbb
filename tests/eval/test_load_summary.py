"""A load test's summary is a function of its rows: here of rows whose queues are known."""

from __future__ import annotations

import json

import pytest

from chunkcache.eval.load_summary import summary
from chunkcache.eval.results import Results

SETTINGS = {
    "requests": 200, "arrivals": None, "seed": 0, "policies": ["full", "query"],
}  # fmt: skip


def measured(policy, seconds, budget=1.0, hits=0):
    for number in range(SETTINGS["requests"]):
        yield {
            "kind": "measured", "request": number, "policy": policy, "budget": budget, "tiers": "memory",
            "tokens": 100, "chunks": 2, "hits": hits, "misses": 2 - hits, "tier_hits": {"memory": hits},
            "service_s": seconds, "ttft_service_s": seconds, "stored_bytes": {"memory": 1 << 20},
        }  # fmt: skip


def results(*rows):
    found = Results("load", SETTINGS, {})
    for each in rows:
        for row in each:
            found.add(row)
    return found


def test_a_fast_policy_does_not_move_where_full_prefill_has_doubled():
    found = summary(results(measured("full", 2.0), measured("query", 0.2, hits=2)))
    json.dumps(found, allow_nan=False)
    full, query = found["policies"]
    assert full["unloaded_s"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert full["rate_p90_doubled"] < full["capacity"] == 0.5
    assert full["p90_moved"] == pytest.approx(1, abs=0.01)
    assert query["p90_moved"] < 0.2
    assert query["rate_p90_doubled"] == pytest.approx(10 * full["rate_p90_doubled"], rel=0.01)
    assert (query["hit_rate"], query["tier_hit_rate"]) == (1.0, {"memory": 1.0})
    assert found["bound_s"] == 4.0
    assert full["rate_at_bound"] == full["rate_p90_doubled"]


def test_tables_and_plots_are_what_a_report_can_show():
    budgets = [
        rows for budget in (0.5, 1.0) for rows in (measured("full", 2.0, budget), measured("query", 0.2, budget))
    ]
    found = summary(results(*budgets), rates=[0.2, 0.1, 0.6], bound_s=3.0)
    assert found["bound_s"] == 3.0
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    assert all(isinstance(cell, str) for table in found["tables"] for row in table["rows"] for cell in row)
    titles = [plot["title"] for plot in found["plots"]]
    assert len(titles) == len(set(titles)) == 3 + 1 + 2
    [p90] = [plot for plot in found["plots"] if plot["title"].startswith("TTFT p90")]
    assert [x for x, _ in p90["series"][0]["points"]] == [0.1, 0.2]  # full prefill can not keep up with 0.6
    assert [x for x, _ in p90["series"][1]["points"]] == [0.1, 0.2, 0.6]
    assert all(series["simulated"] for series in p90["series"])


def test_what_cannot_be_kept_up_with_has_no_ttft():
    found = summary(results(measured("full", 0.5), measured("query", 2.0)), bound_s=1000.0)
    full, query = found["policies"]
    assert (full["rate_at_bound"], query["rate_at_bound"]) == (full["capacity"], query["capacity"]) == (2.0, 0.5)
    assert full["rate_p90_doubled"] > query["capacity"]
    assert query["p90_moved"] is None
    under_load, rates, _ = found["tables"]
    assert under_load["rows"][1][-1] == "overload"
    assert rates["rows"][1][1:] == ["overload"] * 3
    for plot in found["plots"][:3]:
        assert max(x for x, _ in plot["series"][1]["points"]) < 0.5


def test_a_real_run_is_set_beside_its_simulation():
    real = {
        "kind": "real", "policy": "query", "budget": 1.0, "tiers": "memory", "rate": 4.0, "load": 0.8,
        "arrivals_s": [0.0] * 200, "ttft_service_s": [0.1] * 200, "service_s": [0.1] * 200,
        "ttft_s": [0.1 * (n + 1) for n in range(200)],
    }  # fmt: skip
    found = summary(results(measured("query", 0.2), [real]))
    [check] = found["validation"]
    assert check["p90"]["difference"] == pytest.approx(1)  # measured apart, each took twice as long
    assert check["p90"]["difference_own_services"] == pytest.approx(0, abs=1e-9)
    assert check["load"] == pytest.approx(0.8)
    assert check["within_10_percent"] is False
    assert "no" in found["tables"][-1]["rows"][0]


@pytest.mark.parametrize(("slower", "within"), [(1.05, True), (1.15, False)])
def test_it_is_said_whether_the_simulation_is_within_ten_percent(slower, within):
    real = {
        "kind": "real", "policy": "query", "budget": 1.0, "tiers": "memory", "rate": 0.5, "load": 0.1,
        "arrivals_s": [2.0 * n for n in range(200)], "ttft_service_s": [0.2 * slower] * 200,
        "service_s": [0.2 * slower] * 200, "ttft_s": [0.2 * slower] * 200,
    }  # fmt: skip
    [check] = summary(results(measured("query", 0.2), [real]))["validation"]
    assert check["within_10_percent"] is within
    assert check["p50"]["difference"] == check["p90"]["difference"] == pytest.approx(1 / slower - 1)


def test_what_was_not_measured_to_the_end_is_left_out():
    rows = list(measured("query", 0.2))
    assert [each["policy"] for each in summary(results(measured("full", 2.0), rows[:-1]))["policies"]] == ["full"]
    assert summary(results(rows[:5]))["tables"] == []
