"""The ledger of a tier in memory that evicts what was used longest ago: a dictionary in the order of use.

It answers as `Ledger` does, which is for files, and for choices that need more than that order.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import replace

from chunkcache.kv import ChunkKey
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter


class LRULedger:
    """Entries of one tier, its budget and quotas; safe to use from several threads.

    Args:
        budget: of the tier.
    """

    def __init__(self, budget: Budget = UNBOUNDED) -> None:
        self._budget = budget
        self._lock = threading.RLock()
        self._entries: OrderedDict[ChunkKey, Entry] = OrderedDict()  # the one used last comes last
        self._nbytes: Counter[str | None] = Counter()  # by tenant; None for all

    def add(self, entry: Entry) -> None:
        """Enter `entry`, replacing one of the same key but for its uses and pin."""
        with self._lock:
            old = self._entries.get(entry.key)
            self._count(old, -1)
            self._count(entry, 1)
            uses, pinned = (entry.uses, entry.pinned) if old is None else (old.uses, old.pinned)
            self._entries[entry.key] = replace(entry, used=time.time(), uses=uses, pinned=pinned)
            self._entries.move_to_end(entry.key)

    def drop(self, key: ChunkKey) -> bool:
        """Remove the entry under `key`; False if there was none."""
        with self._lock:
            entry = self._entries.pop(key, None)
            self._count(entry, -1)
            return entry is not None

    def asked(self, key: ChunkKey) -> None:
        """Ignore a request for `key`: only uses count."""

    def use(self, key: ChunkKey, worth: float = 1.0) -> None:
        """Count a use of the entry under `key`."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries[key] = replace(entry, used=time.time(), uses=entry.uses + worth)
                self._entries.move_to_end(key)

    def credit(self, key: ChunkKey, worth: float) -> None:
        """Add to the uses of the entry under `key`, which does not count as using it now."""
        with self._lock:
            if key in self._entries:
                self._entries[key] = replace(self._entries[key], uses=self._entries[key].uses + worth)

    def pin(self, key: ChunkKey, pinned: bool) -> None:
        """Keep the entry under `key` from being a victim, or no longer."""
        with self._lock:
            if key in self._entries:
                self._entries[key] = replace(self._entries[key], pinned=pinned)

    def victims(self, entry: Entry) -> list[ChunkKey] | None:
        """Return what has to be evicted so that `entry` fits, or None if that cannot be."""
        with self._lock:
            old = self._entries.get(entry.key)

            def held(tenant: str | None) -> int:
                own = old.nbytes if old is not None and tenant in (None, old.tenant) else 0
                return self._nbytes[tenant] - own

            def candidates(tenant: str | None) -> Iterator[tuple[ChunkKey, int]]:
                for key, other in self._entries.items():
                    if key != entry.key and not other.pinned and tenant in (None, other.tenant):
                        yield key, other.nbytes

            return self._budget.victims(entry.nbytes, entry.tenant, held, candidates)

    def expired(self, now: float) -> list[ChunkKey]:
        """Return the keys of entries past their time to live."""
        with self._lock:
            return [key for key, entry in self._entries.items() if entry.expires is not None and entry.expires <= now]

    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        """Yield the entries that `where` selects."""
        with self._lock:
            entries = list(self._entries.values())
        return (entry for entry in entries if where.matches(entry))

    def totals(self) -> tuple[int, int]:
        """Return how many entries there are, and their bytes."""
        with self._lock:
            return len(self._entries), self._nbytes[None]

    def _count(self, entry: Entry | None, sign: int) -> None:
        if entry is not None:
            for tenant in (entry.tenant, None):
                self._nbytes[tenant] += sign * entry.nbytes
