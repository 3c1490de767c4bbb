"""Time to live: an expired entry is in no tier, also before anybody asks for it, and is computed again."""

from __future__ import annotations

import time

import pytest
from support.llm import TEXTS, wrapped
from support.store import LOCAL, disk_store, key, kv, memory_store, open_tier

from chunkcache.store import TieredStore


@pytest.fixture
def clock(monkeypatch):
    """Let an hour pass."""

    def pass_an_hour():
        later = time.time() + 3600
        monkeypatch.setattr(time, "time", lambda: later)

    return pass_an_hour


@pytest.mark.parametrize("scheme", LOCAL)
def test_an_expired_entry_is_not_in_the_tier_though_nobody_has_asked_for_it(scheme, tmp_path, clock):
    with open_tier(scheme, tmp_path, ttl=60) as store:
        store.put(key(1), kv(1))
        assert key(1) in store
        clock()
        assert key(1) not in store
        assert store.get(key(1), [1]) is None


def test_an_entry_that_expired_in_all_tiers_is_in_none(tmp_path, clock):
    tiers = [memory_store(ttl=60), disk_store(tmp_path, ttl=100)]
    with TieredStore(tiers) as store:
        store.put(key(1), kv(1))
        store.flush()
        clock()
        assert key(1) not in store


def test_the_file_is_asked_when_the_index_does_not_know_the_entry(tmp_path, clock):
    with disk_store(tmp_path) as one, disk_store(tmp_path, ttl=60) as other:
        one.put(key(1), kv(1))
        other.put(key(2), kv(2))
        one.close()
        other.close()  # and with it the index
        assert key(1) in one
        assert key(2) in other
        clock()
        assert key(1) in one
        assert key(2) not in other


def test_precompute_computes_what_has_expired_and_writes_nothing_that_is_held(tmp_path, clock):
    store = disk_store(tmp_path, ttl=60)
    llm = wrapped(store=store)
    assert llm.precompute(TEXTS).computed == len(TEXTS)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("??/*")}
    assert llm.precompute(TEXTS).computed == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("??/*")} == written
    clock()
    assert llm.prefetch(TEXTS) == list(TEXTS)
    assert llm.precompute(TEXTS).computed == len(TEXTS)
    assert llm.precompute(TEXTS).computed == 0
    assert llm.prefetch(TEXTS) == []
    store.close()
