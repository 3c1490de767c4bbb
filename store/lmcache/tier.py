"""The LMCache tier: chunk KV in LMCache's storage manager, in RAM and in a folder or on a Redis server below it.

An entry is some objects of LMCache: the start of its header, of a fixed size because LMCache can read only what it
knows the size of; the rest of the header, if there is one; and each layer.
"""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, Layer
from chunkcache.store.budget import Budget, Size
from chunkcache.store.bytestore import RAW, Blob, ByteStore, DecryptedBlob, Encoding
from chunkcache.store.entry import PREAMBLE, DamagedError, Header, description_length
from chunkcache.store.ledger import Ledger
from chunkcache.store.lmcache.below import FAULTS, START
from chunkcache.store.lmcache.manager import Manager, Part
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter

REST, LAYERS = 1, 2  # object groups: the rest of the header, and the first layer
HEAD = Part(0, START)
AT_ONCE = 4 * 2**20  # bytes of layers that are brought from below together


class _GoneError(Exception):
    """A layer that LMCache has evicted, or that was deleted meanwhile."""


class LMCacheStore(ByteStore):
    """Chunk KV in LMCache (0.5), in this process: in RAM, its L1, and in what the URL names, its L2.

    `lmcache://` is RAM alone, `lmcache:///folder` writes files too, and `lmcache://host:port` to a Redis or Valkey
    server as well (`lmcache://user:password@host:port`, or LMCACHE_RESP_USERNAME and LMCACHE_RESP_PASSWORD).

    LMCache does not verify bytes, so entries are sealed and verified here. Its client never connects again to a
    server that has restarted; LMCache is then opened anew, with its RAM empty. These limits remain:

    - The folder or server is written behind `put`; `flush` and `close` wait for it. It has no byte budget: give the
      server a `maxmemory`, or use the disk tier.
    - RAM is claimed when the store is opened. Once a second, if it is 60% full, LMCache evicts the least recently
      used, layer by layer; meanwhile entries are refused. It cannot pin or weigh entries, and does not say what it
      evicted: `entries` and `stats` know what this process wrote or read.
    - A deletion does not reach the RAM of other processes.
    - `close` takes two seconds, until LMCache's threads wake up.

    Args:
        url: see above.
        max_bytes: RAM, in bytes.
        encoding: how entries are kept.
        ttl: seconds that an entry is kept after it was computed; None for ever.
        timeout: seconds that LMCache may take for some layers; no answer is a fault of the tier.

    Raises:
        StoreURLError: LMCache is not installed or cannot have the RAM, or a value is none of these.
    """

    faults: ClassVar[tuple[type[Exception], ...]] = FAULTS

    def __init__(
        self,
        url: str = "lmcache://",
        max_bytes: Size = 2**28,
        encoding: Encoding = RAW,
        ttl: float | None = None,
        timeout: float = 0.05,
    ) -> None:
        super().__init__(Budget(max_bytes=max_bytes, ttl=ttl), encoding)
        if not timeout > 0:
            raise StoreURLError(f"timeout={timeout} is no time to wait; pass seconds, such as 0.05")
        self._manager = Manager(url, max_bytes, timeout)
        self._ledger = Ledger()
        self._writing = threading.RLock()
        self._closed = False
        self._attempt(self._manager.reach, None)

    def flush(self) -> None:
        if not self._manager.flush():
            self.warn_once("some entries are in RAM only: LMCache could not write them to the folder or server")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.flush()
            self._manager.close()
            self._ledger.close()

    def layer(self, header: Header, blob: Blob, index: int) -> Layer:
        try:
            return super().layer(header, blob, index)
        except _GoneError:
            removed = self._attempt(lambda: self._remove_same(header.key, blob), False)
            self.count(evictions=removed)
            raise EntryLostError(header.key, "LMCache no longer has a layer of it") from None

    def _open(self, key: ChunkKey) -> LMCacheBlob | None:
        start = self._head(key)
        if start is None:
            self._ledger.drop(key)
            return None
        try:
            length = PREAMBLE + description_length(bytes(start[:PREAMBLE]))
        except DamagedError as damage:
            raise EntryLostError(key, str(damage)) from None
        header = bytes(start[:length])
        if length > START:
            part = Part(REST, length - START, _version(header))
            rest = self._object(key, part)
            if rest is None:
                raise EntryLostError(key, "a part of its header is not there")
            header += bytes(rest)
        return LMCacheBlob(self._manager, key, header)

    def _save(self, entry: Entry, header: bytes, blocks: Sequence[memoryview]) -> bool:
        data = dict(enumerate(blocks, LAYERS))
        data |= {HEAD.group: memoryview(header[:START].ljust(START, b"\0")), REST: memoryview(header)[START:]}
        objects = {part: data[part.group] for part in _parts(header, [len(block) for block in blocks])}
        with self._writing:
            self._manager.reach()
            self._erase(entry.key)
            if not self._manager.write(entry.key, objects):
                self.warn_once("LMCache has no room in RAM just now: some entries are not stored; raise max_bytes")
                return False
            self._ledger.add(entry)
        return True

    def _remove(self, key: ChunkKey) -> bool:
        with self._writing:
            self._manager.reach()
            self._ledger.drop(key)
            return self._erase(key)

    def _remove_same(self, key: ChunkKey, blob: Blob) -> bool:
        """Remove what is left of an entry, unless it has been replaced."""
        stored = blob.stored if isinstance(blob, DecryptedBlob) else blob
        with self._writing:
            now = self._open(key)
            return now is not None and now.header == stored.header and self._remove(key)

    def _erase(self, key: ChunkKey) -> bool:
        """Delete the objects of an entry; return whether it was there."""
        try:
            stored = self._open(key)
            if stored is None:
                return False
            parts = _parts(stored.header, self._stored_sizes(key, stored.header))
        except (EntryLostError, DamagedError):
            self._manager.wipe(key, [HEAD])
            if self._manager.below is not None:
                self._manager.below.sweep(key)
        else:
            self._manager.wipe(key, parts)
        return True

    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        self._ledger.add_all(list(super()._entries(EVERYTHING)))
        return self._ledger.entries(where)

    def _totals(self) -> tuple[int, int]:
        return self._ledger.totals()

    def _headers(self) -> Iterator[tuple[ChunkKey, bytes]]:
        """Yield key and header of every entry below that this process has not come across."""
        below = self._manager.below
        for key in [] if below is None else list(below.keys()):
            if key in self._ledger:
                continue
            try:
                stored = self._open(key)
            except EntryLostError as lost:
                self.drop_damaged(key, str(lost))
                continue
            if stored is not None:
                yield key, stored.header

    def _object(self, key: ChunkKey, part: Part) -> memoryview | None:
        manager = self._manager
        buffer = manager.in_ram(key, part)
        if buffer is None and manager.wait(manager.ask(key, [part])):
            buffer = manager.in_ram(key, part)
        return buffer

    def _head(self, key: ChunkKey) -> memoryview | None:
        head = self._object(key, HEAD)
        below = self._manager.below
        if head is not None or below is None or not below.has(key):
            return head
        with self._writing:  # it was put just now, or LMCache's connection is dead, or it is damaged
            head = self._object(key, HEAD)
            if head is not None or not below.has(key):
                return head
            if self._manager.may_renew:
                self._manager.renew()
            raise EntryLostError(key, "LMCache cannot read its header")


