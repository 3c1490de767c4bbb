"""A tier whose budget a ledger keeps, in memory or on disk: evicting for room, uses, pins and totals."""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from chunkcache.kv import ChunkKey
from chunkcache.store.base import Tier
from chunkcache.store.records import Entry, EntryFilter

if TYPE_CHECKING:
    from chunkcache.store.ledger import Ledger
    from chunkcache.store.lru import LRULedger


class BudgetedTier(Tier):
    """A tier with a ledger, which knows all entries of it."""

    _ledger: Ledger | LRULedger

    def credit(self, key: ChunkKey, worth: float) -> None:
        self._attempt(lambda: self._ledger.credit(key, worth), None)

    def pin(self, key: ChunkKey, pinned: bool = True) -> None:
        self._attempt(lambda: self._ledger.pin(key, pinned), None)

    def _make_room(self, entry: Entry) -> bool:
        """Remove what has expired, and evict what has to go so that `entry` fits; False if it is not admitted."""
        for key in self._ledger.expired(time.time()):
            self.count(expired=self._remove(key))
        victims = self._ledger.victims(entry)
        for key in victims or ():
            self.count(evictions=self._evict(key))
        return victims is not None

    def _evict(self, key: ChunkKey) -> bool:
        return self._remove(key)

    def _note(self, key: ChunkKey, hit: bool) -> None:
        self._ledger.asked(key)
        if hit:
            self._ledger.use(key)

    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        return self._ledger.entries(where)

    def _totals(self) -> tuple[int, int]:
        return self._ledger.totals()
