"""Several tiers as one store: near ones small and fast, far ones large and persistent.

An entry that is put goes to the nearest tier at once and to the others behind the request; one that is found in a
far tier is promoted as its layers are read; one that a memory tier evicts stays in the tier below.
"""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import logging
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Layer, LazyLayers
from chunkcache.kv.device import Ready
from chunkcache.kv.transfer import PinnedLayers, WantedLayers, marked
from chunkcache.store.base import Heads, Store, Tier
from chunkcache.store.behind import WriteBehind
from chunkcache.store.memory import DeviceStore, MemoryStore
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter, StoreStats

logger = logging.getLogger("chunkcache.store")
WAIT_S = 0.05
_SETTLE_S = 1.0  # that a deletion waits for a write that is on its way
_PUT_OFF = 64  # entries that wait for `catch_up`; each keeps its KV on an accelerator
_NEAR_ONLY = 10_000  # keys remembered; the oldest are forgotten first
_SUMMED = ("hits", "mismatches", "damaged", "expired", "evictions", "errors", "skipped", "unpinned")


class TieredStore(Store):
    """Tiers in order, nearest first.

    Args:
        tiers: the tiers.
        write: `through` writes every entry to all tiers; `evict` writes it to the nearest, and further down only when
            it has to leave there or the store is closed.
        queue: chunk KV that may wait to be written to tiers below the nearest. When it is full, `put` waits
            50 ms for a place, and then goes without the other tiers: they count it as refused, `near_only` names
            it, and `flush` writes it. Prefetches and promotions have a queue of their own, of the same size.

    Raises:
        StoreURLError: there are no tiers, or `write` is neither.
    """

    def __init__(self, tiers: Sequence[Store], write: str = "through", queue: int = 16) -> None:
        if not tiers:
            raise StoreURLError("tiered: needs at least one tier, as in tiered:memory://|disk:///var/cache/kv")
        if write not in ("through", "evict"):
            raise StoreURLError(f"write={write!r} is neither 'through' nor 'evict'")
        if queue < 1:
            raise StoreURLError(f"queue={queue} holds nothing; pass 1 or more")
        if wrong := [type(tier).__name__ for tier in tiers if not isinstance(tier, Tier)]:
            raise StoreURLError(f"tiered: takes single tiers, not {', '.join(wrong)}")
        self._tiers = [tier for tier in tiers if isinstance(tier, Tier)]
        self._through = write == "through"
        self._written = self._refused = 0
        self._lock = threading.Lock()
        self._near_only: dict[ChunkKey, None] = {}
        self._put_off: list[tuple[ChunkKey, ChunkKV]] = []  # KV of an accelerator, to be written below
        self._writes_behind, self._fetches = WriteBehind(queue, WAIT_S), WriteBehind(queue, 0)
        # Also when the process ends:
        self._finalizer = weakref.finalize(self, _close_all, self._fetches, self._writes_behind)
        for tier, below in zip(self._tiers, self._tiers[1:], strict=False):
            if isinstance(tier, MemoryStore):
                tier.on_evict = partial(_demote, self._writes_behind, below)

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        for index, tier in enumerate(self._tiers):
            kv = tier.get(key, token_ids, heads)
            if kv is not None:
                return kv if index == 0 else self._promoting(key, kv, index)
        return None

    def put(self, key: ChunkKey, kv: ChunkKV) -> bool:
        if not kv.origin.created:  # or a deletion could not tell what it is older than
            kv = replace(kv, origin=replace(kv.origin, created=time.time()))
        kv = marked(kv)
        near = stored = self._tiers[0].put(key, kv)
        if near and kv.ready and self._through:
            self._put_off_below(key, kv)
        elif self._through or not near:
            stored = self._write_below([(key, kv)], near) or near
        with self._lock:
            self._written += stored
            self._refused += not stored
        return stored

    def delete(self, key: ChunkKey) -> bool:
        deleted = sum(tier.delete(key) for tier in self._tiers) > 0
        self._settle()
        return deleted

    def purge(self, where: EntryFilter = EVERYTHING) -> int:
        purged = len(set().union(*(tier.purge_keys(where) for tier in self._tiers)))
        self._settle()
        return purged

    def _settle(self) -> None:
        """Wait for a write that was on its way when its entry was deleted: the tier takes it back at its end.

        One that lasts longer than `_SETTLE_S` is taken back when it ends, after the deletion has returned.
        """
        for tasks in (self._fetches, self._writes_behind):
            if not tasks.settle(_SETTLE_S):
                logger.info("a deletion did not wait for a slow write; if that was of its entry, it is taken back")

    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        seen: set[ChunkKey] = set()
        for tier in self._tiers:
            for entry in tier.entries(where):
                if entry.key not in seen:
                    seen.add(entry.key)
                    yield entry

    def stats(self) -> StoreStats:
        """Return the counters: entries of the fullest tier, bytes and what went wrong of all tiers together."""
        tiers = [tier.stats() for tier in self._tiers]
        summed = {name: sum(getattr(stats, name) for stats in tiers) for name in _SUMMED}
        misses = tiers[0].hits + tiers[0].misses - summed["hits"]  # each `get` asks the nearest; one tier has a hit
        held = {"entries": max(s.entries for s in tiers), "nbytes": sum(s.nbytes for s in tiers)}
        return StoreStats(misses=misses, writes=self._written, refused=self._refused, **summed, **held)

    def prefetch(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            if key not in self._tiers[0]:
                self._fetches.put(partial(self._fetch, key), wait=False)

    def credit(self, key: ChunkKey, worth: float) -> None:
        for tier in self._tiers:
            tier.credit(key, worth)

    def pin(self, key: ChunkKey, pinned: bool = True) -> None:
        for tier in self._tiers:
            tier.pin(key, pinned)

    def catch_up(self) -> None:
        if self._put_off:
            with self._lock:
                put_off, self._put_off = self._put_off, []
            self._write_below(put_off, near=True, wait=False)
        self._tiers[0].catch_up()

    def flush(self) -> None:
        self.catch_up()
        self._fetches.flush()
        self._writes_behind.flush()
        with self._lock:
            keys, self._near_only = self._near_only, {}
        for key in keys:
            self._write_down(key, self._tiers)
        for tier in self._tiers:
            tier.flush()

    def near_only(self) -> frozenset[ChunkKey]:
        with self._lock:
            return frozenset(self._near_only)

    def close(self) -> None:
        if not self._through:
            self._demote_all()
        self.flush()
        self._finalizer()
        for tier in self._tiers:
            tier.close()

    def tiers(self) -> dict[str, Store]:
        named: dict[str, Store] = {}
        for single in self._tiers:
            for name, tier in single.tiers().items():
                same = sum(re.fullmatch(rf"{name}\d*", other) is not None for other in named)
                named[f"{name}{same + 1}" if same else name] = tier
        return named

    def __contains__(self, key: ChunkKey) -> bool:
        return any(key in tier for tier in self._tiers)

    def _put_off_below(self, key: ChunkKey, kv: ChunkKV) -> None:
        """Write an entry to the tiers below when `catch_up` is called, or too many wait for it."""
        with self._lock:
            self._put_off.append((key, kv))
            too_many = len(self._put_off) > _PUT_OFF
        if too_many:
            self.catch_up()

    def _write_below(self, entries: Sequence[tuple[ChunkKey, ChunkKV]], near: bool, wait: bool = True) -> bool:
        """Queue the writes to the tiers below the nearest, which has the entries if `near`.

        Returns:
            False if they were not queued.
        """
        tiers = self._tiers[1:]
        if not tiers:
            return False
        queued = self._writes_behind.put(partial(self._write_all, entries), wait)
        if not queued:
            for tier in tiers:
                tier.count(refused=len(entries))
            tiers[0].warn_once("the queue of writes to it is full: some entries are kept in the nearest tier only")
            for key, _ in entries if near else ():
                self._remember_near_only(key)
        return queued

    def _write_all(self, entries: Sequence[tuple[ChunkKey, ChunkKV]]) -> None:
        """Write entries to all tiers below the nearest; what one copied off an accelerator, the next one takes."""
        for key, kv in entries:
            for tier, below in zip(self._tiers, self._tiers[1:], strict=False):
                if kv.ready and isinstance(tier, MemoryStore):
                    kv = tier.copy_of(key) or kv
                below.put(key, kv)
        self._tiers[-1].catch_up()

    def _remember_near_only(self, key: ChunkKey) -> None:
        with self._lock:
            self._near_only[key] = None
            if len(self._near_only) > _NEAR_ONLY:
                del self._near_only[next(iter(self._near_only))]

    def _write_down(self, key: ChunkKey, tiers: Sequence[Tier]) -> None:
        """Write the entry under `key` to those tiers that lie below the nearest that has it, and lack it."""
        for index, tier in enumerate(tiers):
            if key in tier and (kv := tier.peek(key)) is not None:
                for below in tiers[index + 1 :]:
                    if key not in below:
                        below.put(key, kv)
                return

    def _promoting(self, key: ChunkKey, kv: ChunkKV, found_in: int) -> ChunkKV:
        """Return `kv`, whose layers are kept as they are read, and put into the nearer tiers after the last."""

        def promote(layers: tuple[Layer, ...], ready: tuple[Ready, ...] = ()) -> None:
            whole = replace(kv.of_layers(layers), ready=ready)
            self._fetches.put(lambda: self._write_nearer(found_in, key, whole), wait=False)

        if isinstance(kv.layers, PinnedLayers):  # its copy on the device is kept there
            return replace(kv, layers=WantedLayers(kv.layers, promote))
        return replace(kv, layers=PromotingLayers(kv, promote))

    def _fetch(self, key: ChunkKey) -> None:
        for index, tier in enumerate(self._tiers):
            kv = tier.peek(key)
            if kv is None:
                continue
            try:
                whole = kv.loaded()
            except EntryLostError:
                continue  # counted by the tier; perhaps one below has it
            self._write_nearer(index, key, whole)
            return

    def _write_nearer(self, found_in: int, key: ChunkKey, kv: ChunkKV) -> None:
        """Write an entry to those tiers above the one that it was found in that lack it, nearest first.

        A memory tier takes what is on the accelerator by then: so it is page-locked there.
        """
        for tier in self._tiers[:found_in]:
            if key not in tier:
                tier.put(key, kv)
            if isinstance(tier, DeviceStore):
                kv = tier.copy_of(key) or kv
            tier.catch_up()

    def _demote_all(self) -> None:
        for tier, below in zip(self._tiers, self._tiers[1:], strict=False):
            if isinstance(tier, MemoryStore):  # the others keep what they have
                for entry in list(tier.entries()):
                    self._write_down(entry.key, [tier, below])


def _close_all(*queues: WriteBehind) -> None:
    for tasks in queues:
        tasks.close()


def _demote(writes: WriteBehind, below: Tier, key: ChunkKey, kv: ChunkKV) -> None:
    """Write an evicted entry to the tier below, unless it is there."""

    def write() -> None:
        if key not in below:
            below.put(key, kv)
            below.catch_up()

    if not writes.put(write, wait=False):
        below.count(refused=1)


class PromotingLayers(LazyLayers):
    """Layers that are kept once they have been read; when all have been, `on_all` is called with them."""

    def __init__(self, kv: ChunkKV, on_all: Callable[[tuple[Layer, ...]], None]) -> None:
        super().__init__(kv.shapes, isinstance(kv.layers, LazyLayers) and kv.layers.waits)
        self._layers: Sequence[Layer] = kv.layers
        self._on_all = on_all
        self._read: dict[int, Layer] = {}

    def read(self, index: int) -> Layer:
        if index not in self._read:
            self._read[index] = self._layers[index]
            if len(self._read) == len(self):
                self._layers = tuple(self._read[i] for i in range(len(self)))  # what they came from can be let go
                self._on_all(self._layers)
        return self._read[index]
