"""Several tiers as one store: near ones first, far ones behind the request, and none of them in the others' way."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_redis import eventually
from support.llm import tiny_model
from support.store import SIZE, in_new_interpreter, key, kv, memory_store, open_tier, random_kv, same

from chunkcache.blend import Decoder
from chunkcache.errors import EntryLostError, InputError, StoreURLError
from chunkcache.library.encoder import Encoder
from chunkcache.library.library import ChunkLibrary
from chunkcache.store import DeviceStore, DiskStore, EntryFilter, MemoryStore, StoreStats, TieredStore, open_store


@pytest.fixture
def make(tmp_path):
    """Open `memory` over `disk`, or whatever tiers are given; closed afterwards."""
    opened = []

    def make(*tiers, memory=None, disk=None, **options):
        tiers = tiers or (memory_store(**(memory or {})), open_tier("disk", tmp_path, **(disk or {})))
        opened.append(TieredStore(tiers, **options))
        return (opened[-1], *tiers)

    yield make
    for store in opened:
        store.close()


def held(store, count=10):
    return [token for token in range(count) if key(token) in store]


def put_all(store, count, **options):
    for token in range(count):
        assert store.put(key(token), kv(token, fill=float(token), **options))
    store.flush()


def whole(kv):
    return kv.of_layers(tuple(kv.layers))


class Slow(MemoryStore):
    """A tier whose writes last until it is let go."""

    def __init__(self, **options):
        super().__init__(**options)
        self.begun, self.go = threading.Event(), threading.Event()

    def _write(self, entry, kv):
        self.begun.set()
        assert self.go.wait(20)
        return super()._write(entry, kv)


class SlowToRead(MemoryStore):
    """A tier whose reads last until it is let go."""

    def __init__(self, **options):
        super().__init__(**options)
        self.begun, self.go = threading.Event(), threading.Event()

    def _read(self, key):
        self.begun.set()
        assert self.go.wait(20)
        return super()._read(key)


class Broken(MemoryStore):
    """A tier in trouble, until it is well."""

    faults = (ConnectionError,)

    def __init__(self, **options):
        super().__init__(**options)
        self.well = False
        self.breaker.pause_s = self.write_breaker.pause_s = 0.0

    def _works(self):
        if not self.well:
            raise ConnectionError

    def _read(self, key):
        self._works()
        return super()._read(key)

    def _write(self, entry, kv):
        self._works()
        return super()._write(entry, kv)

    def _remove(self, key):
        self._works()
        return super()._remove(key)

    def _entries(self, where):
        self._works()
        return super()._entries(where)


# Looking up, and promotion


def test_the_nearest_tier_is_asked_first(make):
    store, memory, disk = make()
    memory.put(key(1), kv(1, fill=1.0))
    disk.put(key(1), kv(1, fill=2.0))
    assert store.get(key(1), [1]).layers[0][0, 0, 0, 0] == 1.0
    assert (memory.stats().hits, disk.stats().hits, disk.stats().misses) == (1, 0, 0)


def test_what_is_nowhere_is_one_miss(make):
    store, memory, disk = make()
    assert store.get(key(1), [1]) is None
    stats = store.stats()
    assert (stats.hits, stats.misses, memory.stats().misses, disk.stats().misses) == (0, 1, 1, 1)


def test_what_is_found_far_off_is_promoted_when_it_has_streamed_past(make):
    store, memory, disk = make()
    original = random_kv(layers=3)
    disk.put(key(*range(5)), original)
    got = store.get(key(*range(5)), range(5))
    assert got.shapes == original.shapes
    got.layers[0], got.layers[2]
    store.flush()
    assert key(*range(5)) not in memory
    assert len(got.layers[1:]) == 2
    store.flush()
    assert key(*range(5)) in memory
    assert same(memory.get(key(*range(5)), range(5)), original)
    assert same(got, original)  # again, now out of memory
    assert (store.stats().hits, store.stats().misses) == (2, 0)


def test_a_layer_is_read_once_and_then_kept(make):
    store, _, disk = make()
    disk.put(key(1), kv(1))
    got = store.get(key(1), [1])
    assert got.layers[0] is got.layers[0]
    assert got.layers[-1] is got.layers[1]
    with pytest.raises(IndexError):
        got.layers[2]


def test_all_nearer_tiers_get_what_the_farthest_had(make, tmp_path):
    store, device, memory, disk = make(DeviceStore(device="cpu"), MemoryStore(), open_tier("disk", tmp_path))
    disk.put(key(1), kv(1))
    whole(store.get(key(1), [1]))
    store.flush()
    assert key(1) in device
    assert key(1) in memory
    assert disk.stats().writes == 1


def test_a_layer_that_is_lost_on_the_way_is_a_miss_and_nothing_is_promoted(make):
    store, memory, disk = make()
    disk.put(key(1), kv(1))
    path = disk.path(key(1))
    path.write_bytes(path.read_bytes()[:-1])
    got = store.get(key(1), [1])
    with pytest.raises(EntryLostError):
        whole(got)
    store.flush()
    assert held(memory) == held(disk) == []
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.damaged) == (0, 1, 1)


def test_prefetch_brings_entries_near_and_counts_nothing(make):
    store, memory, disk = make()
    for token in range(3):
        disk.put(key(token), kv(token))
    store.prefetch([key(0), key(2), key(9)])
    store.flush()
    assert held(memory) == [0, 2]
    assert (store.stats().hits, store.stats().misses) == (0, 0)


def test_prefetch_returns_at_once_when_the_queue_is_full(make, tmp_path):
    slow, disk = Slow(), open_tier("disk", tmp_path)
    store, *_ = make(slow, disk, queue=2)
    for token in range(10):
        disk.put(key(token), kv(token))
    store.prefetch([key(0)])
    assert slow.begun.wait(20)
    store.prefetch(key(token) for token in range(1, 10))
    slow.go.set()
    store.flush()
    assert held(slow) == [0, 1, 2]


# Writing, and demotion


def test_through_writes_to_all_tiers(make):
    store, memory, disk = make()
    put_all(store, 3)
    assert held(memory) == held(disk) == [0, 1, 2]
    stats = store.stats()
    assert (stats.entries, stats.writes, stats.nbytes) == (3, 3, 6 * SIZE)


def test_evict_writes_further_down_what_has_to_leave(make):
    store, memory, disk = make(memory={"max_bytes": 2 * SIZE}, write="evict")
    put_all(store, 5)
    assert (held(memory), held(disk)) == ([3, 4], [0, 1, 2])
    for token in range(5):
        assert same(store.get(key(token), [token]), kv(token, fill=float(token)))
        store.flush()  # while it is on its way down it is nowhere
    assert store.stats().refused == 0


def test_evict_writes_down_the_rest_when_it_is_closed(make):
    store, _, disk = make(memory={"max_bytes": 2 * SIZE}, write="evict")
    put_all(store, 5)
    store.close()
    again = DiskStore(str(disk.folder))
    assert held(again) == [0, 1, 2, 3, 4]
    again.close()


def test_closing_copies_nothing_out_of_a_tier_that_lasts(make, tmp_path):
    first, second = open_tier("disk", tmp_path / "a"), open_tier("disk", tmp_path / "b")
    store, *_ = make(MemoryStore(), first, second, write="evict")
    put_all(store, 2)
    store.close()
    assert (held(first), held(second)) == ([0, 1], [])


def test_what_does_not_fit_the_nearest_tier_goes_further_down_at_once(make):
    for write in ("through", "evict"):
        store, memory, disk = make(memory={"max_bytes": SIZE}, write=write)
        assert store.put(key(1, 2), kv(1, 2))
        store.flush()
        assert key(1, 2) not in memory
        assert key(1, 2) in disk
        assert store.get(key(1, 2), [1, 2]) is not None
        assert (store.stats().writes, store.stats().refused) == (1, 0)


def test_what_no_tier_takes_is_refused(make):
    store, *_ = make(memory_store(SIZE))
    assert not store.put(key(1, 2), kv(1, 2))
    assert (store.stats().writes, store.stats().refused) == (0, 1)


def test_what_is_promoted_pushes_others_out_and_none_is_lost(make):
    store, memory, disk = make(memory={"max_bytes": 2 * SIZE}, write="evict")
    put_all(store, 6)
    for token in (0, 1, 5, 2, 0, 3):
        whole(store.get(key(token), [token]))
        store.flush()
        assert sorted({*held(memory), *held(disk)}) == list(range(6))
    assert held(memory) == [0, 3]


def test_a_queue_that_is_full_refuses_and_counts_and_does_not_wait_long(make, caplog):
    slow = Slow()
    store, memory, _ = make(MemoryStore(), slow, queue=2)
    for token in range(6):
        assert store.put(key(token), kv(token))
        assert slow.begun.wait(20)
    assert slow.stats().refused == 3
    slow.go.set()
    store.flush()
    assert held(memory) == held(slow) == [0, 1, 2, 3, 4, 5]  # `flush` has written what was refused
    assert store.stats().refused == 0  # each is held somewhere
    [record] = caplog.records
    assert "the queue of writes to it is full" in record.getMessage()
    assert store.put(key(7), kv(7))
    store.flush()
    assert key(7) in slow


def test_close_writes_everything_that_is_queued(tmp_path):
    disk = open_tier("disk", tmp_path)
    store = TieredStore([MemoryStore(), disk])
    for token in range(40):
        store.put(key(token), kv(token))
    store.close()
    with open_tier("disk", tmp_path) as again:
        assert held(again, 40) == list(range(40))


ENDING = """
    import gc
    from chunkcache.store import DiskStore, MemoryStore, TieredStore

    def filled(name):
        store = TieredStore([MemoryStore(), DiskStore(f"{sys.argv[1]}/{name}/store")], queue=100)
        for token in range(40):
            store.put(key(token), kv(token))
        return store

    dropped = filled("dropped")
    del dropped
    gc.collect()
    store = filled("exit")
    sys.exit(0)
