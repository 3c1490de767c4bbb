"""The cluster's tiers, link, queues and routes, against runs that were worked out by hand."""

from __future__ import annotations

import importlib
import random
import sys
from dataclasses import replace

import pytest

from chunkcache.errors import InputError
from chunkcache.eval.cluster import LRU, POLICIES, Cluster, Run, Sizes
from chunkcache.eval.costs import Costs, Machine, Shape, predicted
from chunkcache.eval.queueing import Service, serve
from chunkcache.eval.workload import at_rate, poisson, zipf_draws

SHAPE = Shape(
    params=1.0, head_params=0.0, layers=1, heads=1, kv_heads=1, head_dim=1, dtype_bytes=1, source="made up"
)  # 2 B a token
FAST = float("inf")
MACHINE = Machine(
    flops=1.0, memory_bandwidth=FAST, hbm_bandwidth=FAST, utilisation=1.0, overhead=0.0, source="made up"
)
SIZES = Sizes(prefix=0, chunk=10, question=0)
CLUSTER = Cluster(Costs(SHAPE, MACHINE), SIZES, 1, 1e9, 0, 1.0, 0.0)
CHUNK_S = 2 * 10 + 4 * 10 * 5  # prefill of a chunk


def test_the_least_recently_used_goes_first():
    tier = LRU(30)
    for key in "abc":
        tier.put(key, 10)
    assert tier.use("a")
    tier.put("d", 10)
    assert [tier.use(key) for key in "abcd"] == [True, False, True, True]
    tier.put("e", 25)  # all others have to go
    assert [tier.use(key) for key in "acde"] == [False, False, False, True]
    tier.put("f", 31)
    assert not tier.use("f")
    assert tier.nbytes == 25


def test_a_chunk_is_computed_once_and_then_in_memory():
    found = Run(CLUSTER, "cacheblend:ratio=0.15").serve([0, 1e6], [(0, 1), (1, 0)])
    assert found.chunks == {"memory": 2, "redis": 0, "computed": 2}
    assert found.ttfts[0] - found.ttfts[1] == pytest.approx(2 * CHUNK_S)


def test_prefixes_only_hit_behind_the_same_chunks():
    found = Run(CLUSTER, "prefix").serve([0, 1e6, 2e6], [(0, 1), (1, 0), (0, 2)])
    assert found.chunks == {"memory": 1, "redis": 0, "computed": 5}


def test_memory_that_is_too_small_leaves_chunks_to_redis():
    small = replace(CLUSTER, memory_bytes=20, redis_bytes=1e9, redis_bandwidth=1e9)
    found = Run(small, "query").serve([0, 1e6, 2e6], [(0,), (1,), (0,)])
    assert found.chunks == {"memory": 0, "redis": 1, "computed": 2}


def test_full_prefill_waits_in_line_and_a_second_replica_halves_the_line():
    assert Run(CLUSTER, "full").serve([0, 0], [(0,), (1,)]).ttfts == [CHUNK_S, 2 * CHUNK_S]
    two = replace(CLUSTER, replicas=2)
    found = Run(two, "full").serve([0, 0], [(0,), (1,)])
    assert found.ttfts == [CHUNK_S, CHUNK_S]
    assert found.busy == 1


def test_the_least_loaded_replica_gets_the_request():
    two = replace(CLUSTER, replicas=2)
    requests, arrivals = [(0, 1), (0,), (0,)], [0, 0, CHUNK_S + 10]
    assert Run(two, "full").serve(arrivals, requests).ttfts[2] > CHUNK_S  # behind the long one
    assert Run(replace(two, route="least-loaded"), "full").serve(arrivals, requests).ttfts[2] == CHUNK_S


