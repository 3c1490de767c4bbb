"""The connector that gives LMCache a chunkcache store, called as LMCache calls it; and the tier without LMCache."""

from __future__ import annotations

import hashlib
import os
import select
import sys
from dataclasses import replace

import pytest

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey, hashed_label
from chunkcache.store import EntryFilter, MemoryStore, open_store
from chunkcache.store.lmcache_adapter import ChunkcacheConnector

NAMES = ["some/model@01000100@0@" + "ab" * 32, "some/model@01000100@0@" + "cd" * 32 + "@alice"]


@pytest.fixture(params=["memory", "disk", "tiered"])
def url(request, tmp_path):
    disk = f"disk://{tmp_path}?sync=no"
    return {"memory": "memory://", "disk": disk, "tiered": f"tiered:memory://|{disk}"}[request.param]


@pytest.fixture
def connector(url):
    opened = ChunkcacheConnector(store=url)
    yield opened
    opened.close()


def done(connector, number):
    """Return what LMCache's thread would find out about a batch."""
    poll = select.poll()
    poll.register(connector.event_fd(), select.POLLIN)
    assert poll.poll(5000), "no completion was announced"
    [(got, *rest)] = connector.drain_completions()
    assert got == number
    assert connector.drain_completions() == []
    assert not poll.poll(0)
    return tuple(rest)


def view(data):
    return memoryview(bytearray(data))


def put(connector, names, values):
    return done(connector, connector.submit_batch_set(names, [view(value) for value in values]))


def get(connector, names, sizes):
    buffers = [view(bytes(size)) for size in sizes]
    ok, error, found = done(connector, connector.submit_batch_get(names, buffers))
    return ok, error, found, [bytes(buffer) for buffer in buffers]


def test_what_was_set_is_got(connector):
    assert put(connector, NAMES, [b"first" * 99, b"second"]) == (True, "", [True, True])
    assert get(connector, [*NAMES, "other@0@0@ef"], [495, 6, 3]) == (
        True,
        "",
        [True, True, False],
        [b"first" * 99, b"second", bytes(3)],
    )
    assert done(connector, connector.submit_batch_exists(["other@0@0@ef", *NAMES])) == (True, "", [False, True, True])


def test_values_are_read_when_they_are_set_not_when_they_are_written(connector):
    value = bytearray(b"mine")
    done(connector, connector.submit_batch_set(NAMES[:1], [memoryview(value)]))
    value[:] = b"next"
    assert get(connector, NAMES[:1], [4])[3] == [b"mine"]


def test_a_second_value_replaces_the_first(connector):
    put(connector, NAMES[:1], [b"one"])
    put(connector, NAMES[:1], [b"other"])
    assert get(connector, NAMES[:1], [5])[2:] == ([True], [b"other"])


def test_a_value_of_another_size_is_not_found_and_nothing_is_written(connector):
    put(connector, NAMES[:1], [b"four"])
    for size in (3, 5):
        assert get(connector, NAMES[:1], [size])[2:] == ([False], [bytes(size)])


def test_deleting_says_what_was_there(connector):
    put(connector, NAMES, [b"a", b"b"])
    assert done(connector, connector.submit_batch_delete(["x@0@0@00", NAMES[1]])) == (True, "", [False, True])
    assert done(connector, connector.submit_batch_exists(NAMES)) == (True, "", [True, False])
    assert put(connector, NAMES[1:], [b"b"])[0]
    assert get(connector, NAMES[1:], [1])[2:] == ([True], [b"b"])


def test_entries_carry_the_tenant_and_show_no_name(connector):
    put(connector, NAMES, [b"a", b"b"])
    entries = list(connector.store.entries())
    assert {e.tenant for e in entries} == {"", hashed_label("tenant", "alice")}
    assert {e.model for e in entries} == {hashed_label("lmcache", "some/model")}
    assert "some/model" not in repr(entries)
    assert "alice" not in repr(entries)
    assert connector.store.purge(EntryFilter(tenant=hashed_label("tenant", "alice"))) == 1
    assert done(connector, connector.submit_batch_exists(NAMES)) == (True, "", [True, False])


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_bytes_stay_as_they_are_in_a_store_that_loses_precision(tmp_path, codec):
    connector = ChunkcacheConnector(store=f"disk://{tmp_path}?sync=no&codec={codec}&compress=zstd")
    value = os.urandom(4097)
    put(connector, NAMES[:1], [value])
    assert get(connector, NAMES[:1], [4097])[3] == [value]
    connector.close()


