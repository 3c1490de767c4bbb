"""Single-flight: what several threads need is computed by one of them, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkcache.library.single_flight import SingleFlight


def same(*names):
    return {name: name for name in names}


def test_who_is_alone_computes_everything():
    flights = SingleFlight()
    with flights.claim(same("a", "b")) as mine:
        assert mine.claimed == ("a", "b")
        mine.resolve("a", 1)
        mine.resolve("b", 2)
    assert list(mine.others()) == []


def test_what_is_running_is_waited_for():
    flights = SingleFlight()
    with flights.claim(same("a", "b")) as first:
        with flights.claim(same("b", "c")) as second:
            assert second.claimed == ("c",)
            second.resolve("c", 3)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: [value for _, value in second.others()])
            first.resolve("a", 1)
            first.resolve("b", 2)
            assert waiting.result(20) == [2]


def test_what_was_computed_is_computed_again_by_who_comes_later():
    flights = SingleFlight()
    with flights.claim(same("a")) as first:
        first.resolve("a", 1)
    with flights.claim(same("a")) as later:
        assert later.claimed == ("a",)
        later.resolve("a", 2)


def test_names_of_one_identity_are_computed_once():
    flights = SingleFlight()
    with flights.claim({"a": 1, "b": 1}) as both:
        assert both.claimed == ("a",)
        both.resolve("a", "value")
    assert dict(both.others()) == {"b": "value"}


def test_the_same_name_with_another_identity_is_another_thing():
    flights = SingleFlight()
    with flights.claim({"a": ("key", True)}) as first, flights.claim({"a": ("key", False)}) as second:
        assert first.claimed == second.claimed == ("a",)
        first.resolve("a", 1)
        second.resolve("a", 2)


def test_those_who_wait_for_what_failed_get_nothing_and_can_claim_it_themselves():
    flights = SingleFlight()
    second = None
    with pytest.raises(ZeroDivisionError), flights.claim(same("a", "b")) as first:  # noqa: PT012
        first.resolve("a", 1)
        with flights.claim(same("a", "b")) as second:
            assert second.claimed == ()
        raise ZeroDivisionError
    assert [value for _, value in second.others()] == [1]
    with flights.claim(same("b")) as again:
        assert again.claimed == ("b",)
        again.resolve("b", 2)


def test_what_was_not_computed_is_no_value():
    flights = SingleFlight()
    with flights.claim(same("a")):
        waiting = flights.claim(same("a"))
    with waiting:
        pass
    assert list(waiting.others()) == []


def test_many_threads_compute_everything_once_and_all_get_it():
    flights, computed, lock, start = SingleFlight(), Counter(), threading.Lock(), threading.Barrier(8)
    done = {}

    def work(number):
        wanted = [(number + turn) % 20 for turn in range(15)]
        start.wait()
        got = {}
        with flights.claim(same(*wanted)) as claim:
            for name in claim.claimed:
                with lock:
                    assert name not in done
                    computed[name] += 1
                    done[name] = name * 10
                claim.resolve(name, name * 10)
            everybody_is_there.wait()
        got = {value for _, value in claim.others()} | {name * 10 for name in claim.claimed}
        assert got == {name * 10 for name in wanted}

    everybody_is_there = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert set(computed.values()) == {1}
    assert flights._running == {}