"""


def test_the_end_of_the_process_loses_nothing_that_is_queued(tmp_path):
    in_new_interpreter(ENDING, tmp_path)
    for name in ("dropped", "exit"):
        with open_tier("disk", tmp_path / name) as disk:
            assert held(disk, 40) == list(range(40))
            assert disk.stats() == StoreStats(entries=40, nbytes=40 * SIZE)


def test_prefetches_do_not_take_the_places_of_writes(make):
    far = SlowToRead()
    store, memory, _ = make(MemoryStore(), far, queue=2)
    for token in range(10):
        far.put(key(token), kv(token))
    store.prefetch([key(0)])
    assert far.begun.wait(20)
    store.prefetch(key(token) for token in range(1, 10))
    assert [store.put(key(token), kv(token)) for token in (20, 21)] == [True, True]
    eventually(lambda: key(20) in far and key(21) in far)  # while the prefetch still waits for its entry
    assert far.stats().refused == 0
    assert not store.near_only()
    far.go.set()
    store.flush()
    assert key(0) in memory


def test_what_was_refused_a_place_is_named_and_written_by_flush(make):
    slow = Slow()
    store, *_ = make(MemoryStore(), slow, queue=1)
    for token in range(4):
        assert store.put(key(token), kv(token))
        assert slow.begun.wait(20)
    assert store.near_only() == {key(2), key(3)}
    store.delete(key(3))
    slow.go.set()
    store.flush()
    assert (held(slow), store.near_only()) == ([0, 1, 2], frozenset())


def test_what_was_refused_a_place_is_written_when_the_store_is_closed(tmp_path):
    slow, disk = Slow(), open_tier("disk", tmp_path)
    store = TieredStore([MemoryStore(), slow, disk], queue=1)
    for token in range(4):
        store.put(key(token), kv(token))
        assert slow.begun.wait(20)
    slow.go.set()
    store.close()
    with open_tier("disk", tmp_path) as again:
        assert held(again) == [0, 1, 2, 3]


# Deleting


def test_deleting_reaches_every_tier(make):
    store, memory, disk = make()
    put_all(store, 4, documents=("d",), tenant="t")
    assert store.delete(key(0))
    assert not store.delete(key(0))
    disk.delete(key(1))
    memory.delete(key(2))
    assert store.delete(key(1))
    assert store.delete(key(2))
    assert held(memory) == held(disk) == [3]
    put_all(store, 4, documents=("d",), tenant="u")
    assert store.purge(EntryFilter(tenant="t")) == 0
    assert store.purge(EntryFilter(document="d")) == 4
    assert held(store) == list(store.entries()) == []


def test_deleting_several_chunks_lists_each_tier_once(make, monkeypatch):
    store, memory, disk = make()
    for token in range(6):
        store.put(key(token), kv(token, chunks=(f"c{token}", "lead-in"), documents=("d",), tenant="t"))
    store.flush()
    listed = []
    for tier in (memory, disk):
        monkeypatch.setattr(tier, "_entries", counted(tier._entries, listed))
    assert store.purge(EntryFilter(tenant="t", chunks=frozenset({"c1", "c2", "c5", "gone"}))) == 3
    assert len(listed) == 2
    assert held(memory) == held(disk) == [0, 3, 4]
    assert store.purge(EntryFilter(chunks=frozenset())) == 0
    for tier in (memory, disk):
        assert not tier.put(key(1), kv(1, chunks=("c1",), tenant="t", created=1.0))
        assert tier.put(key(1), kv(1, chunks=("c1",), tenant="u", created=1.0))
    assert store.purge(EntryFilter(document="d", chunks=frozenset({"lead-in"}))) == 3
    store.flush()
    assert held(store) == [1]


def counted(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


def test_a_filter_names_one_chunk_or_several():
    with pytest.raises(InputError, match="chunk='a' and chunks are both set: put all names into chunks"):
        EntryFilter(chunk="a", chunks=frozenset("b"))


def test_what_is_deleted_while_it_waits_to_be_written_does_not_come_back(make):
    slow = Slow()
    store, memory, _ = make(MemoryStore(), slow)
    store.put(key(0), kv(0))  # is being written
    assert slow.begun.wait(20)
    for token in range(1, 6):
        store.put(key(token), kv(token, documents=(f"d{token}",), tenant="t"))
    assert store.delete(key(0))
    assert store.delete(key(1))
    assert store.purge(EntryFilter(document="d2")) == 1
    assert store.purge(EntryFilter(tenant="t", document="d3")) == 1
    slow.go.set()
    store.flush()
    assert held(memory) == held(slow) == [4, 5]
    assert slow.stats().refused == 4
    store.put(key(1), kv(1))  # computed anew
    store.flush()
    assert held(slow) == [1, 4, 5]


def test_what_is_deleted_while_it_is_read_is_not_promoted(make):
    store, memory, disk = make()
    disk.put(key(1), kv(1, created=time.time()))
    got = store.get(key(1), [1])
    store.delete(key(1))
    assert same(got, kv(1))  # a request that has begun may end
    store.flush()
    assert held(store) == []
    assert memory.stats().refused == 1


def test_what_is_deleted_while_it_is_demoted_does_not_come_back(make):
    slow = Slow()
    store, memory, _ = make(memory_store(SIZE), slow, write="evict")
    store.put(key(0), kv(0))
    store.put(key(1), kv(1))
    assert slow.begun.wait(20)
    assert not store.delete(key(0))
    slow.go.set()
    store.flush()
    assert (held(memory), held(slow)) == ([1], [])


def test_clearing_leaves_nothing_anywhere(make):
    store, memory, disk = make()
    put_all(store, 3)
    store.clear()
    assert held(memory) == held(disk) == []
    assert list(disk.folder.glob("??/*")) == []
    put_all(store, 1)
    assert held(store) == [0]


def test_pins_and_credit_reach_every_tier(make):
    store, memory, disk = make(memory={"max_bytes": 2 * SIZE, "evict": "cost"}, disk={"max_bytes": 3 * SIZE})
    put_all(store, 1)
    store.pin(key(0))
    store.credit(key(0), 3.0)
    for tier in (memory, disk):
        [entry] = tier.entries()
        assert (entry.pinned, entry.uses) == (True, 3.0)
    for token in range(1, 6):
        store.put(key(token), kv(token))
    store.flush()
    assert (held(memory), held(disk)) == ([0, 5], [0, 4, 5])
    store.pin(key(0), False)
    assert not any(entry.pinned for entry in store.entries())


# Trouble


def test_a_tier_in_trouble_leaves_the_others_to_serve(make, tmp_path, caplog):
    disk = open_tier("disk", tmp_path)
    store, _, broken, _ = make(memory_store(SIZE), Broken(), disk)
    put_all(store, 3)
    assert held(disk) == [0, 1, 2]
    for _ in range(3):
        assert same(store.get(key(0), [0]), kv(0, fill=0.0))
    assert store.get(key(9), [9]) is None
    assert store.delete(key(1))
    assert {entry.key for entry in store.entries()} == {key(0), key(2)}
    stats = store.stats()
    assert stats.errors > 0
    assert (stats.misses, stats.damaged) == (1, 0)
    store.prefetch([key(0), key(1)])
    store.flush()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        warnings
        == ["Broken is in trouble (ConnectionError): requests go on without it, and it is tried again every 0 s"] * 2
    )
    broken.well = True
    put_all(store, 3)
    assert held(broken) == [0, 1, 2]


def test_a_nearest_tier_in_trouble_is_passed_over(make, tmp_path):
    disk = open_tier("disk", tmp_path)
    store, *_ = make(Broken(), disk)
    put_all(store, 2)
    assert same(store.get(key(1), [1]), kv(1, fill=1.0))
    assert (store.stats().hits, store.stats().misses, store.stats().writes) == (1, 0, 2)


def test_while_the_breaker_is_open_a_tier_is_left_alone(make):
    broken = Broken()
    store, *_ = make(MemoryStore(), broken)
    broken.breaker.pause_s = broken.write_breaker.pause_s = 60.0
    for token in range(10):
        store.put(key(token), kv(token))
        assert store.get(key(token + 100), [token + 100]) is None
    store.flush()
    assert broken.stats().errors <= 3
    assert broken.stats().skipped > 15


# What it is made of


def test_the_tiers_have_names_of_their_own(make, tmp_path):
    store, memory, one, two = make(MemoryStore(), *(open_tier("disk", tmp_path / name) for name in "ab"))
    assert store.tiers() == {"memory": memory, "disk": one, "disk2": two}
    assert MemoryStore().tiers().keys() == {"memory"}


def test_wrong_tiers_and_options_are_refused(make):
    with pytest.raises(StoreURLError, match="needs at least one tier"):
        TieredStore([])
    with pytest.raises(StoreURLError, match="write='back' is neither 'through' nor 'evict'"):
        TieredStore([MemoryStore()], write="back")
    with pytest.raises(StoreURLError, match="takes single tiers, not TieredStore"):
        TieredStore([MemoryStore(), make()[0]])
    with pytest.raises(StoreURLError, match="no store has the URL 'tiered:memory://'"):
        open_store("tiered:memory://|tiered:memory://")


def test_a_single_tier_in_it_is_as_good_as_alone(make):
    store, memory = make(MemoryStore())
    put_all(store, 2)
    assert held(store) == [0, 1]
    assert store.stats().as_dict() == {**memory.stats().as_dict(), "max_bytes": None}


def test_eight_threads_leave_exact_counts(make, tmp_path):
    store, memory, disk = make(memory={"max_bytes": 8 * SIZE}, disk={"max_bytes": 20 * SIZE})
    start, turns = threading.Barrier(8), 40

    def work(number):
        start.wait()
        hits = 0
        for turn in range(turns):
            token = (7 * turn + number) % 25
            store.put(key(token), kv(token, fill=float(token)))
            wanted = (token + 3) % 25
            got = store.get(key(wanted), [wanted])
            if got is not None:
                assert same(got, kv(wanted, fill=float(wanted)))
                hits += 1
            if turn % 9 == 0:
                store.delete(key(token))
        return hits

    with ThreadPoolExecutor(8) as pool:
        hits = sum(pool.map(work, range(8)))
    store.flush()
    stats = store.stats()
    assert (stats.hits, stats.misses) == (hits, 8 * turns - hits)
    assert stats.writes + stats.refused == 8 * turns
    assert (stats.errors, stats.damaged, stats.mismatches) == (0, 0, 0)
    assert memory.stats().nbytes <= 8 * SIZE
    assert disk.stats().nbytes <= 20 * SIZE


# Above it: every chunk is computed once


def test_eight_threads_that_miss_the_same_chunks_compute_each_once(make, monkeypatch):
    store, *_ = make()
    library = ChunkLibrary(Decoder(tiny_model()), store, "fingerprint", "")
    prefix, chunks = tuple(range(10, 22)), [tuple(range(30 + 9 * n, 39 + 9 * n)) for n in range(6)]
    computed, encode = Counter(), Encoder.encode

    def counted(self, context, wanted, record=False):
        computed.update(wanted)
        return encode(self, context, wanted, record)

    monkeypatch.setattr(Encoder, "encode", counted)
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        wanted = chunks[number % 3 :] + chunks[: number % 3]
        computed = library.compute([library.ref(chunk, prefix) for chunk in wanted])
        return {ref.token_ids: kv for ref, kv in computed.items()}

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert computed == Counter({prefix: 1, **dict.fromkeys(chunks, 1)})
    for result in results:
        assert set(result) == set(chunks)
        for chunk in chunks:
            assert all(map(torch.equal, result[chunk].layers, results[0][chunk].layers))
