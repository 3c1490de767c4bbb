"""Hints: what is retrieved comes near and becomes popular, and guesses only as far as they come true."""

from __future__ import annotations

import threading

import pytest
from support.store import key, kv, memory_store

from chunkcache.errors import InputError
from chunkcache.store import MemoryStore, TieredStore
from chunkcache.store.hints import Hints


class Told(MemoryStore):
    """A store that remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.fetched, self.credits = [], {}

    def prefetch(self, keys):
        self.fetched.append(list(keys))

    def credit(self, key, worth):
        self.credits[key] = self.credits.get(key, 0.0) + worth


def test_what_was_retrieved_comes_to_the_nearest_tier_and_stays_longer():
    near, far = memory_store(32, evict="lfu"), memory_store()
    with TieredStore([near, far]) as store:
        for token in range(4):
            far.put(key(token), kv(token))
        hints = Hints(store)
        for _ in range(3):
            hints.retrieved([key(1)])
        store.flush()
        assert key(1) in near
        for token in (2, 3, 0):  # two have room
            hints.retrieved([key(token)])
            store.flush()
        assert key(1) in near
        assert key(0) in near


def test_hints_are_ranked_and_named_once():
    store = Told()
    hints = Hints(store, least=0)
    hints.retrieved([key(1), key(2), key(1)], [key(3), key(2), key(4), key(3)])
    assert store.fetched == [[key(1), key(2), key(3), key(4)]]
    assert store.credits == {key(1): 1.0, key(2): 1.0}  # of the others nothing is known yet


def test_guesses_that_come_true_are_prefetched_and_others_are_not():
    store = Told()
    hints = Hints(store, likely=2, least=0.3, within=2)
    for i in range(0, 300, 3):
        hints.retrieved([key(i)], [key(i + 3), key(i + 1)])  # the first is always next, the second never
    sure, never = hints.chances()
    assert sure > 0.8
    assert never == 0
    assert store.fetched[0] == [key(0)]  # before anything was learnt
    assert store.fetched[-1] == [key(297), key(300)]
    assert 0.8 < store.credits[key(300)] <= 1
    assert key(298) not in store.credits


def test_guesses_are_watched_also_while_they_are_not_prefetched():
    store = Told()
    hints = Hints(store, likely=1, least=0.5, within=1)
    for i in range(200):
        hints.retrieved([key(i)], [key(1000 + i)])
    assert store.fetched[-1] == [key(199)]
    for i in range(200, 700):
        hints.retrieved([key(i)], [key(i + 1)])
    assert store.fetched[-1] == [key(699), key(700)]


def test_a_guess_that_comes_true_too_late_counts_as_wrong():
    late, in_time = (Hints(Told(), likely=1, within=within) for within in (2, 3))
    for hints in (late, in_time):
        for i in range(60):
            hints.retrieved([key(i)], [key(i + 3)])
    assert late.chances() == (0,)
    assert in_time.chances()[0] > 0.8


def test_no_more_guesses_are_looked_at_than_asked_for():
    store = Told()
    Hints(store, likely=2, least=0).retrieved([key(0)], [key(i) for i in range(1, 9)])
    Hints(store, likely=0, least=0).retrieved([key(0)], [key(i) for i in range(1, 9)])
    assert store.fetched == [[key(0), key(1), key(2)], [key(0)]]


def test_what_is_watched_does_not_pile_up():
    hints = Hints(Told(), likely=4, within=5)
    for i in range(100):
        hints.retrieved([key(i)], [key(1000 + 4 * i + j) for j in range(4)])
    assert len(hints._guesses) <= 4 * 6


def test_threads_may_tell_at_once():
    hints = Hints(Told(), likely=3)
    failed = []

    def work(seed):
        try:
            for i in range(200):
                hints.retrieved([key((seed + i) % 50)], [key((seed + i + j) % 50) for j in range(1, 4)])
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to see it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(0 < chance <= 1 for chance in hints.chances())


@pytest.mark.parametrize("options", [{"likely": -1}, {"within": 0}, {"least": 1.5}])
def test_values_out_of_range_are_refused(options):
    [(name, value)] = options.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        Hints(Told(), **options)
