"""A simulation says that it is one, goes on where it stopped, and is fitted to what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from chunkcache.errors import InputError, ResultsError
from chunkcache.eval.cluster import POLICIES as REUSE
from chunkcache.eval.cluster import Cluster, Sizes
from chunkcache.eval.costs import MACHINES, SHAPES, Costs, Machine, predicted
from chunkcache.eval.results import Results
from chunkcache.eval.simulate import (
    BUSY,
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
    assert found["tables"]
    assert len(found["plots"]) == 3
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


def test_overloaded_points_are_flagged_and_on_no_curve(results):
    full = [row for row in results.rows if row["policy"] == "full"]
    assert [row["load"] >= BUSY for row in full] == [False, True, True]  # of 0.1, 1 and 8 times its capacity
    assert full[0]["load"] == pytest.approx(0.1)
    found = summary(results)
    cells = {row[0]: row[1:] for row in found["tables"][0]["rows"]}
    assert ["overload" in cell for cell in cells["full"]] == [False, True, True]
    assert "overload" not in cells["query"][0]
    assert [len(series["points"]) for series in found["plots"][0]["series"] if series["name"] == "full"] == [1]


def test_hits_are_counted_behind_the_warm_up():
    people = replace(PEOPLE, documents=5)  # the first request computes all there is
    with Results.open(None, "simulation", settings(CLUSTER, people, ["query"], [0.1]), {}) as found:
        simulate(CLUSTER, people, found)
    assert found.rows[0]["chunks"]["computed"] == 0


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
    with pytest.raises(InputError, match="skew of 6"):
        replace(PEOPLE, skew=6).draw()
    with pytest.raises(InputError, match="not above 0"):
        settings(CLUSTER, PEOPLE, POLICIES, [0.0])


TRUTH = Costs(SHAPES["smollm2-135m"], Machine(5e10, 1e10, 1e10, 1.0, 0.0, "made up"))
SIZES = Sizes(64, 512, 36)
RAN_ON = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "device": "cpu", "threads": 2}


def requests(path, ran_on=RAN_ON, cold=False):
    """Write requests; `query` takes half of the time that the model expects where all chunks are stored."""
    with Results.open(path, "requests", {"cold": cold}, ran_on) as made:
        for tokens in (1000, 2000, 4000):
            row = {"tokens": tokens, "fallbacks": 0, "misses": 0}
            made.add({**row, "policy": "full", "ttft_s": TRUTH.full_s(tokens), "misses": 5})
            seconds = predicted(TRUTH, REUSE["query"], 64, tokens - 100, 36)
            made.add({**row, "policy": "query", "ttft_s": seconds / 2})
            made.add({**row, "policy": "query", "ttft_s": 1000.0, "misses": 1})
            made.add({**row, "policy": "link:k=8", "ttft_s": 1.0})
            made.add({**row, "policy": "peer:other", "ttft_s": 1.0, "fallbacks": None, "misses": None})


def fitted(folder, name="smollm2-135m", sizes=SIZES):
    return fit_folder(folder, name, SHAPES[name], sizes, 1e10, 1e10)


@pytest.mark.parametrize("name", ["quality-made-5", "ttft-made-5"])
def test_a_fit_tells_how_far_it_is_off(tmp_path, name):
    requests(tmp_path / f"{name}.jsonl")
    with Results.open(tmp_path / "load-made-5.jsonl", "load", {}, {}):
        pass  # of another bench
    machine, [full, query] = fitted(tmp_path)
    assert machine.flops == pytest.approx(5e10, rel=1e-6)
    assert (full["policy"], full["requests"]) == ("full", 3)
    assert abs(full["error"]) < 1e-6
    assert (query["policy"], query["requests"]) == ("query", 3)  # those with all chunks stored
    assert query["error"] == pytest.approx(1)  # it took half of what the model expects


def test_a_fit_to_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="has no results"):
        fitted(tmp_path)
    requests(tmp_path / "cold.jsonl", cold=True)
    with pytest.raises(InputError, match="no warm results"):
        fitted(tmp_path)
    requests(tmp_path / "quality-made-5.jsonl")
    with pytest.raises(InputError, match=r"is not --shape llama-3\.1-8b"):
        fitted(tmp_path, "llama-3.1-8b")
    with pytest.raises(InputError, match="no room"):
        fitted(tmp_path, sizes=Sizes(1000, 512, 36))
    requests(tmp_path / "ttft-made-5.jsonl", {**RAN_ON, "threads": 8})
    with pytest.raises(InputError, match="threads=2 and of 8"):
        fitted(tmp_path)


def test_a_fit_to_another_dtype_than_the_shape_has_is_refused(tmp_path):
    requests(tmp_path / "quality-made-5.jsonl", {**RAN_ON, "dtype": "bfloat16"})
    with pytest.raises(InputError, match="measured in bfloat16"):
        fitted(tmp_path)
