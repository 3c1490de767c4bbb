"""The Redis tier, on real servers: whole entries or none, one wait at most, and nothing said that should not be."""

from __future__ import annotations

import json
import logging
import pkgutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from types import SimpleNamespace

import helpers_redis
import pytest
import redis
import torch
from helpers_redis import PEM, SLOTS, cluster, eventually, free_port, replicated, sentinel, servers, tls_in_front_of
from redis.crc import key_slot
from support.store import SIZE, key, kv, memory_store, random_kv, same, with_options

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKV, hashed_label
from chunkcache.kv.quantised import dense
from chunkcache.store import TIERS, EntryFilter, RedisStore, StoreStats, TieredStore, open_store
from chunkcache.store import redis as tier
from chunkcache.store.redis_link import Link, linked

PATIENT = 10.0  # seconds: a busy machine is no failure
server, shared_server, victim = helpers_redis.server, helpers_redis.shared_server, helpers_redis.victim


@pytest.fixture
def open_at():
    """Open stores that are closed after the test."""
    opened = []

    def open_one(url, timeout=PATIENT, pause_s=60.0, **options):
        store = with_options(RedisStore, url=url, timeout=timeout, **options)
        store.breaker.pause_s = store.write_breaker.pause_s = pause_s
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(server, open_at):
    return open_at(server.url)


def counted(store):
    """Return the counters that are not 0; `stats` would ask the server."""
    return {name: number for name, number in asdict(store._stats).items() if number}


def names(server):
    return sorted(name.decode() for name in server.client.scan_iter(count=1000))


def part(server, key, layer="0"):
    """Return the name of the value that holds a layer."""
    [name] = [
        name for name in names(server) if name.startswith(f"chunkcache:{{{key.digest}}}:") and name.endswith(layer)
    ]
    return name


def large_kv(mib, layers=3):
    tokens = mib * 2**20 // (2 * 4 * 64)
    return ChunkKV.of(range(tokens), 3, [torch.randn(2, 1, tokens, 64) for _ in range(layers)])


# What is put is got, and shared


def test_what_was_put_is_got_by_every_process(server, open_at):
    made = random_kv()
    assert open_at(server.url).put(key(1), made)
    store = open_at(server.url)
    assert same(store.get(key(1), range(5)), made)
    assert key(1) in store
    assert key(2) not in store
    assert store.stats() == StoreStats(entries=1, nbytes=made.nbytes, hits=1)


@pytest.mark.parametrize(("mib", "layers"), [(1, 7), (2, 3), (5, 2)])
def test_large_layers_come_whole_in_any_order_and_any_number_of_times(server, store, mib, layers):
    made = large_kv(mib, layers)
    assert store.put(key(1), made)
    got = store.get(key(1), made.token_ids)
    for index in [*range(layers), *reversed(range(layers)), 1, 1]:
        layer = got.layers[index]
        assert torch.equal(layer, made.layers[index])
        layer += 1  # it is the reader's own
    assert same(got, made)
    assert counted(store) == {"hits": 1, "writes": 1}


@pytest.mark.parametrize("options", [{"codec": "int8"}, {"compress": "zstd"}, {"secret": "s"}, {"codec": "bf16"}])
def test_entries_are_kept_as_the_options_say(server, open_at, options):
    store = open_at(server.url, **options)
    made = random_kv(tokens=40)
    assert store.put(key(1), made)
    got = store.get(key(1), range(40))
    assert len(got.layers) == 3
    for layer, expected in zip(got.layers, made.layers, strict=True):
        assert torch.allclose(dense(layer).float(), expected, atol=0.1)


def test_an_entry_sealed_with_another_secret_is_not_used_and_not_deleted(server, open_at):
    open_at(server.url, secret="one").put(key(1), kv(1))
    store = open_at(server.url, secret="two")
    assert store.get(key(1), [1]) is None
    assert list(store.entries()) == []
    assert counted(store) == {"misses": 1, "mismatches": 2}
    assert open_at(server.url, secret="one").get(key(1), [1]) is not None


def test_a_second_put_replaces_the_first(server, store):
    store.put(key(1), kv(1))
    store.put(key(1), kv(1, fill=7.0))
    assert store.get(key(1), [1]).layers[0][0, 0, 0, 0] == 7.0
    assert store.stats() == StoreStats(entries=1, nbytes=SIZE, hits=1, writes=2)


def test_who_is_reading_what_is_replaced_gets_the_old_entry_whole(server, open_at):
    store, other = open_at(server.url), open_at(server.url)
    made = large_kv(4)
    store.put(key(1), made)
    reading = store.get(key(1), made.token_ids)
    assert torch.equal(reading.layers[0], made.layers[0])
    new = replace(made, layers=tuple(layer + 1 for layer in made.layers))
    assert other.put(key(1), new)
    assert same(reading, made)
    assert same(store.get(key(1), made.token_ids), new)


