"""The circuit breaker: one failure costs one wait, and one trial finds out whether it is over."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkcache.store import breaker as module
from chunkcache.store.breaker import Breaker


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_it_lets_everything_through_until_something_fails():
    breaker = Breaker()
    assert all(breaker.allows() for _ in range(5))
    assert not breaker.is_open


def test_only_the_first_failure_is_news(clock):
    breaker = Breaker()
    assert [breaker.failed() for _ in range(3)] == [True, False, False]
    breaker.succeeded()
    assert breaker.failed()


def test_nothing_is_tried_until_the_pause_is_over_and_then_one_thing(clock):
    breaker = Breaker(pause_s=2.0)
    breaker.failed()
    assert not breaker.allows()
    clock.now += 1.9
    assert not breaker.allows()
    clock.now += 0.2
    assert [breaker.allows() for _ in range(4)] == [True, False, False, False]
    clock.now += 2.0  # that trial has not come back: the next
    assert breaker.allows()


def test_a_trial_that_succeeds_closes_it_and_one_that_fails_opens_it_again(clock):
    breaker = Breaker(pause_s=2.0)
    breaker.failed()
    clock.now += 2.0
    assert breaker.allows()
    breaker.failed()
    clock.now += 1.9
    assert not breaker.allows()
    clock.now += 0.1
    assert breaker.allows()
    breaker.succeeded()
    assert all(breaker.allows() for _ in range(3))


def test_asking_whether_it_is_open_is_no_trial(clock):
    breaker = Breaker(pause_s=1.0)
    breaker.failed()
    clock.now += 5
    assert breaker.is_open
    assert breaker.is_open
    assert breaker.allows()


def test_of_many_threads_one_makes_the_trial(clock):
    breaker = Breaker(pause_s=60.0)
    breaker.failed()
    clock.now += 60
    start = threading.Barrier(8)

    def ask(_):
        start.wait()
        return breaker.allows()

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1