def test_damaged_bytes_are_never_given_to_lmcache(tmp_path):
    connector = ChunkcacheConnector(store=f"disk://{tmp_path}?sync=no")
    put(connector, NAMES[:1], [b"a" * 4096])
    [path] = tmp_path.glob("??/*.ckv")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert get(connector, NAMES[:1], [4096])[2:] == ([False], [bytes(4096)])
    assert connector.store.stats().damaged == 1
    connector.close()


def test_a_batch_that_is_not_stored_whole_is_reported_so():
    connector = ChunkcacheConnector(store="memory://?max_bytes=8")
    assert put(connector, NAMES, [b"small", b"much too large"]) == (False, "the store refused some of it", None)
    connector.close()


def test_a_failure_completes_its_batch():
    class Broken(MemoryStore):
        def __contains__(self, key):
            raise ZeroDivisionError

    connector = ChunkcacheConnector(store="memory://")
    connector.store = Broken()
    assert done(connector, connector.submit_batch_exists(NAMES)) == (False, "ZeroDivisionError", None)
    connector.close()


def test_many_batches_complete_once_each(connector):
    numbers = [connector.submit_batch_set([f"m@0@0@{i:02x}"], [view(bytes([i]))]) for i in range(50)]
    seen = []
    poll = select.poll()
    poll.register(connector.event_fd(), select.POLLIN)
    while len(seen) < 50 and poll.poll(5000):
        seen += connector.drain_completions()
    assert sorted(number for number, *_ in seen) == numbers
    assert all(ok for _, ok, _, _ in seen)
    assert get(connector, [f"m@0@0@{i:02x}" for i in range(50)], [1] * 50)[3] == [bytes([i]) for i in range(50)]


def test_the_store_may_be_named_by_an_environment_variable(monkeypatch):
    monkeypatch.setenv("KV_STORE", "memory://?max_bytes=1MiB")
    connector = ChunkcacheConnector(store_env="KV_STORE")
    assert connector.store.stats().max_bytes == 2**20
    connector.close()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, 'adapter_params takes either "store"'),
        ({"store": "memory://", "store_env": "X"}, 'adapter_params takes either "store"'),
        ({"store_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"store": "nowhere://"}, "no store has the URL"),
    ],
)
def test_a_store_that_cannot_be_found_is_named(params, message):
    with pytest.raises(StoreURLError, match=message):
        ChunkcacheConnector(**params)


def test_keys_are_hashes_of_their_own(connector):
    put(connector, NAMES[:1], [b"a"])
    [entry] = connector.store.entries()
    assert entry.key == ChunkKey(hashlib.sha256(b"lmcache\0" + NAMES[0].encode()).hexdigest())
    assert replace(entry, key=ChunkKey("")).tokens == 0


def test_without_lmcache_the_tier_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmcache", None)
    for name in [name for name in sys.modules if name.startswith("lmcache.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(StoreURLError, match=r"pip install chunkcache\[lmcache\]"):
        open_store("lmcache://")


@pytest.mark.parametrize(
    "url",
    ["lmcache://host:port", "lmcache://host:99999", "lmcache://host/0", "lmcache://:1", "lmcache://?timeout=0",
     "lmcache://?l2=x", "lmcache://#x"],
)  # fmt: skip
def test_what_is_no_address_of_lmcache_is_refused(url):
    with pytest.raises(StoreURLError):
        open_store(url)


def test_a_password_is_not_shown():
    with pytest.raises(StoreURLError) as caught:
        open_store("lmcache://me:secret@host:port")
    assert "secret" not in str(caught.value)
