"""The interface of a store, and what every tier does alike: counting, verified hits, and standing faults.

A tier implements `_read`, `_write`, `_remove`, `_entries` and `__contains__`. Nothing that goes wrong in one reaches
the caller: an entry that is missing, foreign or damaged is a counted miss, and so is every entry while the tier
itself is in trouble.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.store.breaker import Breaker
from chunkcache.store.codec import find_codec
from chunkcache.store.tombs import Tombs

logger = logging.getLogger("chunkcache.store")
T = TypeVar("T")
Heads = Sequence[tuple[int, int]]


@dataclass
class StoreStats:
    """Counters of one store since it was opened; sizes are in bytes.

    Attributes:
        entries: chunk KV held now.
        nbytes: bytes held now.
        max_bytes: the byte budget, or None without one.
        hits: verified reads that found their entry; those of which a layer then proved damaged or out of reach are
            misses.
        misses: reads that did not, for whichever reason.
        mismatches: entries found under the right key but with other token ids or shapes, and deleted; or sealed with
            another secret.
        damaged: entries that failed verification, and were deleted.
        expired: entries found past their time to live, and deleted.
        writes: entries stored.
        refused: entries not stored: too large, not admitted, deleted meanwhile, or the queue to the tier was full.
        evictions: entries dropped to make room.
        errors: operations that failed because the tier is in trouble.
        skipped: operations not tried since the tier was in trouble a moment ago.
    """

    entries: int = 0
    nbytes: int = 0
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    mismatches: int = 0
    damaged: int = 0
    expired: int = 0
    writes: int = 0
    refused: int = 0
    evictions: int = 0
    errors: int = 0
    skipped: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as a plain dict for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """What a store knows of one entry without reading its KV; sizes in bytes, times in seconds since the epoch.

    `model`, `tenant`, `documents` and `chunks` are as in `Origin`; `used` and `uses` are 0 where a tier does not know
    them.
    """

    key: ChunkKey
    nbytes: int
    tokens: int
    model: str = ""
    tenant: str = ""
    documents: tuple[str, ...] = ()
    chunks: tuple[str, ...] = ()
    created: float = 0.0
    used: float = 0.0
    uses: float = 0.0
    pinned: bool = False
    expires: float | None = None
    compute_s: float = 0.0

    @classmethod
    def of(cls, key: ChunkKey, kv: ChunkKV, expires: float | None = None) -> Entry:
        """Describe `kv` as it is stored now."""
        o, now = kv.origin, time.time()
        return cls(
            key,
            nbytes=kv.nbytes,
            tokens=len(kv),
            model=o.model,
            tenant=o.tenant,
            documents=o.documents,
            chunks=o.chunks,
            created=o.created or now,
            used=now,
            expires=expires,
            compute_s=o.compute_s,
        )


@dataclass(frozen=True)
class EntryFilter:
    """Which entries: those that agree with everything that is set. Nothing set means all.

    `tenant` and `document` are labels (see `chunkcache.kv.label`), `model` is a fingerprint, `chunk` a `chunk_name`.
    What was computed behind a chunk, and so looked at it, counts as computed from it and from its documents.
    """

    model: str | None = None
    tenant: str | None = None
    document: str | None = None
    chunk: str | None = None

    def matches(self, entry: Entry) -> bool:
        """Return whether `entry` is one of them."""
        return (
            self.model in (None, entry.model)
            and self.tenant in (None, entry.tenant)
            and (self.document is None or self.document in entry.documents)
            and (self.chunk is None or self.chunk in entry.chunks)
        )


EVERYTHING = EntryFilter()


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
        """Remove every entry that agrees with `where`, for good as `delete` does; return how many there were."""

    @abstractmethod
    def __contains__(self, key: ChunkKey) -> bool: ...

    @abstractmethod
    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        """Yield what is held and agrees with `where`, in no order."""

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

    def flush(self) -> None:  # noqa: B027
        """Wait until everything that was put is where it belongs."""

    def close(self) -> None:  # noqa: B027
        """Release what the store holds; it is not used afterwards."""

    def tiers(self) -> dict[str, Store]:
        """Return the tiers that this store is made of, nearest first, by name; itself if it is one."""
        return {type(self).__name__.removesuffix("Store").lower(): self}

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tier(Store):
    """One tier: counts, verifies what is read, and stands faults.

    Attributes:
        faults: exceptions by which the tier says that it is in trouble.
        waits: whether who reads from it waits for others more than they copy, and had better do it in a thread.
        breaker: open for a while after a fault.
        write_breaker: the same for writing alone: from a tier that is full one can still read.
    """

    faults: ClassVar[tuple[type[Exception], ...]] = ()
    waits: ClassVar[bool] = False

    def __init__(self, max_bytes: int | None = None, codec: str = "raw", ttl: float | None = None) -> None:
        if ttl is not None and not ttl > 0:
            raise StoreURLError(f"ttl={ttl} is no time to live; pass seconds, such as 86400")
        self._codec = find_codec(codec)
        self._ttl = ttl
        self.breaker = Breaker()
        self.write_breaker = Breaker()
        self._stats = StoreStats(max_bytes=max_bytes)
        self._stats_lock = threading.Lock()
        self._tombs = Tombs()
        self._said: set[str] = set()

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        wanted = None if token_ids is None else tuple(token_ids)
        kv = self._attempt(lambda: self._looked_up(key, wanted, heads), None)
        self.count(hits=kv is not None, misses=kv is None)
        return kv

    def put(self, key: ChunkKey, kv: ChunkKV) -> bool:
        entry = Entry.of(key, kv)
        if self._buried(entry):
            self.count(refused=1)
            return False
        try:
            stored = self._attempt(lambda: self._write(key, kv), None, self.write_breaker)
        except EntryLostError:  # `kv` streams out of another tier, which has counted it
            return False
        if stored and self._buried(entry):  # deleted while it was being written
            stored = self._attempt(lambda: self._remove(key), False) and False
        self.count(writes=stored is True, refused=stored is False)
        return stored is True

    def peek(self, key: ChunkKey) -> ChunkKV | None:
        """Return the entry under `key`, whatever its token ids, without counting a hit or a miss."""
        return self._attempt(lambda: self._verified(key), None)

    def delete(self, key: ChunkKey) -> bool:
        self._tombs.bury(key.digest)
        return self._attempt(lambda: self._remove(key), False)

    def purge(self, where: EntryFilter = EVERYTHING) -> int:
        self._tombs.bury(where)
        return self._attempt(lambda: sum(self._remove(entry.key) for entry in list(self._entries(where))), 0)

    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        found: list[Entry] = self._attempt(lambda: list(self._entries(where)), [])
        yield from found

    def stats(self) -> StoreStats:
        held = [entry.nbytes for entry in self.entries()]
        with self._stats_lock:
            return replace(self._stats, entries=len(held), nbytes=sum(held))

    def fits(self, nbytes: int) -> bool:
        """Return whether an entry of `nbytes` is within the whole budget."""
        budget = self._stats.max_bytes
        if budget is None or nbytes <= budget:
            return True
        self.say_once(
            "a chunk KV of %d bytes is larger than the budget of %d: not stored; raise max_bytes", nbytes, budget
        )
        return False

    def count(self, **more: int) -> None:
        """Add to the counters."""
        with self._stats_lock:
            for name, number in more.items():
                setattr(self._stats, name, getattr(self._stats, name) + number)

    def say_once(self, message: str, *values: object) -> None:
        """Log a warning, the first time only."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)

    def lose(self, key: ChunkKey, why: str) -> None:
        """Delete an entry that failed verification, and count it."""
        logger.warning("%s: entry %s is damaged (%s): deleted", type(self).__name__, key, why)
        self.count(damaged=1)
        self._attempt(lambda: self._remove(key), False)

    def _attempt(self, operation: Callable[[], T], otherwise: T, breaker: Breaker | None = None) -> T:
        """Run `operation` unless the breaker is open; a fault opens it, is counted, and logged if it is the first."""
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
        """Take note of a fault of the tier."""
        self.count(errors=1)
        breaker = breaker or self.breaker
        if breaker.failed():
            logger.warning(
                "%s is in trouble (%s): requests go on without it, and it is tried again every %g s",
                type(self).__name__,
                type(fault).__name__,  # its text may name hosts, paths and users
                breaker.pause_s,
            )

    def _looked_up(self, key: ChunkKey, token_ids: tuple[int, ...] | None, heads: Heads | None) -> ChunkKV | None:
        kv = self._verified(key, token_ids, heads)
        self._note(key, hit=kv is not None)
        return kv

    def _verified(
        self, key: ChunkKey, token_ids: tuple[int, ...] | None = None, heads: Heads | None = None
    ) -> ChunkKV | None:
        try:
            kv = self._read(key)
        except EntryLostError as lost:
            self.lose(key, str(lost))
            return None
        if kv is None:
            return None
        if self._buried(Entry.of(key, kv)):  # the tier could not be reached when it was deleted
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

    def _buried(self, entry: Entry) -> bool:
        """Return whether an entry was deleted after its KV were computed."""
        return self._tombs.cover(entry.key.digest, entry.created, lambda where: where.matches(entry))

    def _expiry(self, kv: ChunkKV) -> float | None:
        """Return when `kv` expires, wherever it was kept before; None for never."""
        return None if self._ttl is None else (kv.origin.created or time.time()) + self._ttl

    def _note(self, key: ChunkKey, hit: bool) -> None:
        """Take note that the entry under `key` was asked for, and whether it was there."""

    @abstractmethod
    def _read(self, key: ChunkKey) -> ChunkKV | None:
        """Return the entry under `key`, or None; raise `EntryLostError` if it is damaged."""

    @abstractmethod
    def _write(self, key: ChunkKey, kv: ChunkKV) -> bool:
        """Keep `kv`, which fits the budget on its own, replacing an entry of the same key; False if it is refused."""

    @abstractmethod
    def _remove(self, key: ChunkKey) -> bool:
        """Drop the entry under `key`; False if there was none."""

    @abstractmethod
    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        """Yield the entries held that agree with `where`."""