class LMCacheBlob:
    """An entry in LMCache, its header read."""

    def __init__(self, manager: Manager, key: ChunkKey, header: bytes) -> None:
        self.header = header
        self._manager, self._key = manager, key
        self._runs: list[list[Part]] = []  # layers that are brought from below together
        self._asked: dict[int, Any] = {}

    def block(self, index: int, sizes: Sequence[int]) -> memoryview:
        layers = _layers(self.header, sizes)
        buffer = self._manager.in_ram(self._key, layers[index])
        if buffer is not None and not self._runs:
            return buffer
        self._runs = self._runs or _runs(layers)
        run = next(number for number, parts in enumerate(self._runs) if layers[index] in parts)
        if buffer is None:
            self._ask(run)
        ahead = 0
        for later in range(run + 1, len(self._runs)):
            if ahead < AT_ONCE:
                self._ask(later)
                ahead += sum(part.nbytes for part in self._runs[later])
        tries = 0
        while buffer is None:
            self._ask(run)
            if not self._manager.wait(self._asked.pop(run)):
                raise _GoneError
            buffer = self._manager.in_ram(self._key, layers[index])
            if buffer is None and (tries := tries + 1) > 1:
                raise TimeoutError("LMCache evicts what it has just loaded")
        return buffer

    def _ask(self, run: int) -> None:
        if run not in self._asked:
            self._asked[run] = self._manager.ask(self._key, self._runs[run])

    def __del__(self) -> None:
        self._manager.forget(asked for asked in self._asked.values() if asked is not None)


def _version(header: bytes) -> bytes:
    return header[PREAMBLE - 32 : PREAMBLE - 24]


def _layers(header: bytes, sizes: Sequence[int]) -> list[Part]:
    return [Part(group, nbytes, _version(header)) for group, nbytes in enumerate(sizes, LAYERS)]


def _parts(header: bytes, sizes: Sequence[int]) -> list[Part]:
    """Return all objects of an entry."""
    rest = len(header) - START
    return [*_layers(header, sizes), *([Part(REST, rest, _version(header))] if rest > 0 else []), HEAD]


def _runs(layers: Sequence[Part]) -> list[list[Part]]:
    """Return the layers in runs of at most `AT_ONCE` bytes, or of one layer, and of one size, as LMCache needs it."""
    runs: list[list[Part]] = []
    for part in layers:
        if runs and part.nbytes == runs[-1][0].nbytes and part.nbytes * (len(runs[-1]) + 1) <= AT_ONCE:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs
