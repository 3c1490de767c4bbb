"""Requests are measured in the cache state they meet; a real run is an open loop; interrupted runs go on."""

from __future__ import annotations

import pytest
from support.llm import TEXTS, chat_tokenizer, tiny_model

from chunkcache.errors import InputError, PolicyError
from chunkcache.eval.load import DISK, MEMORY, Group, LoadBench, Sizes, _open_loop
from chunkcache.eval.results import Results
from chunkcache.eval.workload import Request, Workload

ASKED = ((0, 1), (1, 2), (0, 1), (0, 1), (2, 0))
WORKLOAD = Workload(TEXTS, tuple(Request("Who wrote down the weather?", numbers) for numbers in ASKED))
POLICIES = ("full", "prefix", "reuse")
ROOMY = (Group(1.0, MEMORY),)


def bench(policies=POLICIES, groups=ROOMY, **options):
    return LoadBench(tiny_model(), chat_tokenizer(), WORKLOAD, policies, groups, **options)


def memory():
    return Results.open(None, "load", {}, {})


def column(results, name, policy, **fields):
    fields = {"policy": policy, "kind": "measured", **fields}
    return [row[name] for row in results.rows if all(row[key] == value for key, value in fields.items())]


@pytest.fixture(scope="module")
def cold():
    results = memory()
    bench(groups=(Group(1.0, MEMORY), Group(0.6, DISK))).measure(results)
    return results


def test_every_policy_serves_every_request_in_turn(cold):
    head = [(row["request"], row["policy"]) for row in cold.rows[:6]]
    assert head == [(0, "full"), (0, "prefix"), (0, "reuse"), (1, "prefix"), (1, "reuse"), (1, "full")]
    assert len(cold.rows) == 2 * 3 * 5
    for row in cold.rows:
        assert 0 < row["ttft_service_s"] <= row["service_s"]
        assert row["chunks"] == 2


def test_hits_are_those_of_the_chunks_and_tell_their_tier(cold):
    in_memory = {"budget": 1.0, "tiers": MEMORY}
    assert column(cold, "tier_hits", "reuse", **in_memory) == [{"memory": n} for n in (0, 1, 2, 2, 2)]
    assert column(cold, "hits", "reuse", **in_memory) == [0, 1, 2, 2, 2]
    assert column(cold, "hits", "full", **in_memory) == [0] * 5
    assert column(cold, "hits", "prefix", **in_memory)[3] == 2  # the same chunks in the same order as just before
    hits = column(cold, "hits", "reuse", tiers=DISK)
    tiers = column(cold, "tier_hits", "reuse", tiers=DISK)
    assert hits == [0, 1, 2, 2, 2]  # disk has what memory had to drop
    assert [sum(each.values()) for each in tiers] == hits
    assert sum(each["disk"] for each in tiers) > 0
    stored = column(cold, "stored_bytes", "reuse", tiers=DISK)[-1]
    assert 0 < stored["memory"] < stored["disk"]


def test_a_budget_bounds_what_is_kept():
    results = memory()
    bench(["reuse"], [Group(0.6, MEMORY)]).measure(results)
    assert sum(column(results, "hits", "reuse")) < 7
    full = memory()
    bench(["reuse"]).measure(full)
    assert max(each["memory"] for each in column(results, "stored_bytes", "reuse")) < max(
        each["memory"] for each in column(full, "stored_bytes", "reuse")
    )


def test_a_warm_store_holds_what_fits():
    results = memory()
    bench(["reuse", "full"], warm=True).measure(results)
    assert column(results, "hits", "reuse") == [2] * 5
    sizes = Sizes((10, 20, 30), prefix=5)
    assert (sizes.budget(0.5), sizes.fitting(0.5), sizes.fitting(1.0)) == (35, 2, 3)


def test_what_cannot_be_run_is_refused_first():
    for budget, why in ((0, "not above 0"), (0.001, "nothing would be kept")):
        with pytest.raises(InputError, match=why):
            bench(groups=[Group(budget, MEMORY)])
    with pytest.raises(InputError, match="no first token"):
        bench(answer_tokens=0)
    with pytest.raises(PolicyError):
        bench(["nothing"])


