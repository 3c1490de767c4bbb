"""A value that is larger than the server takes is refused, once and by itself; the tier goes on."""

from __future__ import annotations

import math
import ssl
import time

import pytest
import redis
import torch
from helpers_redis import SLOTS, Valkey, cluster, free_port, replicated, sentinel, servers
from redis.crc import key_slot
from support.store import key, kv, same, with_options

from chunkcache.kv import ChunkKV
from chunkcache.store import RedisStore, redis_limit
from chunkcache.store.redis_limit import ValueLimit

LIMITS = [{"proto_max_bulk_len": "1mb"}, {"client_query_buffer_limit": "1mb"}]


def large(mib=2.0, layers=2):
    """Return KV whose layers have so many MiB each."""
    tokens = int(mib * 2**10)
    return ChunkKV.of(range(tokens), 3, [torch.zeros(2, 1, tokens, 256, dtype=torch.float16) for _ in range(layers)])


@pytest.fixture
def open_at():
    opened = []

    def open_one(url, **options):
        opened.append(with_options(RedisStore, url=url, timeout=10.0, **options))
        opened[-1].breaker.pause_s = opened[-1].write_breaker.pause_s = 60.0
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def counted(store):
    stats = store.stats()
    return stats.writes, stats.refused, stats.errors, stats.skipped


def tries(client):
    """Return how many SETs of layers the server has seen, whole or not."""
    return client.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]


@pytest.mark.parametrize("config", LIMITS, ids=lambda config: next(iter(config)))
@pytest.mark.parametrize("told", [True, False], ids=["told", "no right to ask"])
def test_a_layer_over_the_limit_refuses_its_entry_alone(config, told, open_at, caplog):
    with servers(1, **config) as [server]:
        rights = ["+@all"] if told else ["+@all", "-config"]
        server.client.acl_setuser("writer", enabled=True, passwords=["+word"], keys=["*"], commands=rights)
        store = open_at(f"redis://writer:word@127.0.0.1:{server.port}")
        assert store.put(key(1), kv(1))
        for size in (2.0, 8.0, 2.0):
            assert not store.put(key(2), large(size))
        assert store.put(key(3), large(0.9))
        assert counted(store) == (2, 3, 0, 0)
        assert same(store.get(key(3), large(0.9).token_ids), large(0.9))
        assert store.get(key(2), large().token_ids) is None
        assert not store.breaker.is_open
        assert not store.write_breaker.is_open
        [record] = caplog.records
        assert "larger than the server takes" in record.getMessage()
        before = server.client.info("stats")["total_net_input_bytes"]
        assert not store.put(key(2), large(3.0))
        assert server.client.info("stats")["total_net_input_bytes"] - before < 2**16  # it is not sent again


def test_a_limit_that_is_raised_is_noticed_in_time(open_at, monkeypatch):
    with servers(1, proto_max_bulk_len="1mb") as [server]:
        store = open_at(server.url)
        assert not store.put(key(2), large())
        server.config(proto_max_bulk_len="512mb")
        assert not store.put(key(2), large())
        later = time.monotonic() + redis_limit.BELIEVED_S + 1
        monkeypatch.setattr(redis_limit.time, "monotonic", lambda: later)
        assert store.put(key(2), large())
        assert counted(store) == (1, 2, 0, 0)


@pytest.mark.parametrize("told", [True, False])
def test_a_connection_that_was_cut_once_is_no_limit(told, open_at, monkeypatch):
    with servers(1) as [server]:
        if not told:
            server.client.acl_setuser("default", enabled=True, keys=["*"], nopass=True, commands=["+@all", "-config"])
        store, cuts = open_at(server.url), []
        send = redis.connection.AbstractConnection.send_packed_command

        def cut_once(connection, command, *args, **options):
            if isinstance(command, list) and len(command) > 2 and not cuts:
                cuts.append(1)
                connection.disconnect()
                raise redis.ConnectionError("Error 104 while writing to socket. Connection reset by peer.")
            return send(connection, command, *args, **options)

        monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", cut_once)
        assert store.put(key(2), large())
        assert cuts
        assert store.put(key(3), large(3.0))
        assert counted(store) == (2, 0, 0, 0)


def test_a_server_that_goes_away_is_in_trouble_and_has_no_limit(open_at, monkeypatch):
    server = Valkey(proto_max_bulk_len="1mb")
    try:
        store = open_at(server.url)
        assert store.put(key(1), kv(1))
        server.kill()
        assert not store.put(key(2), large())
        assert not store.put(key(2), large())
        assert (store._stats.refused, store._stats.errors, store._stats.skipped) == (0, 1, 1)
        assert store._servers._server.limit.allows(2**40)
    finally:
        server.close()