def test_what_was_replaced_goes_soon_and_what_is_held_stays(server, store):
    store.put(key(1), kv(1))
    old = part(server, key(1))
    store.put(key(1), kv(1))
    lives = {name: server.client.ttl(name) for name in names(server)}
    assert 0 < lives.pop(old) <= tier.GRACE_S
    kept = [name for name, life in lives.items() if life == -1]
    assert len(kept) == 3  # the header and two layers


def test_two_servers_of_one_name_space_see_nothing_of_another(server, open_at):
    a, b = open_at(server.url, namespace="a"), open_at(server.url, namespace="a.b:c-1_")
    a.put(key(1), kv(1))
    assert key(1) not in b
    b.clear()
    assert key(1) in a
    assert all(name.startswith("a:{") for name in names(server) if name != "a.b:c-1_:tombs")


def test_databases_are_apart(server, open_at):
    open_at(f"{server.url}/3").put(key(1), kv(1))
    assert key(1) not in open_at(server.url)
    assert key(1) in open_at(f"{server.url}/3")


def test_a_unix_socket(tmp_path, open_at):
    path = tmp_path / "a b.sock"
    with servers(1, unixsocket=f'"{path}"'):
        store = open_at(f"redis+unix://{tmp_path}/a%20b.sock")
        store.put(key(1), kv(1))
        assert store.get(key(1), [1]) is not None


def test_eight_threads_at_once(server, store):
    def work(number):
        for i in range(20):
            token = (7 * i + number) % 10
            assert store.put(key(token), kv(token, fill=float(token)))
            got = store.get(key((token + 1) % 10), [(token + 1) % 10])
            if got is not None:
                assert got.layers[1][0, 0, 0, 0] == (token + 1) % 10 + 1
            if i % 7 == 0:
                store.delete(key(-1 - token))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.stats().entries == 10
    assert counted(store)["writes"] == 160
    assert "damaged" not in counted(store)
    assert "errors" not in counted(store)


# Time to live, listing, deletion


def test_every_value_lives_as_long_as_the_entry(server, open_at):
    store = open_at(server.url, ttl=100.0)
    store.put(key(1), kv(1))
    assert all(90 < server.client.ttl(name) <= 100 for name in names(server))
    assert len(names(server)) == 3
    [entry] = store.entries()
    assert 90 < entry.expires - time.time() <= 100


def test_an_expired_entry_is_a_miss(server, open_at):
    store = open_at(server.url, ttl=0.05)
    store.put(key(1), kv(1))
    eventually(lambda: key(1) not in store)
    assert store.get(key(1), [1]) is None
    assert names(server) == []


def calls_of(server, command):
    return server.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


def test_deleting_several_chunks_reads_each_header_once(server, store):
    memory = memory_store()
    tiered = TieredStore([memory, store])
    for token in range(8):
        tiered.put(key(token), kv(token, chunks=(f"c{token}",), tenant="t"))
    tiered.flush()
    before = calls_of(server, "getrange")
    assert tiered.purge(EntryFilter(tenant="t", chunks=frozenset({"c1", "c2", "c3"}))) == 3
    assert calls_of(server, "getrange") - before == 8 + 3  # and of those that go the first bytes again
    assert sorted(entry.chunks for entry in store.entries()) == [("c0",), ("c4",), ("c5",), ("c6",), ("c7",)]


def test_deletions_are_recorded_in_the_form_that_every_version_reads(server, store, open_at):
    store.purge(EntryFilter(tenant="t", chunks=frozenset("ab")))
    recorded = {json.dumps({"model": None, "tenant": "t", "document": None, "chunk": name}) for name in "ab"}
    assert {text.decode() for text in server.client.zrange("chunkcache:tombs", 0, -1)} == recorded
    other = open_at(server.url)
    assert not other.put(key(1), kv(1, tenant="t", chunks=("x", "b"), created=1.0))
    assert other.put(key(1), kv(1, tenant="u", chunks=("b",), created=1.0))


def test_listing_names_what_is_held_and_what_it_comes_from(server, store):
    for token in range(70):  # more than are fetched at once
        store.put(key(token), kv(token, tenant=f"t{token % 2}"))
    server.client.set("chunkcache:{no-digest}:h", b"of somebody else")
    server.client.set("other", b"")
    assert {entry.key for entry in store.entries()} == {key(token) for token in range(70)}
    assert {entry.key for entry in store.entries(EntryFilter(tenant="t1"))} == {
        key(token) for token in range(1, 70, 2)
    }
    stats = store.stats()
    assert (stats.entries, stats.nbytes, stats.damaged) == (70, 70 * SIZE, 0)


