"""The interface of a store, and what every tier does alike: it counts, verifies hits, and survives faults.

A tier implements `_read`, `_write`, `_remove`, `_entries` and `__contains__`. Nothing that goes wrong in one reaches
the caller: an entry that is missing, foreign or damaged is a counted miss, and so is every entry while the tier
itself is in trouble.
"""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

from chunkcache.errors import EntryLostError
from chunkcache.kv import ChunkKey, ChunkKV, Origin
from chunkcache.kv.transfer import marked
from chunkcache.store.breaker import Breaker
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.codec import find_codec
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter, StoreStats
from chunkcache.store.tombstones import Tombstones

logger = logging.getLogger("chunkcache.store")
T = TypeVar("T")
Heads = Sequence[tuple[int, int]]


class Store(ABC):
    """Keeps chunk KV under their keys; safe to use from several threads.

    No method raises because an entry is missing or bad, or because a tier is down.
    """

    @abstractmethod
    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        """Return the chunk KV under `key` if it is what it should be, else None (a counted miss).

        Args:
            key: the key.
            token_ids: the tokens that it must hold, exactly; None takes any.
            heads: (kv_heads, head_dim) of each layer of the model; None takes any.
        """

    @abstractmethod
    def put(self, key: ChunkKey, kv: ChunkKV) -> bool:
        """Store `kv` under `key`, evicting others for room; False if it was not stored."""

    @abstractmethod
    def delete(self, key: ChunkKey) -> bool:
        """Remove the entry under `key`, for good: no KV computed before now is stored under it again.

        Returns:
            False if there was none.
        """

    @abstractmethod
    def purge(self, where: EntryFilter = EVERYTHING) -> int:
        """Remove every entry that `where` selects, for good as `delete` does, by listing them once.

        Returns:
            how many there were.
        """

    @abstractmethod
    def __contains__(self, key: ChunkKey) -> bool:
        """Return whether there is an entry under `key` whose time to live is not over; counts no hit or miss."""

    @abstractmethod
    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        """Yield the entries held that `where` selects, in no order."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Return a snapshot of the counters."""

    def clear(self) -> None:
        """Remove every entry."""
        self.purge()

    def prefetch(self, keys: Iterable[ChunkKey]) -> None:  # noqa: B027 - a tier may have nothing to do
        """Start bringing `keys` nearer to the model; returns at once. A tier with nothing nearer ignores it."""

    def credit(self, key: ChunkKey, worth: float) -> None:  # noqa: B027
        """Add to the use frequency of an entry, held now or not, what a use of it was worth. See `evict=cost`."""

    def pin(self, key: ChunkKey, pinned: bool = True) -> None:  # noqa: B027
        """Keep the entry under `key` from being evicted, until it is unpinned by `pinned=False`."""

    def catch_up(self) -> None:  # noqa: B027
        """Start what was put off so as not to delay a request; called when its first token is there.

        That is copying KV from an accelerator. It returns at once. `flush` does the same, and waits.
        """

    def flush(self) -> None:  # noqa: B027
        """Wait until every entry that was put is in all its tiers; those of `near_only` are written now."""

    def near_only(self) -> frozenset[ChunkKey]:
        """Return keys of entries in near tiers whose write to the tiers below was refused; `flush` writes them."""
        return frozenset()

    def close(self) -> None:  # noqa: B027
        """Release what the store holds; it is not used afterwards."""

    def tiers(self) -> dict[str, Store]:
        """Return the tiers that this store is made of, nearest first, by name; itself if it is one."""
        return {self.kind: self}

    @property
    def kind(self) -> str:
        """What it is called, by its class."""
        return type(self).__name__.removesuffix("Store").lower()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Tier(Store):
    """One tier: counts, verifies entries that are read, and survives faults.

    Attributes:
        faults: exceptions that mean that the tier is in trouble.
        waits: whether reading is mostly waiting, and is better done in a thread.
        budget: what is kept.
        breaker: open for a while after a fault.
        write_breaker: the same for writes alone, since a full tier can still be read.
    """

    faults: ClassVar[tuple[type[Exception], ...]] = ()
    waits: ClassVar[bool] = False

    def __init__(self, budget: Budget = UNBOUNDED, codec: str = "raw") -> None:
        self.budget = budget
        self._codec = find_codec(codec)
        self.breaker = Breaker()
        self.write_breaker = Breaker()
        self._stats = StoreStats(max_bytes=budget.max_bytes)
        self._stats_lock = threading.Lock()
        self._tombstones = Tombstones()
        self._warned: set[str] = set()

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        wanted = None if token_ids is None else tuple(token_ids)
        kv = self._attempt(lambda: self._look_up(key, wanted, heads), None)
        self.count(hits=kv is not None, misses=kv is None)
        return None if kv is None else replace(kv, source=self.kind)

    def put(self, key: ChunkKey, kv: ChunkKV) -> bool:
        kv = marked(kv)
        entry = Entry.of(key, kv, self.budget.ttl)
        if self._is_deleted(key, entry):
            self.count(refused=1)
            return False
        try:
            stored = self._attempt(lambda: self._write(entry, kv), None, self.write_breaker)
        except EntryLostError:  # `kv` streams out of another tier, which has counted it
            return False
        if stored and self._is_deleted(key, entry):  # deleted while it was being written
            self._attempt(lambda: self._remove(key), False)
            stored = False
        self.count(writes=stored is True, refused=stored is False)
        return stored is True

    def peek(self, key: ChunkKey) -> ChunkKV | None:
        """Return the entry under `key`, whatever its token ids, without counting a hit or a miss."""
        return self._attempt(lambda: self._verified(key), None)

    def delete(self, key: ChunkKey) -> bool:
        self._record_deletion(key)
        return self._attempt(lambda: self._remove(key), False)

    def purge(self, where: EntryFilter = EVERYTHING) -> int:
        return len(self.purge_keys(where))

    def purge_keys(self, where: EntryFilter = EVERYTHING) -> set[ChunkKey]:
        """Remove entries as `purge` does; return their keys."""
        self._record_deletion(where)
        no_keys: set[ChunkKey] = set()
        return self._attempt(lambda: {e.key for e in list(self._entries(where)) if self._remove(e.key)}, no_keys)

    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        entries: list[Entry] = self._attempt(lambda: list(self._entries(where)), [])
        yield from entries

    def stats(self) -> StoreStats:
        entries, nbytes = self._totals()
        with self._stats_lock:
            return replace(self._stats, entries=entries, nbytes=nbytes)

    def fits(self, nbytes: int) -> bool:
        """Return whether an entry of `nbytes` is within the whole budget."""
        budget = self.budget.max_bytes
        if budget is None or nbytes <= budget:
            return True
        self.warn_once(
            "a chunk KV of %d bytes is larger than the budget of %d: not stored; raise max_bytes", nbytes, budget
        )
        return False

    def count(self, **more: int) -> None:
        """Add to the counters."""
        with self._stats_lock:
            for name, number in more.items():
                setattr(self._stats, name, getattr(self._stats, name) + number)

    def warn_once(self, message: str, *values: object) -> None:
        """Log a warning, the first time only."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)

    def drop_damaged(self, key: ChunkKey, why: str) -> None:
        """Delete an entry that failed verification, and count it."""
        logger.warning("%s: entry %s is damaged (%s): deleted", type(self).__name__, key, why)
        self.count(damaged=1)
        self._attempt(lambda: self._remove(key), False)

    def _attempt(self, operation: Callable[[], T], otherwise: T, breaker: Breaker | None = None) -> T:
        """Run `operation` unless the breaker is open; a fault is counted, and opens it."""
        breakers = [self.breaker] if breaker is None else [breaker, self.breaker]
        if not all(b.allows() for b in breakers):
            self.count(skipped=1)
            return otherwise
        try:
            result = operation()
        except self.faults as fault:
            self.trouble(fault, breakers[0])
            return otherwise
        for b in breakers:
            b.succeeded()
        return result

    def trouble(self, fault: Exception, breaker: Breaker | None = None) -> None:
        """Count a fault of the tier, and open its breaker."""
        self.count(errors=1)
        breaker = breaker or self.breaker
        if breaker.failed():
            logger.warning(
                "%s is in trouble (%s): requests go on without it, and it is tried again every %g s",
                type(self).__name__,
                type(fault).__name__,  # its text may name hosts, paths and users
                breaker.pause_s,
            )

    def _look_up(self, key: ChunkKey, token_ids: tuple[int, ...] | None, heads: Heads | None) -> ChunkKV | None:
        kv = self._verified(key, token_ids, heads)
        self._note(key, hit=kv is not None)
        return kv

    def _verified(
        self, key: ChunkKey, token_ids: tuple[int, ...] | None = None, heads: Heads | None = None
    ) -> ChunkKV | None:
        try:
            kv = self._read(key)
        except EntryLostError as lost:
            self.drop_damaged(key, str(lost))
            return None
        if kv is None:
            return None
        if kv.origin.created and self._is_deleted(key, kv.origin):  # the tier could not be reached then
            self._remove(key)
            return None
        wrong = "token ids" if token_ids is not None and kv.token_ids != token_ids else ""
        if heads is not None and kv.shapes != tuple((2, count, len(kv), dim) for count, dim in heads):
            wrong = wrong or "shapes"
        if wrong:
            logger.warning("entry %s holds other %s than its key says: deleted", key, wrong)
            self.count(mismatches=1)
            self._remove(key)
            return None
        return kv

    def _record_deletion(self, what: ChunkKey | EntryFilter) -> None:
        """Record that the entry under a key, or all that a filter selects, are deleted now."""
        self._tombstones.add(what)

    def _is_deleted(self, key: ChunkKey, origin: Origin) -> bool:
        """Return whether KV of this key and origin were deleted after they were computed."""
        return self._tombstones.is_deleted(key, origin)

    def _totals(self) -> tuple[int, int]:
        """Return how many entries there are, and their bytes; raises nothing."""
        held = [entry.nbytes for entry in self.entries()]
        return len(held), sum(held)

    def _note(self, key: ChunkKey, hit: bool) -> None:
        """Record that the entry under `key` was asked for, and whether it was there."""

    @abstractmethod
    def _read(self, key: ChunkKey) -> ChunkKV | None:
        """Return the entry under `key`, or None; raise `EntryLostError` if it is damaged."""

    @abstractmethod
    def _write(self, entry: Entry, kv: ChunkKV) -> bool:
        """Keep `kv`, described by `entry`, replacing an entry of the same key; False if it is refused."""

    @abstractmethod
    def _remove(self, key: ChunkKey) -> bool:
        """Drop the entry under `key`; False if there was none."""

    @abstractmethod
    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        """Yield the entries held that `where` selects."""
