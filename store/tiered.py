"""Several tiers as one store: near ones small and fast, far ones large and lasting.

What is put goes to the nearest tier at once and to the others behind the request; what is found far off is
promoted as it streams past; what the nearest tiers evict stays in those below.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Layer, LazyLayers
from chunkcache.store.base import EVERYTHING, Entry, EntryFilter, Heads, Store, StoreStats, Tier
from chunkcache.store.behind import WriteBehind
from chunkcache.store.memory import MemoryStore

WAIT_S = 0.05
_SUMMED = ("hits", "mismatches", "damaged", "expired", "evictions", "errors", "skipped")


class TieredStore(Store):
    """Tiers in order, nearest first.

    Args:
        tiers: the tiers.
        write: `through` writes every entry to all tiers; `evict` writes it to the nearest, and further down only when
            it has to leave there or the store is closed.
        queue: chunk KV that may wait to be written to tiers below the nearest. When it is full, `put` waits
            50 ms for a place, and then goes without the other tiers, which is counted as refused.

    Raises:
        StoreURLError: there are no tiers, or `write` is neither.
    """

    def __init__(self, tiers: Sequence[Store], write: str = "through", queue: int = 16) -> None:
        if not tiers:
            raise StoreURLError("tiered: needs at least one tier, as in tiered:memory://|disk:///var/cache/kv")
        if write not in ("through", "evict"):
            raise StoreURLError(f"write={write!r} is neither 'through' nor 'evict'")
        if wrong := [type(tier).__name__ for tier in tiers if not isinstance(tier, Tier)]:
            raise StoreURLError(f"tiered: takes single tiers, not {', '.join(wrong)}")
        self._tiers = [tier for tier in tiers if isinstance(tier, Tier)]
        self._through = write == "through"
        self._writes = self._refused = 0
        self._lock = threading.Lock()
        self._behind = WriteBehind(queue, WAIT_S)
        self._finalizer = weakref.finalize(self, WriteBehind.close, self._behind)  # also when the process ends
        for tier, below in zip(self._tiers, self._tiers[1:], strict=False):
            if isinstance(tier, MemoryStore):
                tier.on_evict = _Demotion(self._behind, below)

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        for index, tier in enumerate(self._tiers):
            kv = tier.get(key, token_ids, heads)
            if kv is not None:
                return kv if index == 0 else self._promoting(key, kv, index)
        return None

    def put(self, key: ChunkKey, kv: ChunkKV) -> bool:
        if not kv.origin.created:  # or a deletion could not tell what it is older than
            kv = replace(kv, origin=replace(kv.origin, created=time.time()))
        stored = self._tiers[0].put(key, kv)
        if self._through or not stored:
            stored = self._write_below(self._tiers[1:], key, kv) or stored
        with self._lock:
            self._writes += stored
            self._refused += not stored
        return stored

    def delete(self, key: ChunkKey) -> bool:
        return sum(tier.delete(key) for tier in self._tiers) > 0

    def purge(self, where: EntryFilter = EVERYTHING) -> int:
        gone = {entry.key for tier in self._tiers for entry in tier.entries(where)}
        for tier in self._tiers:
            tier.purge(where)
        return len(gone)

    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        seen: set[ChunkKey] = set()
        for tier in self._tiers:
            for entry in tier.entries(where):
                if entry.key not in seen:
                    seen.add(entry.key)
                    yield entry

    def stats(self) -> StoreStats:
        """Return the counters: entries of the fullest tier, bytes and what went wrong of all tiers together."""
        each = [tier.stats() for tier in self._tiers]
        summed = {name: sum(getattr(stats, name) for stats in each) for name in _SUMMED}
        misses = each[0].hits + each[0].misses - summed["hits"]  # all begin at the nearest, and one of them has it
        held = {"entries": max(s.entries for s in each), "nbytes": sum(s.nbytes for s in each)}
        return StoreStats(misses=misses, writes=self._writes, refused=self._refused, **summed, **held)

    def prefetch(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            if key not in self._tiers[0]:
                self._behind.put(lambda key=key: self._fetch(key), wait=False)  # type: ignore[misc]

    def credit(self, key: ChunkKey, worth: float) -> None:
        for tier in self._tiers:
            tier.credit(key, worth)

    def pin(self, key: ChunkKey, pinned: bool = True) -> None:
        for tier in self._tiers:
            tier.pin(key, pinned)

    def flush(self) -> None:
        self._behind.flush()

    def close(self) -> None:
        if not self._through:
            self._demote_all()
        self._finalizer()
        for tier in self._tiers:
            tier.close()

    def tiers(self) -> dict[str, Store]:
        named: dict[str, Store] = {}
        for each in self._tiers:
            for name, tier in each.tiers().items():
                same = sum(re.fullmatch(rf"{name}\d*", other) is not None for other in named)
                named[f"{name}{same + 1}" if same else name] = tier
        return named

    def __contains__(self, key: ChunkKey) -> bool:
        return any(key in tier for tier in self._tiers)

    def _write_below(self, tiers: Sequence[Tier], key: ChunkKey, kv: ChunkKV) -> bool:
        if not tiers:
            return False
        queued = self._behind.put(lambda: [tier.put(key, kv) for tier in tiers])
        if not queued:
            for tier in tiers:
                tier.count(refused=1)
            tiers[0].say_once("the queue of writes to it is full: some entries are kept in the nearest tier only")
        return queued

    def _promoting(self, key: ChunkKey, kv: ChunkKV, found_in: int) -> ChunkKV:
        """Return `kv`, whose layers are kept as they are read, and put into the nearer tiers after the last."""

        def promote(layers: tuple[Layer, ...]) -> None:
            whole = kv.of_layers(layers)
            self._behind.put(lambda: [t.put(key, whole) for t in self._tiers[:found_in] if key not in t], wait=False)

        return replace(kv, layers=_Kept(kv, promote))

    def _fetch(self, key: ChunkKey) -> None:
        for index, tier in enumerate(self._tiers):
            kv = tier.peek(key)
            if kv is None:
                continue
            try:
                whole = kv.loaded()
            except EntryLostError:
                continue  # counted by the tier; perhaps one below has it
            for nearer in self._tiers[:index]:
                nearer.put(key, whole)
            return

    def _demote_all(self) -> None:
        for tier, below in zip(self._tiers, self._tiers[1:], strict=False):
            for entry in list(tier.entries()) if isinstance(tier, MemoryStore) else ():  # others keep what they have
                kv = tier.peek(entry.key) if entry.key not in below else None
                if kv is not None:
                    below.put(entry.key, kv)


class _Demotion:
    """Writes what one tier evicts to the one below, unless it is there."""

    def __init__(self, behind: WriteBehind, below: Tier) -> None:
        self._behind, self._below = behind, below

    def __call__(self, key: ChunkKey, kv: ChunkKV) -> None:
        if not self._behind.put(lambda: key in self._below or self._below.put(key, kv), wait=False):
            self._below.count(refused=1)


class _Kept(LazyLayers):
    """Layers that stay once they have been read, and are handed on when all have been."""

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