def test_delete_leaves_no_value_and_says_whether_there_was_one(server, store):
    store.put(key(1), kv(1))
    assert store.delete(key(1))
    assert not store.delete(key(1))
    assert names(server) == [f"chunkcache:{{{key(1).digest}}}:t"]
    assert store.get(key(1), [1]) is None


def test_purge_takes_what_agrees_and_no_more(server, store):
    for token in range(6):
        store.put(key(token), kv(token, documents=(hashed_label("document", f"d{token % 3}"),)))
    assert store.purge(EntryFilter(document=hashed_label("document", "d1"))) == 2
    assert {entry.key for entry in store.entries()} == {key(token) for token in (0, 2, 3, 5)}
    store.clear()
    assert store.stats().entries == 0
    assert names(server) == ["chunkcache:tombs"]


def test_what_another_process_deleted_is_not_stored_again_from_before(server, open_at):
    deleting, store = open_at(server.url), open_at(server.url)
    before, made = time.time(), kv(1)
    deleting.delete(key(1))
    assert not store.put(key(1), kv(1, created=before))
    assert counted(store) == {"refused": 1}
    assert key(1) not in store
    assert store.put(key(1), replace(made, origin=replace(made.origin, created=time.time())))


def test_what_another_process_purged_is_not_stored_again_from_before(server, open_at):
    deleting, store = open_at(server.url), open_at(server.url)
    before = time.time()
    deleting.purge(EntryFilter(tenant="t"))
    assert not store.put(key(1), kv(1, created=before, tenant="t"))
    assert store.put(key(2), kv(2, created=before, tenant="u"))
    assert store.put(key(1), kv(1, created=time.time(), tenant="t"))


def test_a_deletion_while_an_entry_is_being_written_wins(server, open_at, monkeypatch):
    deleting, store = open_at(server.url), open_at(server.url)
    commit = store._commit

    def late(*args):
        deleting.delete(key(1))
        commit(*args)

    monkeypatch.setattr(store, "_commit", late)
    assert not store.put(key(1), kv(1))
    assert key(1) not in store
    assert len(names(server)) == 1


def test_a_deletion_that_cannot_be_read_covers_everything(server, store):
    server.client.set(f"chunkcache:{{{key(1).digest}}}:t", b"yesterday")
    assert not store.put(key(1), kv(1))
    assert store.put(key(2), kv(2))
    server.client.zadd("chunkcache:tombs", {b'{"hue": 1}': time.time() + 100})
    assert not store.put(key(2), kv(2))


def test_deletions_are_forgotten_in_the_end(server, store):
    store.delete(key(1))
    store.purge(EntryFilter(tenant="t"))
    assert all(0 < server.client.ttl(name) <= tier.TOMB_S for name in names(server))
    server.client.zadd(
        "chunkcache:tombs", {json.dumps(asdict(EntryFilter(tenant="u"))): time.time() - 2 * tier.TOMB_S}
    )
    store.purge(EntryFilter(tenant="v"))
    assert server.client.zcard("chunkcache:tombs") == 2


# Damage


def test_a_writer_that_dies_leaves_nothing_that_stays(server, store, monkeypatch):
    def die(*args):
        raise redis.ConnectionError

    monkeypatch.setattr(store, "_commit", die)
    assert not store.put(key(1), kv(1))
    assert key(1) not in store
    assert all(0 < server.client.ttl(name) <= tier.UPLOAD_S for name in names(server))
    assert len(names(server)) == 2


def evict(client, name):
    client.delete(name)


def truncate(client, name):
    client.set(name, client.get(name)[:-1])


def lengthen(client, name):
    client.append(name, b"x" * 100)


def flip(client, name):
    client.setrange(name, 3, bytes([client.getrange(name, 3, 3)[0] ^ 1]))


def replace_by_a_list(client, name):
    client.delete(name)
    client.rpush(name, b"1")


def overwrite(client, name):
    client.set(name, b"of somebody else")


@pytest.mark.parametrize("harm", [evict, truncate, lengthen, flip, replace_by_a_list, overwrite])
def test_a_damaged_layer_is_lost_counted_and_deleted(server, store, harm, caplog):
    store.put(key(1), kv(1))
    harm(server.client, part(server, key(1), ":1"))
    got = store.get(key(1), [1])
    with pytest.raises(EntryLostError):
        list(got.layers)
    assert counted(store) == {"writes": 1, "damaged": 1, "misses": 1}
    assert names(server) == []
    assert len(caplog.records) == 1
    assert store.put(key(1), kv(1))
    assert same(store.get(key(1), [1]), kv(1))


