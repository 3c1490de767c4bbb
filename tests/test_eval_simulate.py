"""A simulation says that it is one, goes on where it stopped, and is fitted to what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chunkcache.errors import InputError, ResultsError
from chunkcache.eval.cluster import Cluster, Sizes
from chunkcache.eval.costs import MACHINES, SHAPES, Costs, Machine
from chunkcache.eval.results import Results
from chunkcache.eval.simulate import (
    Population,
    check_cluster,
    default_rates,
    fit_folder,
    settings,
    simulate,
    summary,
)

COSTS = Costs(SHAPES["llama-3.1-8b"], MACHINES["h100"])
CLUSTER = Cluster(COSTS, Sizes(64, 512, 32), 4, 64e9, 1e12, 12.5e9, 1e-3)
PEOPLE = Population(documents=500, k=5, skew=0.9, requests=200, seed=0)
POLICIES = ("full", "prefix", "query")


def asked(policies=POLICIES):
    return settings(CLUSTER, PEOPLE, policies, default_rates(CLUSTER, PEOPLE)[::5])


@pytest.fixture(scope="module")
def results():
    with Results.open(None, "simulation", asked(), {}) as found:
        simulate(CLUSTER, PEOPLE, found)
        return found


def test_everything_says_that_it_is_simulated(results):
    found = summary(results)
    json.dumps(found)
    assert all(row["simulated"] for row in results.rows)
    assert all("Simulated" in each["title"] for each in (*found["tables"], *found["plots"]))
    assert all(series["simulated"] for plot in found["plots"] for series in plot["series"])
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])


def test_reuse_stands_rates_that_full_prefill_does_not(results):
    last = {row["policy"]: row for row in results.rows}
    assert last["query"]["ttft_s"]["p90"] < last["full"]["ttft_s"]["p90"]
    assert last["prefix"]["chunks"]["memory"] < last["query"]["chunks"]["memory"]
    for row in results.rows:
        assert row["ttft_s"]["p50"] <= row["ttft_s"]["p90"] <= row["ttft_s"]["p99"]
        assert sum(row["chunks"].values()) == pytest.approx(1)
        assert 0 <= row["busy"] <= 1 >= row["link_busy"] >= 0


def test_a_run_goes_on_and_never_mixes_settings(results, tmp_path):
    path = tmp_path / "simulation.jsonl"
    with Results.open(path, "simulation", asked(), {}) as first:
        for row in results.rows[:4]:
            first.add(row)
    with Results.open(path, "simulation", asked(), {}) as then:
        simulate(CLUSTER, PEOPLE, then)
        assert then.rows == results.rows
    with pytest.raises(ResultsError):
        Results.open(path, "simulation", asked(["full"]), {})


def test_what_cannot_be_simulated_is_refused():
    for wrong, why in (
        (replace(CLUSTER, route="anywhere"), "cannot be routed"),
        (replace(CLUSTER, replicas=0), "replicas=0 is not above 0"),
        (replace(CLUSTER, costs=Costs(COSTS.shape, replace(COSTS.machine, utilisation=2))), "not a share"),
    ):
        with pytest.raises(InputError, match=why):
            check_cluster(wrong, POLICIES)
    with pytest.raises(InputError, match="no cost model"):
        check_cluster(CLUSTER, ["link"])
    with pytest.raises(InputError, match="too few"):
        replace(PEOPLE, documents=3).draw()
    with pytest.raises(InputError, match="not above 0"):
        settings(CLUSTER, PEOPLE, POLICIES, [0.0])


def test_a_fit_tells_how_far_it_is_off(tmp_path):
    truth = Costs(SHAPES["smollm2-135m"], Machine(5e10, 1e10, 1.0, 0.0, "made up"))
    with Results.open(tmp_path / "requests-made-5.jsonl", "requests", {"cold": False}, {}) as made:
        for tokens in (1000, 2000, 4000):
            seconds = truth.prefill_s(tokens)
            made.add({"policy": "full", "tokens": tokens, "ttft_s": seconds, "recomputed_share": 1.0})
            made.add({"policy": "query", "tokens": tokens, "ttft_s": seconds / 2, "recomputed_share": 0.05})
            made.add({"policy": "peer:other", "tokens": tokens, "ttft_s": 1.0, "recomputed_share": None})
    machine, [full, query] = fit_folder(tmp_path, truth.shape, 1e10)
    assert machine.flops == pytest.approx(5e10, rel=1e-6)
    assert (full["policy"], full["requests"]) == ("full", 3)
    assert abs(full["error"]) < 1e-6
    assert query["error"] < -0.5  # half of full prefill is more than the model expects of 5 %
    with pytest.raises(InputError, match="two or more"):
        fit_folder(tmp_path / "nothing", truth.shape, 1e10)
