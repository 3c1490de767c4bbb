"""The queue of one server agrees with what is known of queues."""

from __future__ import annotations

import random

import pytest
import simpy

from chunkcache.errors import InputError
from chunkcache.eval.queueing import Queue, Service, percentile, serve
from chunkcache.eval.workload import poisson


def test_requests_wait_for_those_before_them():
    services = [Service(1.0, 2.0), Service(0.5, 0.5), Service(1.0, 1.5), Service(0.25, 0.25)]
    assert serve([0.0, 1.0, 1.5, 10.0], services) == [1.0, 1.5, 2.0, 0.25]
    assert serve([0.0, 0.0], [Service(1, 1), Service(1, 1)]) == [1, 2]


def test_it_is_what_a_simulation_of_events_finds():
    env = simpy.Environment()
    server = simpy.Resource(env)
    found = {}
    draw = random.Random(0)
    services = [Service(first := draw.random(), first + draw.random()) for _ in range(200)]
    arrivals = poisson(200, 1)

    def request(number):
        yield env.timeout(arrivals[number])
        with server.request() as turn:
            yield turn
            found[number] = env.now - arrivals[number] + services[number].first_s
            yield env.timeout(services[number].whole_s)

    for number in range(200):
        env.process(request(number))
    env.run()
    assert serve(arrivals, services) == pytest.approx([found[number] for number in range(200)])


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_mean_wait_is_that_of_pollaczek_and_khinchine(load):
    requests = 20_000
    ttfts = Queue([Service(1.0, 1.0)] * requests, [poisson(requests, seed) for seed in range(3)]).ttfts(load)
    waits = [ttft - 1 for ttft in ttfts]
    assert sum(waits) / len(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.06)  # M/D/1


def test_the_highest_rate_is_where_the_bound_is_met_and_no_higher():
    queue = Queue([Service(1.0, 1.0)] * 500, [poisson(500, seed) for seed in range(2)])
    rate = queue.highest_rate(2.0)
    assert percentile(queue.ttfts(rate), 90) <= 2.0 < percentile(queue.ttfts(rate * 1.01), 90)
    assert 0 < rate < queue.capacity == 1
    assert queue.highest_rate(0.5) == 0
    assert percentile(queue.ttfts(2.0), 90) < 1000  # twice what it can serve, but only for a while
    assert queue.highest_rate(1000) == queue.capacity


def test_a_rate_is_above_zero():
    queue = Queue([Service(1.0, 1.0)], [[1.0]])
    for rate in (0, -1, float("inf"), float("nan")):
        with pytest.raises(InputError, match="not above 0"):
            queue.ttfts(rate)
