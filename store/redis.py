"""The Redis tier: chunk KV on Redis or Valkey servers, which any number of processes share."""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import json
import math
import re
import secrets
import struct
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import redis

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey
from chunkcache.store.base import logger
from chunkcache.store.breaker import Breaker
from chunkcache.store.budget import Budget
from chunkcache.store.bytestore import RAW, ByteStore, Encoding
from chunkcache.store.entry import MAX_DESCRIPTION, PREAMBLE, DamagedError
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter
from chunkcache.store.redis_servers import NO_TLS, NodeError, NotNowError, Server, Tls, open_servers

AHEAD = 3 * 2**20  # bytes asked for at once: the server sends a layer while the one before is being received
UPLOAD_S = 60  # how long a layer is kept that is not committed
GRACE_S = 10  # how long a replaced entry can still be read by readers that have its header
TOMB_S = 3600  # how long a deletion stands against what was computed before it
_MARK = struct.Struct("<8s8sIQ")  # magic, id, number of layers, their bytes
_MAGIC = b"CKVPARTS"
_MAX_PARTS = 4096
_FOREIGN = "it is no entry of a chunkcache store"
_LISTED = 64  # headers fetched at once


class RedisStore(ByteStore):
    """Chunk KV on one server, behind Sentinels, or on a Cluster.

    An entry is a header under `<namespace>:{<key>}:h` and a value per layer under `<namespace>:{<key>}:<id>:<layer>`,
    where `id` is drawn for each write; the braces keep them on one node of a Cluster. Writing the header last commits
    the entry: without it the layers expire within a minute. The layers of a replaced entry stay for some seconds, so
    that no reader mixes the two.

    The server's own `maxmemory` is the budget, and its eviction policy says what goes; `allkeys-lru` or
    `allkeys-lfu` is right for a cache. An entry of which a layer was evicted is deleted when that is noticed.
    Listing walks over all keys of the database: give the store one of its own.

    Deletions are known to every process with the same namespace: KV that were computed before are not stored
    afterwards, within an hour. So on a Cluster nothing is stored while the node that keeps `<namespace>:tombs` is
    down.

    Args:
        url: see `open_servers`. The user name and password may also come from CHUNKCACHE_REDIS_USERNAME and
            CHUNKCACHE_REDIS_PASSWORD, that of the Sentinels from CHUNKCACHE_REDIS_SENTINEL_PASSWORD.
        encoding: how entries are kept.
        ttl: seconds that an entry is kept after it was computed; None for ever.
        timeout: seconds that a server may take to connect or answer, and again for each MiB that it sends. A name
            that DNS does not resolve may take longer.
        namespace: what the names of all values start with.
        tls: where the scheme starts with `rediss`.

    Raises:
        StoreURLError: a value is none of these.
    """

    faults: ClassVar[tuple[type[Exception], ...]] = (redis.RedisError, OSError)

    def __init__(
        self,
        url: str = "redis://",
        encoding: Encoding = RAW,
        ttl: float | None = None,
        timeout: float = 0.05,
        namespace: str = "chunkcache",
        tls: Tls = NO_TLS,
    ) -> None:
        super().__init__(Budget(ttl=ttl), encoding)
        if not timeout > 0:
            raise StoreURLError(f"timeout={timeout} is no time to wait; pass seconds, such as 0.05")
        if not re.fullmatch(r"[\w.:-]+", namespace, re.ASCII):
            raise StoreURLError(f"namespace={namespace!r} has other characters than letters, digits, and any of _.:-")
        self._namespace = namespace
        self._servers = open_servers(url, timeout, tls)

    def close(self) -> None:
        self._servers.close()

    def trouble(self, fault: Exception, breaker: Breaker | None = None) -> None:
        if isinstance(fault, NotNowError):
            self.count(skipped=1)
        elif isinstance(fault, NodeError):  # the other nodes are well: the tier's breaker stays closed
            self.count(errors=1)
            if fault.first:
                logger.warning("RedisStore: a node is in trouble (%s): requests go on without its entries", fault)
        elif isinstance(fault, redis.ResponseError):
            super().trouble(fault, breaker)
        else:  # no answer: reading and writing alike would wait
            super().trouble(fault)

    def __contains__(self, key: ChunkKey) -> bool:
        if self.keyring is not None:  # the header says whether it can be used
            return super().__contains__(key)
        name = self._name(key, "h")
        return self._attempt(lambda: bool(self._servers.run(name, lambda server: server.client.exists(name))), False)

    def fetch(self, names: Sequence[bytes], sizes: Sequence[int]) -> list[memoryview | None]:
        """Read values of one entry, of so many bytes each; None for one that is not there.

        Raises:
            DamagedError: one has another size.
        """

        def read(server: Server) -> list[memoryview | None]:
            with server.link() as link:
                link.send([(b"GET", name) for name in names])
                return [link.value(nbytes, nbytes) for nbytes in sizes]

        return self._servers.run(names[0], read)

    def _open(self, key: ChunkKey) -> RedisBlob | None:
        name = self._name(key, "h")

        def read(server: Server) -> memoryview | None:
            with server.link() as link:
                link.send([(b"GET", name)])
                return link.value(0, _MARK.size + PREAMBLE + MAX_DESCRIPTION)

        try:
            value = self._servers.run(name, read)
        except DamagedError as damage:
            raise EntryLostError(key, str(damage)) from None
        if value is None:
            return None
        mark = _Mark.parse(value)
        if mark is None:
            raise EntryLostError(key, _FOREIGN)
        return RedisBlob(self, self._parts(key, mark), bytes(value[_MARK.size :]))

    def _save(self, entry: Entry, header: bytes, blocks: Sequence[memoryview]) -> bool:
        if self._is_deleted_anywhere(entry):
            return False
        mark = _Mark(secrets.token_bytes(8), len(blocks), entry.nbytes)
        parts = self._parts(entry.key, mark)

        def upload(server: Server) -> None:
            with server.link() as link:
                for index, (part, block) in enumerate(zip(parts, blocks, strict=True)):
                    link.send([(b"SET", part, block, b"EX", b"%d" % UPLOAD_S)])
                    if index:  # send one while the server stores the one before
                        link.done()
                link.done()
            self._commit(server, entry, _MARK.pack(_MAGIC, *mark) + header, parts)

        largest = max(_MARK.size + len(header), *map(len, blocks))
        if not self._servers.run(parts[0], lambda server: server.within_limit(largest, upload)):
            self.warn_once(
                "RedisStore: a value of %d bytes is larger than the server takes: the entry is not stored; raise its "
                "proto-max-bulk-len, or store smaller chunks",
                largest,
            )
            return False
        if self._is_deleted_anywhere(entry):  # deleted while it was being written
            self._remove(entry.key)
            return False
        return True

    def _commit(self, server: Server, entry: Entry, value: bytes, parts: Sequence[bytes]) -> None:
        left = None if entry.expires is None else max(1, round((entry.expires - time.time()) * 1000))
        with server.client.pipeline(transaction=True) as pipe:
            pipe.set(self._name(entry.key, "h"), value, px=left, get=True)
            for part in parts:
                if left is None:
                    pipe.persist(part)
                else:
                    pipe.pexpire(part, left)
            replaced = pipe.execute()[0]
        if replaced is not None and (old := _Mark.parse(replaced)) is not None:
            with server.client.pipeline(transaction=False) as pipe:
                for part in self._parts(entry.key, old):
                    pipe.expire(part, GRACE_S)
                pipe.execute()

    def _remove(self, key: ChunkKey) -> bool:
        name = self._name(key, "h")

        def remove(server: Server) -> bool:
            try:
                mark = _Mark.parse(server.client.getrange(name, 0, _MARK.size - 1))
            except redis.ResponseError as error:
                if not _is_foreign(error):
                    raise
                mark = None
            removed: int = server.client.unlink(name)
            if mark is not None:
                server.client.unlink(*self._parts(key, mark))
            return removed > 0

        return self._servers.run(name, remove)

    def _headers(self) -> Iterator[tuple[ChunkKey, bytes]]:
        for key, _, header in self._listed(None):
            yield key, header

    def _listed(self, nbytes: int | None) -> Iterator[tuple[ChunkKey, _Mark, bytes]]:
        """Yield key, mark and header of every entry, of which the first `nbytes` are read."""
        names = re.compile(re.escape(self._namespace).encode() + rb":\{([0-9a-f]{64})\}:h")

        def read(server: Server) -> list[tuple[bytes, Any]]:
            scanned = set(server.client.scan_iter(match=f"{self._namespace}:{{*}}:h", count=1000))
            ours = [name for name in scanned if names.fullmatch(name)]
            values: list[Any] = []
            for start in range(0, len(ours), _LISTED):
                with server.client.pipeline(transaction=False) as pipe:
                    for name in ours[start : start + _LISTED]:
                        pipe.getrange(name, 0, -1 if nbytes is None else nbytes - 1)
                    values += pipe.execute(raise_on_error=False)
            return list(zip(ours, values, strict=True))

        for name, value in chain.from_iterable(self._servers.each(read, self.trouble)):
            key = ChunkKey(name[-67:-3].decode())
            if _is_foreign(value) or (isinstance(value, bytes) and value and _Mark.parse(value) is None):
                self.drop_damaged(key, _FOREIGN)
            elif isinstance(value, bytes) and (mark := _Mark.parse(value)) is not None:
                yield key, mark, value[_MARK.size :]

    def _totals(self) -> tuple[int, int]:
        held: list[int] = self._attempt(lambda: [mark.nbytes for _, mark, _ in self._listed(_MARK.size)], [])
        return len(held), sum(held)

    def _record_deletion(self, what: ChunkKey | EntryFilter) -> None:
        """Record a deletion here and, for every process, on the servers."""
        super()._record_deletion(what)
        now = time.time()
        name = self._name(what, "t") if isinstance(what, ChunkKey) else self._name(None, "tombs")

        def record(server: Server) -> None:
            if isinstance(what, ChunkKey):
                server.client.set(name, repr(now), ex=TOMB_S)
                return
            with server.client.pipeline(transaction=True) as pipe:
                pipe.zremrangebyscore(name, "-inf", now - TOMB_S)
                if tombs := {json.dumps(part.fields_of_tombstone()): now for part in what.of_single_chunks()}:
                    pipe.zadd(name, tombs)
                pipe.expire(name, TOMB_S)
                pipe.execute()

        self._attempt(lambda: self._servers.run(name, record), None)

    def _is_deleted_anywhere(self, entry: Entry) -> bool:
        """Return whether `entry` was deleted, by any process, after its KV were computed."""
        name, tombs = self._name(entry.key, "t"), self._name(None, "tombs")
        at = self._servers.run(name, lambda server: server.client.get(name))
        if at is not None and entry.created <= _time(at):
            return True
        since = self._servers.run(tombs, lambda server: server.client.zrangebyscore(tombs, entry.created, "+inf"))
        return any(_filter(text).matches(entry) for text in since)

    def _name(self, key: ChunkKey | None, part: str) -> bytes:
        tag = "" if key is None else f"{{{key.digest}}}:"
        return f"{self._namespace}:{tag}{part}".encode()

    def _parts(self, key: ChunkKey, mark: _Mark) -> list[bytes]:
        return [self._name(key, f"{mark.id.hex()}:{layer}") for layer in range(mark.layers)]


