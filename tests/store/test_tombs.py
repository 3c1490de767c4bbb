"""Tombstones: what was computed before a deletion stays deleted, and what is computed after it does not."""

from __future__ import annotations

import pytest

from chunkcache.store import tombs as module
from chunkcache.store.tombs import Tombs


class Clock:
    now = 100.0

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def covers(tombs, created, digest="k", labels=()):
    return tombs.cover(digest, created, lambda condition: condition[0] in labels)


def test_only_what_is_older_than_its_deletion_is_covered(clock):
    tombs = Tombs()
    assert not covers(tombs, 100.0)
    assert not covers(tombs, 0.0)
    tombs.bury("k")
    assert covers(tombs, 99.9)
    assert covers(tombs, 100.0)
    assert not covers(tombs, 100.1)
    assert not covers(tombs, 99.9, digest="other")


def test_a_condition_covers_what_agrees_with_it(clock):
    tombs = Tombs()
    tombs.bury(("a",))
    clock.now = 110.0
    tombs.bury(("b",))
    assert covers(tombs, 99.0, labels="a")
    assert covers(tombs, 105.0, labels="ab")
    assert not covers(tombs, 105.0, labels="a")
    assert not covers(tombs, 99.0, labels="c")


def test_the_last_deletion_counts(clock):
    tombs = Tombs()
    for what in ("k", ("a",)):
        tombs.bury(what)
    clock.now = 200.0
    for what in ("k", ("a",)):
        tombs.bury(what)
    assert covers(tombs, 150.0)
    assert covers(tombs, 150.0, digest="other", labels="a")


def test_the_oldest_are_forgotten_of_each_kind_for_itself(clock, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 3)
    tombs = Tombs()
    tombs.bury(("a",))
    for name in ("first", "second", "third", "first", "fourth"):
        clock.now += 1
        tombs.bury(name)
    covered = {name: covers(tombs, 99.0, digest=name) for name in ("first", "second", "third", "fourth")}
    assert covered == {"first": True, "second": False, "third": True, "fourth": True}
    assert covers(tombs, 99.0, labels="a")
    for name in "bcd":
        tombs.bury((name,))
    assert not covers(tombs, 99.0, labels="a", digest="x")


def test_new_kv_are_not_compared_with_every_old_deletion(clock):
    tombs = Tombs()
    for name in range(100):
        tombs.bury((name,))
    asked = []
    clock.now = 300.0
    tombs.bury(("late",))
    assert not tombs.cover("k", 250.0, asked.append)
    assert asked == [("late",)]