class Interrupted(Results):
    """Stops a run after a few rows."""

    def add(self, row):
        if len(self.rows) == 7:
            raise KeyboardInterrupt
        super().add(row)


def test_a_run_goes_on_in_the_cache_state_where_it_stopped(tmp_path):
    whole = memory()
    bench().measure(whole)
    path = tmp_path / "load.jsonl"
    with Results.open(path, "load", {}, {}) as first:
        stopped = Interrupted("load", {}, {}, first.rows, _file=first._file, _lock=first._lock)
        with pytest.raises(KeyboardInterrupt):
            bench().measure(stopped)
    with Results.open(path, "load", {}, {}) as then:
        assert len(then.rows) == 7
        bench().measure(then)
        counts = [{name: row[name] for name in ("request", "policy", "hits", "tier_hits")} for row in then.rows]
        assert counts == [{name: row[name] for name in counts[0]} for row in whole.rows]
        bench().measure(then)
        assert len(then.rows) == len(whole.rows)


def test_a_real_run_comes_at_a_share_of_what_was_measured_and_only_once():
    results = memory()
    run = bench(["reuse"], answer_tokens=3)
    with pytest.raises(InputError, match="measure all first"):
        run.real_run("reuse", ROOMY[0], 0.9, [0, 1, 2, 3, 4], results)
    run.measure(results)
    for _ in range(2):
        run.real_run("reuse", ROOMY[0], 0.9, [0, 1, 2, 3, 4], results)
    [row] = results.rows[5:]
    services = column(results, "service_s", "reuse")
    assert row["rate"] == pytest.approx(0.9 * 5 / sum(services))
    assert row["arrivals_s"] == pytest.approx([number / row["rate"] for number in range(5)])
    assert all(first < whole for first, whole in zip(row["ttft_service_s"], row["service_s"], strict=True))
    assert sum(row["ttft_s"]) == pytest.approx(sum(row["waiting_s"]) + sum(row["ttft_service_s"]))


def test_a_real_run_is_told_by_its_group():
    results = memory()
    there = {"kind": "real", "policy": "reuse", "load": 0.5}
    results.add({**there, "budget": 0.7, "tiers": MEMORY})
    results.add({**there, "budget": 1.0, "tiers": DISK})
    run = bench(["reuse"])
    run.measure(results)
    run.real_run("reuse", ROOMY[0], 0.5, [0, 1, 2, 3, 4], results)
    assert len(results.rows) == 2 + 5 + 1


class Clock:
    """Time that passes only in sleep."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_requests_come_at_their_times_whatever_became_of_those_before(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("chunkcache.eval.load.time", clock)
    lasting = [2.0, 1.0, 1.0, 1.0, 0.5]
    came = []

    def answer(number):
        came.append(clock.now - 100)
        clock.sleep(lasting[number])
        return lasting[number] / 2, lasting[number]

    served = _open_loop([1.0, 1.5, 2.0, 9.0, 9.25], answer)
    assert came == [1.0, 3.0, 4.0, 9.0, 10.0]  # idle, then a backlog, then idle and a backlog again
    assert [waited for waited, *_ in served] == [0.0, 1.5, 2.0, 0.0, 0.75]
    assert [whole for *_, whole in served] == lasting


def test_a_policy_meets_the_same_cache_alone_and_beside_others():
    alone, beside = memory(), memory()
    bench(["reuse"]).measure(alone)
    bench(["prefix", "query", "reuse"]).measure(beside)
    for name in ("hits", "misses", "tier_hits", "stored_bytes"):
        assert column(alone, name, "reuse") == column(beside, name, "reuse")


def test_a_bench_tells_its_model_and_its_policies():
    about = bench(["query"]).about
    assert about["options"]["query"].startswith("query:ratio=")
    assert len(about["fingerprint"]) == 64
