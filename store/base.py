"""The interface of a store: one tier that keeps chunk KV under their keys.

A new tier implements five methods (`_read`, `_write`, `_remove`, `_keys`, `_bytes`) and gets verified hits,
counting and locking from here. A store never raises for a missing, foreign or damaged entry: that is a
counted miss, and the caller recomputes.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from chunkcache.kv import ChunkKey, ChunkKV

logger = logging.getLogger("chunkcache.store")


@dataclass
class StoreStats:
    """Counters of one store since it was opened; sizes are in bytes.

    Attributes:
        entries: chunk KV held now.
        nbytes: bytes held now.
        max_bytes: the byte budget, or None without one.
        hits: verified reads that found their entry.
        misses: reads that did not, `mismatches` included.
        mismatches: entries found under the right key but with other token ids, and deleted.
        writes: entries stored.
        refused: entries not stored because one alone is larger than the budget.
        evictions: entries dropped to make room.
    """

    entries: int = 0
    nbytes: int = 0
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    mismatches: int = 0
    writes: int = 0
    refused: int = 0
    evictions: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as a plain dict for JSON."""
        return asdict(self)


class Store(ABC):
    """Keeps chunk KV under their keys; safe to use from several threads."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self._lock = threading.RLock()
        self._stats = StoreStats(max_bytes=max_bytes)
        self._worth: dict[ChunkKey, float] = {}

    def get(self, key: ChunkKey, token_ids: Sequence[int]) -> ChunkKV | None:
        """Return the chunk KV under `key` if it holds exactly `token_ids`, else None (a counted miss)."""
        with self._lock:
            kv = self._read(key)
            if kv is not None and kv.token_ids != tuple(token_ids):
                logger.warning("entry %s holds other token ids than its key says: deleted", key)
                self._stats.mismatches += 1
                self._remove(key)
                kv = None
            if kv is None:
                self._stats.misses += 1
            else:
                self._stats.hits += 1
            return kv

    def put(self, key: ChunkKey, kv: ChunkKV) -> bool:
        """Store `kv` under `key`, evicting others for room; False if it is larger than the whole budget."""
        with self._lock:
            if self._stats.max_bytes is not None and kv.nbytes > self._stats.max_bytes:
                if not self._stats.refused:
                    logger.warning(
                        "a chunk KV of %d bytes is larger than the budget of %d: not stored; raise max_bytes",
                        kv.nbytes,
                        self._stats.max_bytes,
                    )
                self._stats.refused += 1
                return False
            self._write(key, kv)
            self._stats.writes += 1
            return True

    def delete(self, key: ChunkKey) -> bool:
        """Remove the entry under `key`; False if there was none."""
        with self._lock:
            return self._remove(key)

    def clear(self) -> None:
        """Remove every entry."""
        with self._lock:
            for key in list(self._keys()):
                self._remove(key)

    def prefetch(self, keys: Iterable[ChunkKey]) -> None:  # noqa: B027 - a tier may have nothing to do
        """Start bringing `keys` nearer to the model; returns at once. A tier with nothing nearer ignores it."""

    def credit(self, key: ChunkKey, worth: float) -> None:
        """Add to the worth of an entry that is held: what a use of it saved. See `evict=worth`."""
        with self._lock:
            if key in self._keys():
                self._worth[key] = self._worth.get(key, 0.0) + worth

    def __contains__(self, key: ChunkKey) -> bool:
        with self._lock:
            return key in self._keys()

    def stats(self) -> StoreStats:
        """Return a snapshot of the counters."""
        with self._lock:
            counters = {**asdict(self._stats), "entries": len(self._keys()), "nbytes": self._bytes()}
            return StoreStats(**counters)

    def close(self) -> None:  # noqa: B027 - a tier may hold nothing
        """Release what the store holds; it is not used afterwards."""

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _read(self, key: ChunkKey) -> ChunkKV | None:
        """Return the entry under `key`, marking it as used, or None."""

    @abstractmethod
    def _write(self, key: ChunkKey, kv: ChunkKV) -> None:
        """Keep `kv`, which fits the budget on its own, replacing an entry of the same key."""

    @abstractmethod
    def _remove(self, key: ChunkKey) -> bool:
        """Drop the entry under `key`; False if there was none."""

    @abstractmethod
    def _keys(self) -> Collection[ChunkKey]:
        """Return a sized container of the keys held."""

    @abstractmethod
    def _bytes(self) -> int:
        """Return the bytes held."""
