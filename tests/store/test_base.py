"""What every store does alike, shown on every tier: verified hits, counting, deleting, and many threads at once."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from support.store import LOCAL, SIZE, key, kv, open_tier

from chunkcache.store import MemoryStore, StoreStats, Tier


@pytest.fixture(params=LOCAL)
def store(request, tmp_path):
    with open_tier(request.param, tmp_path) as opened:
        yield opened


def test_what_was_put_is_got_whole(store):
    assert store.put(key(1, 2), kv(1, 2))
    got = store.get(key(1, 2), [1, 2])
    assert (got.token_ids, got.position, got.nbytes) == ((1, 2), 3, 2 * SIZE)
    for layer, expected in zip(got.layers, kv(1, 2).layers, strict=True):
        assert torch.equal(layer, expected)


def test_what_was_not_put_is_a_miss(store):
    assert store.get(key(1), [1]) is None
    assert key(1) not in store
    assert store.stats() == StoreStats(misses=1)


def test_an_entry_with_other_tokens_is_a_counted_miss_and_deleted(store, caplog):
    store.put(key(1, 2), kv(1, 3))
    with caplog.at_level(logging.WARNING):
        assert store.get(key(1, 2), [1, 2]) is None
    assert store.stats() == StoreStats(misses=1, mismatches=1, writes=1)
    assert key(1, 2) not in store
    assert str(key(1, 2)) in caplog.text
    assert store.get(key(1, 2), [1, 2]) is None
    assert store.stats().mismatches == 1


@pytest.mark.parametrize("asked", [[1], [1, 2, 3], [2, 1], []])
def test_only_exactly_the_same_tokens_are_a_hit(store, asked):
    store.put(key(1, 2), kv(1, 2))
    assert store.get(key(1, 2), asked) is None


def test_token_ids_may_come_in_any_sequence(store):
    store.put(key(1, 2), kv(1, 2))
    assert store.get(key(1, 2), (1, 2)) is not None
    assert store.get(key(1, 2), range(1, 3)) is not None


def test_a_second_put_replaces_the_first(store):
    store.put(key(1), kv(1))
    store.put(key(1), kv(1, fill=7.0))
    assert store.get(key(1), [1]).layers[0][0, 0, 0, 0] == 7.0
    assert store.stats() == StoreStats(entries=1, nbytes=SIZE, hits=1, writes=2)


def test_delete_says_whether_there_was_something(store):
    store.put(key(1), kv(1))
    assert store.delete(key(1))
    assert not store.delete(key(1))
    assert store.get(key(1), [1]) is None
    assert store.stats().nbytes == 0


def test_clear_leaves_nothing_but_the_counters(store):
    for i in range(3):
        store.put(key(i), kv(i))
    store.get(key(0), [0])
    store.clear()
    assert store.stats() == StoreStats(hits=1, writes=3)
    assert all(key(i) not in store for i in range(3))
    store.put(key(1), kv(1))
    assert key(1) in store


def test_contains_and_prefetch_count_as_neither_hit_nor_miss(store):
    store.put(key(1), kv(1))
    assert key(1) in store
    assert key(2) not in store
    store.prefetch([key(1), key(2)])
    store.prefetch(iter(()))
    assert store.stats() == StoreStats(entries=1, nbytes=SIZE, writes=1)


def test_stats_are_a_snapshot_that_goes_into_json(store):
    before = store.stats()
    store.put(key(1), kv(1))
    assert before == StoreStats()
    before.hits = 99
    assert store.stats().hits == 0
    assert store.stats().as_dict() == asdict(StoreStats(entries=1, nbytes=SIZE, writes=1))


def test_tenants_with_another_salt_do_not_meet(store):
    store.put(key(1, tenant="a"), kv(1))
    assert store.get(key(1, tenant="b"), [1]) is None
    assert store.get(key(1, tenant="a"), [1]) is not None


def test_leaving_the_context_closes_the_store_and_passes_failures_on():
    closed = []

    class Closing(MemoryStore):
        def close(self):
            closed.append(self)

    with Closing() as store:
        assert closed == []
    with pytest.raises(ZeroDivisionError), Closing() as other:
        raise ZeroDivisionError
    assert closed == [store, other]


def test_a_tier_must_implement_the_five_methods():
    with pytest.raises(TypeError, match=r"__contains__.*_entries.*_read.*_remove.*_write"):
        Tier()


@pytest.mark.parametrize("tier", LOCAL)
def test_eight_threads_at_once_leave_exact_counts_and_bytes(tier, tmp_path):
    budget, threads, rounds = 20 * SIZE, 8, 60
    start = threading.Barrier(threads)

    def work(number):
        start.wait()
        hits = 0
        for i in range(rounds):
            token = (7 * i + number) % 30
            store.put(key(token), kv(token, fill=float(token)))
            got = store.get(key((token + 1) % 30), [(token + 1) % 30])
            if got is not None:
                hits += 1
                assert got.layers[0][0, 0, 0, 0] == (token + 1) % 30
            if i % 7 == 0:
                store.delete(key(token))
            assert store.stats().nbytes <= budget
            key(token) in store  # noqa: B015 - it must not fail while others write
        return hits

    with open_tier(tier, tmp_path, max_bytes=budget, admit="all") as store, ThreadPoolExecutor(threads) as pool:
        hits = sum(pool.map(work, range(threads)))
        stats = store.stats()
    assert stats.writes + stats.refused == threads * rounds  # refused is what was deleted while it was being written
    assert (stats.hits, stats.misses) == (hits, threads * rounds - hits)
    assert stats.nbytes == stats.entries * SIZE <= budget
