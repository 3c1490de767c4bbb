"""Single-flight: what several threads need is computed by one of them, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkcache.library.single_flight import Flights


def same(*names):
    return {name: name for name in names}


def test_who_is_alone_computes_everything():
    flights = Flights()
    with flights.board(same("a", "b")) as mine:
        assert mine.mine == ("a", "b")
        mine.land("a", 1)
        mine.land("b", 2)
    assert list(mine.others()) == []


def test_what_is_in_the_air_is_waited_for():
    flights = Flights()
    with flights.board(same("a", "b")) as first:
        with flights.board(same("b", "c")) as second:
            assert second.mine == ("c",)
            second.land("c", 3)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: list(second.others()))
            first.land("a", 1)
            first.land("b", 2)
            assert waiting.result(20) == [2]


def test_what_has_landed_is_computed_again_by_who_comes_later():
    flights = Flights()
    with flights.board(same("a")) as first:
        first.land("a", 1)
    with flights.board(same("a")) as later:
        assert later.mine == ("a",)
        later.land("a", 2)


def test_names_of_one_identity_are_computed_once():
    flights = Flights()
    with flights.board({"a": 1, "b": 1}) as both:
        assert both.mine == ("a",)
        both.land("a", "value")
    assert list(both.others()) == ["value"]


def test_the_same_name_with_another_identity_is_another_thing():
    flights = Flights()
    with flights.board({"a": ("key", True)}) as first, flights.board({"a": ("key", False)}) as second:
        assert first.mine == second.mine == ("a",)
        first.land("a", 1)
        second.land("a", 2)


def test_those_who_wait_for_what_failed_get_nothing_and_can_board_themselves():
    flights = Flights()
    second = None
    with pytest.raises(ZeroDivisionError), flights.board(same("a", "b")) as first:  # noqa: PT012
        first.land("a", 1)
        with flights.board(same("a", "b")) as second:
            assert second.mine == ()
        raise ZeroDivisionError
    assert list(second.others()) == [1]
    with flights.board(same("b")) as again:
        assert again.mine == ("b",)
        again.land("b", 2)


def test_what_was_not_computed_is_no_value():
    flights = Flights()
    with flights.board(same("a")):
        waiting = flights.board(same("a"))
    with waiting:
        pass
    assert list(waiting.others()) == []


def test_many_threads_compute_everything_once_and_all_get_it():
    flights, computed, lock, start = Flights(), Counter(), threading.Lock(), threading.Barrier(8)
    done = {}

    def work(number):
        wanted = [(number + turn) % 20 for turn in range(15)]
        start.wait()
        got = {}
        with flights.board(same(*wanted)) as boarded:
            for name in boarded.mine:
                with lock:
                    assert name not in done
                    computed[name] += 1
                    done[name] = name * 10
                boarded.land(name, name * 10)
            everybody_is_there.wait()
        got = set(boarded.others()) | {name * 10 for name in boarded.mine}
        assert got == {name * 10 for name in wanted}

    everybody_is_there = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert set(computed.values()) == {1}
    assert flights._in_the_air == {}