@pytest.mark.parametrize("harm", [truncate, lengthen, flip, replace_by_a_list, overwrite])
def test_a_damaged_header_is_a_miss_counted_and_deleted(server, store, harm, caplog):
    store.put(key(1), kv(1))
    harm(server.client, f"chunkcache:{{{key(1).digest}}}:h")
    assert store.get(key(1), [1]) is None
    assert counted(store) == {"writes": 1, "damaged": 1, "misses": 1}
    assert key(1) not in store
    assert len(caplog.records) == 1
    assert store.put(key(1), kv(1))
    assert same(store.get(key(1), [1]), kv(1))


@pytest.mark.parametrize("harm", [truncate, replace_by_a_list, overwrite])
def test_a_listing_leaves_damaged_headers_out_and_deletes_them(server, store, harm):
    store.put(key(1), kv(1))
    store.put(key(2), kv(2))
    harm(server.client, f"chunkcache:{{{key(1).digest}}}:h")
    assert [entry.key for entry in store.entries()] == [key(2)]
    assert store.stats() == StoreStats(entries=1, nbytes=SIZE, writes=2, damaged=1)


def test_a_header_that_points_to_other_values_is_damaged(server, store):
    store.put(key(1), kv(1))
    store.put(key(2), kv(2))
    one, two = (f"chunkcache:{{{key(i).digest}}}:h" for i in (1, 2))
    server.client.set(one, server.client.get(two))
    assert store.get(key(1), [1]) is None
    name = f"chunkcache:{{{key(2).digest}}}:h"
    server.client.setrange(name, 16, (1).to_bytes(4, "little"))  # the number of layers
    with pytest.raises(EntryLostError):
        store.get(key(2), [2]).layers[0]
    assert counted(store)["damaged"] == 2


def test_a_value_that_is_far_too_long_is_not_waited_for(server, store):
    store.put(key(1), kv(1))
    name = part(server, key(1), ":0")
    server.client.setrange(name, 2**24, b"x")
    with pytest.raises(EntryLostError):
        store.get(key(1), [1]).layers[0]
    assert counted(store)["damaged"] == 1


# Trouble: one wait, one line, and back again


def kill(server):
    server.kill()


def hang(server):
    server.hang()


def pause(server):
    server.client.execute_command("CLIENT", "PAUSE", 1500, "ALL")


def lock_out(server):
    server.config(requirepass="not-told")
    server.client.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "yes")


def start(server):
    server.start()


def resume(server):
    server.resume()


def wait(server):
    """What was paused goes on by itself."""


def let_in(server):
    server.config(requirepass="")


DOWN = [(kill, start), (hang, resume), (pause, wait), (lock_out, let_in)]


@pytest.mark.parametrize(("fail", "heal"), DOWN, ids=lambda f: f.__name__)
def test_a_server_in_trouble_costs_one_try_and_one_line(victim, open_at, fail, heal, caplog):
    store = open_at(victim.url, timeout=0.2)
    assert store.put(key(1), kv(1))
    fail(victim)
    assert store.get(key(1), [1]) is None
    assert counted(store) == {"writes": 1, "misses": 1, "errors": 1}
    assert store.breaker.is_open
    for _ in range(3):  # none of these reaches the network
        assert store.get(key(1), [1]) is None
        assert not store.put(key(2), kv(2))
        assert not store.delete(key(1))
        assert key(1) not in store
        assert list(store.entries()) == []
    assert counted(store) == {"writes": 1, "misses": 4, "errors": 1, "skipped": 18}
    [record] = caplog.records
    assert "RedisStore is in trouble" in record.getMessage()
    assert record.levelno == logging.WARNING
    heal(victim)


@pytest.mark.parametrize(("fail", "heal"), DOWN, ids=lambda f: f.__name__)
def test_a_server_that_is_back_is_used_again(victim, open_at, fail, heal):
    store = open_at(victim.url, timeout=0.2, pause_s=0.01)
    assert store.put(key(1), kv(1))
    fail(victim)
    assert not store.put(key(2), kv(2))
    heal(victim)
    assert eventually(lambda: store.put(key(2), kv(2)))
    assert same(eventually(lambda: store.get(key(2), [2])), kv(2))
    assert not store.breaker.is_open