class _Mark(NamedTuple):
    """The start of the value of a header: which values hold the layers."""

    id: bytes
    layers: int
    nbytes: int

    @classmethod
    def parse(cls, value: bytes | memoryview) -> _Mark | None:
        if len(value) < _MARK.size:
            return None
        magic, *fields = _MARK.unpack_from(value)
        mark = cls(*fields)
        return mark if magic == _MAGIC and 0 < mark.layers <= _MAX_PARTS else None


class RedisBlob:
    """An entry whose header is read."""

    def __init__(self, store: RedisStore, parts: Sequence[bytes], header: bytes) -> None:
        self.header = header
        self._store, self._parts = store, parts
        self._ahead: dict[int, memoryview | None] = {}

    def block(self, index: int, sizes: Sequence[int]) -> memoryview:
        if index not in self._ahead:
            self._ahead = self._fetch(index, sizes)
        block = self._ahead.pop(index, None)
        if block is None:
            raise DamagedError("a layer is not there; the server may have evicted it")
        return block

    def _fetch(self, index: int, sizes: Sequence[int]) -> dict[int, memoryview | None]:
        if len(sizes) != len(self._parts):
            raise DamagedError("its values and its header do not belong together")
        end = index + 1
        while end < len(sizes) and sum(sizes[index : end + 1]) <= AHEAD:
            end += 1
        blocks = self._store.fetch(self._parts[index:end], sizes[index:end])
        return dict(zip(range(index, end), blocks, strict=True))


def _is_foreign(reply: object) -> bool:
    """Return whether a reply says that a value is no string, and so not ours."""
    return isinstance(reply, redis.ResponseError) and str(reply).startswith("WRONGTYPE")


def _time(text: bytes) -> float:
    """Return the time that a tombstone says; one that cannot be read is later than all."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def _filter(text: bytes) -> EntryFilter:
    """Return the filter that a tombstone names; one that cannot be read stands for everything."""
    try:
        return EntryFilter(**json.loads(text))
    except (ValueError, TypeError):
        return EVERYTHING