def test_the_nodes_of_a_cluster_have_limits_of_their_own(open_at):
    with cluster() as nodes:
        nodes[0].config(proto_max_bulk_len="1mb")
        store = open_at("redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes))
        keys = [key(number) for number in range(40)]
        owners = [key_slot(f"{{{each.digest}}}".encode()) * 3 // SLOTS for each in keys]
        small, other = owners.index(0), owners.index(1)
        assert not store.put(keys[small], large())
        assert not store.put(keys[small], large())
        assert store.put(keys[small], kv(1))
        assert store.put(keys[other], large())
        assert counted(store) == (2, 2, 0, 0)
        assert not any(node.breaker.is_open for node in store._servers._nodes.values())


def test_a_master_behind_sentinels_has_a_limit(open_at):
    with replicated() as (master, _), sentinel(master) as port:
        master.config(proto_max_bulk_len="1mb")
        store = open_at(f"redis+sentinel://127.0.0.1:{port}/store")
        assert not store.put(key(2), large())
        assert store.put(key(1), kv(1))
        assert counted(store) == (1, 1, 0, 0)


class Told:
    """A client of a server whose settings are these."""

    def __init__(self, **settings):
        self.settings = settings

    def config_get(self, *names):
        return {name.replace("_", "-"): value for name, value in self.settings.items()}


SAID = [
    "Protocol error: invalid bulk length",
    "max request size exceeded. Limit: 1048576 bytes, Actual: 2000000 bytes",
    "max single record size exceeded. Limit: 104857600 bytes",
    "string exceeds maximum allowed size (proto-max-bulk-len)",
]
NOT_SAID = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "max daily request limit exceeded. Limit: 10000, Usage: 10001",
    "max number of clients reached",
    "NOPERM this user has no permissions",
]


@pytest.mark.parametrize("message", SAID)
def test_a_server_that_says_so_is_believed(message):
    limit = ValueLimit()
    limit.blame(redis.ResponseError(message), 2**21, Told(), again=False)
    assert limit.allows(2**21 - 1)
    assert not limit.allows(2**21)
    limit.blame(redis.ResponseError(message), 2**21, Told(proto_max_bulk_len=str(2**20)), again=False)
    assert not limit.allows(2**20 + 1)
    assert limit.allows(2**20)


HUNG_UP = [
    redis.ConnectionError("Error 32 while writing to socket. Broken pipe."),
    ConnectionResetError("reset"),
    ssl.SSLEOFError("EOF occurred in violation of protocol"),
]


@pytest.mark.parametrize("fault", HUNG_UP, ids=str)
def test_a_server_that_hangs_up_is_asked_or_tried_again(fault):
    limit = ValueLimit()
    limit.blame(fault, 2**21, Told(proto_max_bulk_len=str(2**20)), again=False)
    assert limit.allows(2**20)
    assert not limit.allows(2**20 + 1)
    for told in ({}, {"proto_max_bulk_len": str(2**29)}):
        limit = ValueLimit()
        limit.blame(fault, 2**21, Told(**told), again=False)
        assert limit.allows(2**21)
        limit.blame(fault, 2**21, Told(**told), again=True)
        assert limit.allows(2**21 - 1)
        assert not limit.allows(2**21)


FAULTS = [
    *(redis.ResponseError(message) for message in NOT_SAID),
    redis.TimeoutError("Timeout writing to socket"),
    TimeoutError("timed out"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_other_faults_are_none_of_a_limit(fault):
    limit = ValueLimit()
    with pytest.raises(type(fault)):
        limit.blame(fault, 2**21, Told(proto_max_bulk_len="10"), again=True)
    assert limit.allows(10**12)


def test_a_small_value_is_never_the_reason():
    limit = ValueLimit()
    with pytest.raises(redis.ConnectionError):
        limit.blame(redis.ConnectionError("closed"), 2**16 - 1, Told(), again=True)
    assert limit.allows(math.inf)


def test_a_server_that_does_not_answer_is_what_is_wrong():
    limit = ValueLimit()
    with pytest.raises(redis.ConnectionError):
        limit.blame(OSError("reset"), 2**21, redis.Redis(port=free_port()), again=True)
    assert limit.allows(10**12)