@pytest.mark.parametrize(("fail", "heal"), DOWN, ids=lambda f: f.__name__)
def test_trouble_between_two_layers_loses_the_entry_for_this_request_only(victim, open_at, fail, heal, caplog):
    made = large_kv(4)
    store = open_at(victim.url, timeout=0.4)
    assert store.put(key(1), made)
    got = store.get(key(1), made.token_ids)
    assert torch.equal(got.layers[0], made.layers[0])
    fail(victim)
    for layer in (1, 2):
        with pytest.raises(EntryLostError):
            got.layers[layer]
    assert store.get(key(1), made.token_ids) is None
    assert len(caplog.records) == 1
    assert counted(store) == {"writes": 1, "misses": 2, "errors": 1, "skipped": 1}
    heal(victim)


def full(server):
    server.config(maxmemory="1", maxmemory_policy="noeviction")


def read_only(server):
    server.client.replicaof("127.0.0.1", free_port())


def without_replicas(server):
    server.config(min_replicas_to_write=1)


def roomy(server):
    server.config(maxmemory="0")


def master(server):
    server.client.replicaof("NO", "ONE")


def with_replicas(server):
    server.config(min_replicas_to_write=0)


UNWRITABLE = [(full, roomy), (read_only, master), (without_replicas, with_replicas)]


@pytest.mark.parametrize(("fail", "heal"), UNWRITABLE, ids=lambda f: f.__name__)
def test_from_a_server_that_takes_nothing_one_can_still_read(victim, open_at, fail, heal, caplog):
    store = open_at(victim.url)
    assert store.put(key(1), kv(1))
    fail(victim)
    large = large_kv(2)
    for _ in range(3):
        assert not store.put(key(2), large)
    assert counted(store) == {"writes": 1, "errors": 1, "skipped": 2}
    assert same(store.get(key(1), [1]), kv(1))
    assert len(caplog.records) == 1
    heal(victim)
    store.write_breaker.succeeded()
    assert store.put(key(2), large)
    assert same(store.get(key(2), large.token_ids), large)


def test_the_budget_is_the_servers_and_what_it_evicts_is_lost(victim, open_at):
    store = open_at(victim.url)
    victim.config(maxmemory="20mb", maxmemory_policy="allkeys-lru")
    made = large_kv(1, layers=4)
    for token in range(12):
        assert store.put(key(token), made)
    whole = 0
    for token in range(12):
        got = store.get(key(token), made.token_ids)
        try:
            whole += got is not None and same(got, made)
        except EntryLostError:
            assert key(token) not in store
    assert 0 < whole < 12
    assert counted(store)["hits"] == whole


def test_a_server_that_never_was_there_is_no_error(open_at):
    store = open_at(f"redis://127.0.0.1:{free_port()}")
    assert not store.put(key(1), kv(1))
    assert store.get(key(1), [1]) is None
    assert counted(store) == {"errors": 1, "skipped": 1, "misses": 1}


# A server that does not follow the protocol, byte by byte