def test_transfers_wait_for_one_another_on_the_link():
    cluster = replace(
        CLUSTER, replicas=2, redis_bytes=1e9, redis_bandwidth=0.01, redis_latency_s=5.0
    )  # 2,000 s a chunk
    warm, at = [(0,), (0,)], 1e6
    found = Run(cluster, "cacheblend:ratio=0.15").serve([0, 0, at, at], [*warm, (1,), (2,)])
    assert found.chunks["computed"] == 4
    # replica 0 and 1 have computed 1 and 2; each now asks for the other's
    found = Run(cluster, "cacheblend:ratio=0.15").serve([0, 0, at, at], [(1,), (2,), (2,), (1,)])
    assert found.chunks == {"memory": 0, "redis": 2, "computed": 2}
    alone, behind = found.ttfts[2], found.ttfts[3]
    assert behind - alone == pytest.approx(2000)
    assert alone >= 2005
    assert found.link_busy == pytest.approx(4000 / (at + behind), rel=0.01)


def test_what_finds_no_place_in_the_queue_is_not_written():
    slow = replace(CLUSTER, memory_bytes=20, redis_bytes=1e9, redis_bandwidth=1e-3)  # 20,000 s a chunk
    at = [float(number * 1000) for number in range(30)]
    requests = [(number,) for number in range(30)]
    again = [(number,) for number in range(30)]
    found = Run(slow, "cacheblend:ratio=0.15").serve(
        [*at, *(1e7 + each * 1e6 for each in range(30))], [*requests, *again]
    )
    assert 16 <= found.chunks["redis"] < 30


def test_every_policy_of_the_table_runs():
    sizes = Sizes(prefix=5, chunk=20, question=3)
    for policy in POLICIES:
        found = Run(replace(CLUSTER, sizes=sizes), policy).serve([0.0, 1e7], [(0, 1, 2), (0, 1, 2)])
        assert sum(found.chunks.values()) == 6
        assert (found.ttfts[1] < found.ttfts[0]) == (policy != "full")


@pytest.mark.parametrize("policy", POLICIES)
def test_one_replica_is_the_queue_that_is_made_of_its_service_times(policy):
    cluster = replace(CLUSTER, sizes=Sizes(5, 20, 3), memory_bytes=6 * 40)  # six chunks
    drawn = zipf_draws(20, 3, 0.9, random.Random(0))
    requests, pattern = [next(drawn) for _ in range(200)], poisson(200, 1)
    alone = Run(cluster, policy).serve([1e7 * number for number in range(200)], requests)
    assert len(set(alone.services)) == 1 if policy == "full" else len({round(each) for each in alone.services}) > 1
    arrivals = at_rate(pattern, 0.8 * 200 / sum(alone.services))
    loaded = Run(cluster, policy).serve(arrivals, requests)
    assert loaded.chunks == alone.chunks
    assert max(loaded.ttfts) > 2 * max(alone.ttfts)  # there is waiting
    assert loaded.ttfts == pytest.approx(serve(arrivals, [Service(each, each) for each in alone.services]))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fit_is_tried_on_what_is_simulated(policy):
    sizes = Sizes(prefix=5, chunk=20, question=3)
    costs = Costs(replace(SHAPE, layers=4, head_params=7.0), replace(MACHINE, memory_bandwidth=0.01))
    run = Run(replace(CLUSTER, costs=costs, sizes=sizes), policy).serve([0.0, 1e7], [(0, 1, 2), (0, 1, 2)])
    assert predicted(costs, POLICIES[policy], 5, 60, 3) == pytest.approx(run.ttfts[1])


def test_chunks_are_counted_from_the_end_of_the_warm_up_on():
    arrivals, requests = [0, 1e6, 2e6], [(0,), (0,), (0,)]
    assert Run(CLUSTER, "query").serve(arrivals, requests, warm_up=1).chunks == {
        "memory": 2, "redis": 0, "computed": 0
    }  # fmt: skip
    assert Run(CLUSTER, "full").serve(arrivals, requests, warm_up=1).chunks["computed"] == 2


def test_without_simpy_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "simpy", None)
    monkeypatch.delitem(sys.modules, "chunkcache.eval.cluster")
    with pytest.raises(InputError, match=r'a simulation needs simpy .*pip install "chunkcache\[eval\]"'):
        importlib.import_module("chunkcache.eval.cluster")
