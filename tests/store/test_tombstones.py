"""Tombstones: what was computed before a deletion stays deleted, and what is computed after it does not."""

from __future__ import annotations

import pytest

from chunkcache.kv import ChunkKey, Origin
from chunkcache.store import EntryFilter
from chunkcache.store import tombstones as module
from chunkcache.store.tombstones import Tombstones


class Clock:
    now = 100.0

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


K = ChunkKey("k")


def of(chunk):
    return EntryFilter(chunk=chunk)


def deleted(tombstones, created, key=K, chunks=()):
    return tombstones.is_deleted(key, Origin(chunks=tuple(chunks), created=created))


def test_only_what_is_older_than_its_deletion_is_deleted(clock):
    tombstones = Tombstones()
    assert not deleted(tombstones, 100.0)
    assert not deleted(tombstones, 0.0)
    tombstones.add(K)
    assert deleted(tombstones, 99.9)
    assert deleted(tombstones, 100.0)
    assert not deleted(tombstones, 100.1)
    assert not deleted(tombstones, 99.9, key=ChunkKey("other"))


def test_a_filter_deletes_what_it_selects(clock):
    tombstones = Tombstones()
    tombstones.add(of("a"))
    clock.now = 110.0
    tombstones.add(EntryFilter(chunks=frozenset("bx")))
    assert deleted(tombstones, 99.0, chunks="a")
    assert deleted(tombstones, 105.0, chunks="ab")
    assert not deleted(tombstones, 105.0, chunks="a")
    assert not deleted(tombstones, 99.0, chunks="c")


def test_the_last_deletion_counts(clock):
    tombstones = Tombstones()
    for what in (K, of("a")):
        tombstones.add(what)
    clock.now = 200.0
    for what in (K, of("a")):
        tombstones.add(what)
    assert deleted(tombstones, 150.0)
    assert deleted(tombstones, 150.0, key=ChunkKey("other"), chunks="a")


def test_the_oldest_are_forgotten_of_each_kind_for_itself(clock, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 3)
    tombstones = Tombstones()
    tombstones.add(of("a"))
    for name in ("first", "second", "third", "first", "fourth"):
        clock.now += 1
        tombstones.add(ChunkKey(name))
    known = {name: deleted(tombstones, 99.0, key=ChunkKey(name)) for name in ("first", "second", "third", "fourth")}
    assert known == {"first": True, "second": False, "third": True, "fourth": True}
    assert deleted(tombstones, 99.0, chunks="a")
    for name in "bcd":
        tombstones.add(of(name))
    assert not deleted(tombstones, 99.0, chunks="a", key=ChunkKey("x"))


def test_new_kv_are_not_compared_with_every_old_deletion(clock, monkeypatch):
    tombstones = Tombstones()
    for name in range(100):
        tombstones.add(of(str(name)))
    asked = []
    clock.now = 300.0
    tombstones.add(of("late"))
    monkeypatch.setattr(EntryFilter, "matches", lambda self, _: asked.append(self))
    assert not deleted(tombstones, 250.0)
    assert asked == [of("late")]