@pytest.fixture
def pair():
    """A connection that nothing was said on yet, and what says something there, a function of bytes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.2)
        yield SimpleNamespace(_sock=ours), theirs.sendall


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", OSError),
        (b"$5", OSError),
        (b"$5\r\nabc", OSError),
        (b"$5\r\nabcdeXY\r\n", redis.InvalidResponse),
        (b"$6\r\nabcdef\r\n", ValueError),
        (b"$-2\r\n", redis.InvalidResponse),
        (b"$99999999999999999999\r\n", ValueError),
        (b"+OK\r\n", redis.InvalidResponse),
        (b"*1\r\n", redis.InvalidResponse),
        (b"-ERR no\r\n", redis.ResponseError),
        (b"-MOVED 3 127.0.0.1:7\r\n", redis.exceptions.MovedError),
        (b"-ASK 3 127.0.0.1:7\r\n", redis.exceptions.AskError),
        (b"-LOADING wait\r\n", redis.BusyLoadingError),
        (b"-CLUSTERDOWN down\r\n", redis.exceptions.ClusterDownError),
        (b"-WRONGTYPE list\r\n", ValueError),
        (b"x" * 40_000, redis.InvalidResponse),
    ],
)
def test_what_is_no_value_of_that_size_is_an_error(pair, said, error):
    connection, say = pair
    say(said)
    with pytest.raises(error):
        Link(connection, 0.2).value(5, 5)


def test_values_and_gaps_may_come_in_one_piece(pair):
    connection, say = pair
    say(b"$5\r\nabcde\r\n$-1\r\n$0\r\n\r\n$70\r\n" + b"y" * 70 + b"\r\n$1\r\n\n\r\n")
    link = Link(connection, 0.2)
    values = [link.value(0, 100) for _ in range(5)]
    assert [None if v is None else bytes(v) for v in values] == [b"abcde", None, b"", b"y" * 70, b"\n"]


def test_a_value_that_trickles_is_not_waited_for_for_ever(pair):
    connection, say = pair
    stop = threading.Event()

    def trickle():
        say(b"$1000000\r\n")
        while not stop.wait(0.02):
            say(b"z" * 10)

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(redis.TimeoutError, match="does not come in time"):
            Link(connection, 0.05).value(10**6, 10**6)
    finally:
        stop.set()
        thread.join()


def test_a_connection_that_something_went_wrong_on_is_not_used_again(server):
    pool = redis.ConnectionPool(port=server.port, socket_timeout=PATIENT, protocol=2)
    with suppress(ZeroDivisionError), linked(pool, PATIENT) as link:
        link.send([(b"SET", b"a", b"1"), (b"GET", b"a")])
        raise ZeroDivisionError
    with linked(pool, PATIENT) as link:
        link.send([(b"GET", b"a")])
        assert link.value(0, 9) == b"1"
    pool.disconnect()


# Cluster


@pytest.fixture(scope="module")
def nodes():
    with cluster() as started:
        yield started


def cluster_url(nodes):
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def owner(key, count=3):
    return key_slot(f"{{{key.digest}}}".encode()) * count // SLOTS


def keys_of(node, number=4):
    """Return chunk keys that the node with this number keeps, and their tokens."""
    found = ((key(token), token) for token in range(1000))
    return [(k, token) for k, token in found if owner(k) == node][:number]


def test_a_cluster_keeps_each_entry_on_one_node(nodes, open_at):
    store = open_at(cluster_url(nodes[:1]))
    for node in range(3):
        for k, token in keys_of(node):
            assert store.put(k, kv(token))
    other = open_at(cluster_url(nodes))
    for node in range(3):
        assert sum(name.endswith(":h") for name in names(nodes[node])) == 4
        for k, token in keys_of(node):
            assert same(other.get(k, [token]), kv(token))
    assert len(list(store.entries())) == 12
    assert other.stats().entries == 12
    first, _ = keys_of(0)[0]
    assert store.delete(first)
    assert first not in other
    store.clear()
    assert other.stats().entries == 0
    assert counted(store) == {"writes": 12}


def test_the_entries_of_a_cluster_are_found_again_when_their_slot_has_moved(open_at):
    with cluster() as nodes:
        store = open_at(cluster_url(nodes))
        [(k, token)] = keys_of(0, 1)
        assert store.put(k, kv(token))
        slot = key_slot(f"{{{k.digest}}}".encode())
        ids = [node.client.execute_command("CLUSTER", "MYID").decode() for node in nodes]
        nodes[1].client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        nodes[0].client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        assert store.get(k, [token]) is not None  # where it has been
        moving = nodes[0].client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100)
        nodes[0].client.execute_command("MIGRATE", "127.0.0.1", nodes[1].port, "", 0, 5000, "KEYS", *moving)
        assert store.get(k, [token]) is None  # on its way
        assert counted(store) == {"writes": 1, "hits": 1, "misses": 1, "skipped": 1}
        assert not store.breaker.is_open
        for node in (nodes[1], nodes[0], nodes[2]):
            node.client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
        assert same(store.get(k, [token]), kv(token))
        assert store.put(k, kv(token, fill=2.0))


@pytest.mark.parametrize(("fail", "heal"), [(kill, start), (hang, resume)], ids=lambda f: f.__name__)
def test_a_node_that_is_down_takes_only_its_own_entries_along(open_at, fail, heal, caplog):
    with cluster() as nodes:
        store = open_at(cluster_url(nodes), timeout=0.5)
        here, there = keys_of(0), keys_of(2)
        tombs = key_slot(b"chunkcache:tombs") * 3 // SLOTS
        down = 0 if tombs == 2 else 2
        (lost, _), (kept, token) = (there[0], here[0]) if down == 2 else (here[0], there[0])
        for k, t in here + there:
            assert store.put(k, kv(t))
        writes = counted(store)["writes"]
        fail(nodes[down])
        node = store._servers._nodes["127.0.0.1", nodes[down].port]
        node.breaker.pause_s = 60.0
        assert store.get(lost, [0]) is None
        assert counted(store) == {"writes": writes, "misses": 1, "errors": 1}
        for _ in range(3):
            assert store.get(lost, [0]) is None
            assert same(store.get(kept, [token]), kv(token))
            assert store.put(kept, kv(token))
        assert counted(store) == {"writes": writes + 3, "hits": 3, "misses": 4, "errors": 1, "skipped": 3}
        assert len(list(store.entries())) == 4
        assert not store.breaker.is_open
        [record] = caplog.records
        assert "a node is in trouble" in record.getMessage()
        node.breaker.pause_s = 0.01
        node.breaker.failed()
        heal(nodes[down])
        assert eventually(lambda: store.put(lost, kv(0)))
        assert store.get(lost, [0]) is not None


def test_a_cluster_that_is_down_as_a_whole_costs_one_try(open_at, caplog):
    ports = [free_port() for _ in range(3)]
    store = open_at("redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports))
    for _ in range(3):
        assert store.get(key(1), [1]) is None
        assert not store.put(key(1), kv(1))
    assert counted(store) == {"misses": 3, "errors": 1, "skipped": 5}
    assert len(caplog.records) == 1


def test_the_nodes_of_a_cluster_are_asked_in_turn_until_one_answers(nodes, open_at):
    url = f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{free_port()},127.0.0.1:{nodes[0].port}"
    store = open_at(url, pause_s=0.001)
    assert eventually(lambda: store.put(key(1), kv(1)))
    assert counted(store)["errors"] == 2


# Sentinel


def test_behind_sentinels_the_new_master_is_found(open_at):
    with replicated() as [first, second], sentinel(first) as port:
        store = open_at(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{port}/store", pause_s=0.01)
        eventually(lambda: store.put(key(1), kv(1)))  # once the sentinel knows who is the master
        eventually(lambda: second.client.exists(f"chunkcache:{{{key(1).digest}}}:h"))
        first.kill()
        assert same(eventually(lambda: store.get(key(1), [1]), seconds=30), kv(1))
        assert eventually(lambda: store.put(key(2), kv(2)))
        assert second.client.info("replication")["role"] == "master"
        first.start()


# TLS, names and passwords


@pytest.fixture
def pem(tmp_path):
    path = tmp_path / "pair.pem"
    path.write_text(PEM)
    return str(path)


def test_tls(server, open_at, pem):
    with tls_in_front_of(server, pem) as port:
        store = open_at(f"rediss://localhost:{port}", ca=pem)
        made = large_kv(2)
        assert store.put(key(1), made)
        assert same(store.get(key(1), made.token_ids), made)
        store.close()
        assert not open_at(f"rediss://localhost:{port}").put(key(2), kv(2))  # signed by nobody that is known
        assert not open_at(f"redis://localhost:{port}", timeout=0.3).put(key(2), kv(2))
        lax = open_at(f"rediss://localhost:{port}", verify="no")
        assert lax.put(key(2), kv(2))
        lax.close()


def test_tls_with_a_certificate_of_the_clients(server, open_at, pem):
    with tls_in_front_of(server, pem, ask_for_certificate=True) as port:
        store = open_at(f"rediss://127.0.0.1:{port}", ca=pem, cert=pem, key=pem)
        assert store.put(key(1), kv(1))
        store.close()
        assert not open_at(f"rediss://127.0.0.1:{port}", ca=pem).put(key(1), kv(1))


SECRET = "p@ss:w/rd|?"
QUOTED = "p%40ss%3Aw%2Frd%7C%3F"


@pytest.fixture
def guarded():
    with servers(1) as [server]:
        server.client.acl_setuser("reader", enabled=True, passwords=[f"+{SECRET}"], keys=["*"], commands=["+@all"])
        server.config(requirepass=SECRET)
        yield server


def test_passwords_come_from_the_url_or_the_environment(guarded, open_at, monkeypatch):
    assert not open_at(guarded.url).put(key(1), kv(1))
    assert open_at(f"redis://:{QUOTED}@127.0.0.1:{guarded.port}").put(key(1), kv(1))
    assert open_at(f"redis://reader:{QUOTED}@127.0.0.1:{guarded.port}").put(key(1), kv(1))
    monkeypatch.setenv("CHUNKCACHE_REDIS_PASSWORD", SECRET)
    assert open_at(guarded.url).put(key(1), kv(1))
    assert not open_at(f"redis://nobody@127.0.0.1:{guarded.port}").put(key(1), kv(1))
    monkeypatch.setenv("CHUNKCACHE_REDIS_USERNAME", "reader")
    assert open_at(guarded.url).put(key(1), kv(1))
    guarded.client = redis.Redis(port=guarded.port, password=SECRET)


def test_no_password_is_ever_said(guarded, open_at, caplog):
    caplog.set_level(logging.DEBUG)
    url = f"redis://reader:wrong-{QUOTED}@127.0.0.1:{guarded.port}"
    store = open_at(url)
    assert not store.put(key(1), kv(1))
    said = caplog.text + repr(store) + repr(store._servers) + repr(vars(store))
    for bad in (f"{url}/x/y", f"rediss+{url}", url.replace("redis:", "redis+sentinel:"), f"{url}/0?timeout=0"):
        with pytest.raises(StoreURLError) as caught:
            open_store(bad)
        said += str(caught.value)
    assert "wrong-" not in said
    assert "reader" in said
    guarded.client = redis.Redis(port=guarded.port, password=SECRET)


# URLs


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster"])
def test_a_scheme_alone_means_this_machine(scheme):
    with open_store(f"{scheme}://") as opened:
        assert type(opened) is RedisStore is pkgutil.resolve_name(TIERS[scheme])


def connection_options(url, **options):
    store = with_options(RedisStore, url=url, **options)
    [server] = store._servers._nodes.values() if "cluster" in url else [store._servers._server]
    found = server._pool.connection_kwargs | {"class": server._pool.connection_class.__name__}
    store.close()
    return found


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster"])
def test_a_url_says_where_to_connect(scheme, monkeypatch, pem):
    monkeypatch.delenv("CHUNKCACHE_REDIS_PASSWORD", raising=False)
    options = {"ca": pem, "cert": pem, "key": pem, "verify": "no"} if scheme.startswith("rediss") else {}
    found = connection_options(f"{scheme}://u:p@[::1]:7000", **options)
    assert (found["host"], found["port"], found["username"], found["password"]) == ("::1", 7000, "u", "p")
    assert found["socket_timeout"] == found["socket_connect_timeout"] == 0.05
    assert found["retry"].get_retries() == found["health_check_interval"] == 0
    secured = scheme.startswith("rediss")
    assert found["class"] == ("SSLConnection" if secured else "Connection")
    expected = {"ssl_ca_certs": pem, "ssl_certfile": pem, "ssl_keyfile": pem, "ssl_cert_reqs": "none"}
    expected["ssl_check_hostname"] = False
    assert {k: v for k, v in found.items() if k.startswith("ssl")} == (expected if secured else {})


def test_tls_reaches_sentinels_and_the_master(pem, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_REDIS_SENTINEL_PASSWORD", "s")
    store = with_options(RedisStore, url="rediss+sentinel://u:p@a,b:7/store/2", ca=pem, timeout=0.1)
    pool = store._servers._server._pool
    assert pool.service_name == "store"
    assert (pool.connection_kwargs["db"], pool.connection_kwargs["password"]) == (2, "p")
    assert issubclass(pool.connection_class, redis.SSLConnection)
    asked = [client.connection_pool for client in pool.sentinel_manager.sentinels]
    assert [(p.connection_kwargs["host"], p.connection_kwargs["port"]) for p in asked] == [("a", 26379), ("b", 7)]
    for sentinels_pool in asked:
        assert issubclass(sentinels_pool.connection_class, redis.SSLConnection)
        assert sentinels_pool.connection_kwargs["ssl_ca_certs"] == pem
        assert sentinels_pool.connection_kwargs["password"] == "s"
        assert sentinels_pool.connection_kwargs["username"] is None
        assert sentinels_pool.connection_kwargs["socket_timeout"] == 0.05
    store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://a,b", r"names no server; write for example redis://host:6379/0"),
        ("redis://a:b", "names no server"),
        ("redis://a:70000", "names no server"),
        ("redis://a/b", "names no server"),
        ("redis://a/0/1", "names no server"),
        ("redis://a#b", "names no server"),
        ("redis+sentinel://a", r"write for example redis\+sentinel://host:26379,host:26379/service"),
        ("redis+sentinel://a/s/0/1", "names no server"),
        ("redis+cluster://a/1", r"write for example redis\+cluster://host:6379,host:6379"),
        ("redis+unix://", r"write for example redis\+unix:///run/valkey/valkey.sock"),
        ("redis+unix://host/path", "names no server"),
        ("redis://?timeout=0", "timeout=0.0 is no time to wait"),
        ("redis://?timeout=soon", "timeout='soon' is not a number"),
        ("redis://?namespace=a{b}", "has other characters than letters"),
        ("redis://?namespace=", "has other characters than letters"),
        ("rediss://?verify=maybe", "verify='maybe' is neither 'yes' nor 'no'"),
        ("redis://?verify=no", "are for TLS; write rediss instead of redis"),
        ("rediss://?ca=/no/such.pem", r"'/no/such.pem' cannot be read"),
        ("redis://?max_bytes=1GiB", "has no option 'max_bytes'"),
        ("redis://?ttl=0", "is no time to live"),
    ],
)
def test_every_mistake_is_named_with_the_way_out(url, message):
    with pytest.raises(StoreURLError, match=message):
        open_store(url)


def test_options_reach_the_constructor(server):
    url = f"redis://127.0.0.1:{server.port}?timeout=5&namespace=n&codec=int8&ttl=60"
    with open_store(f"tiered:memory://?max_bytes=1MiB|{url}") as store:
        store.put(key(1), kv(1))
        store.flush()
        assert all(name.startswith("n:{") for name in names(server))
