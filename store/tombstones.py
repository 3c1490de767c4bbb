"""Tombstones: what was deleted when, so that no KV that were computed before are stored afterwards."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections import OrderedDict
from itertools import product, takewhile
from typing import Any

from chunkcache.kv import ChunkKey, Origin
from chunkcache.store.records import EntryFilter

KEPT = 10_000  # tombstones kept, in memory of keys and of filters each; the oldest go first


class Tombstones:
    """Deletions of single keys and of all that a filter selects; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: OrderedDict[ChunkKey, float] = OrderedDict()  # both in the order of time
        self._filters: OrderedDict[EntryFilter, float] = OrderedDict()

    def add(self, what: ChunkKey | EntryFilter) -> None:
        """Record that the entry under a key, or all that a filter selects, are deleted now."""
        tombstones: OrderedDict[Any, float] = self._keys if isinstance(what, ChunkKey) else self._filters
        with self._lock:
            tombstones[what] = time.time()
            tombstones.move_to_end(what)
            if len(tombstones) > KEPT:
                tombstones.popitem(last=False)

    def is_deleted(self, key: ChunkKey, origin: Origin) -> bool:
        """Return whether KV of this key and origin have been deleted since they were computed."""
        created = origin.created
        with self._lock:
            if created <= self._keys.get(key, -math.inf):
                return True
            since = takewhile(lambda tombstone: created <= tombstone[1], reversed(self._filters.items()))
            return any(where.matches(origin) for where, _ in since)


class TombstoneTable:
    """The same in the table `tombs` of an SQLite database, for every process that shares it.

    Args:
        db: the database, in autocommit mode.
        lock: held while it is used.
    """

    SCHEMA = """
    CREATE TABLE IF NOT EXISTS tombs (what TEXT PRIMARY KEY, at REAL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS by_death ON tombs (at);
    """

    def __init__(self, db: sqlite3.Connection, lock: threading.RLock) -> None:
        self._db, self._lock = db, lock

    def add(self, what: ChunkKey | EntryFilter) -> None:
        """Record a deletion; see `Tombstones.add`."""
        now, parts = time.time(), [what] if isinstance(what, ChunkKey) else what.of_single_chunks()
        oldest = "(SELECT what FROM tombs ORDER BY at DESC LIMIT -1 OFFSET ?)"
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                self._db.executemany("REPLACE INTO tombs VALUES (?,?)", [(_name(part), now) for part in parts])
                self._db.execute(f"DELETE FROM tombs WHERE what IN {oldest}", (KEPT,))

    def is_deleted(self, key: ChunkKey, origin: Origin) -> bool:
        """Return whether KV were deleted, by any process, after they were computed; see `Tombstones.is_deleted`."""
        created = origin.created
        with self._lock:
            if self._db.execute("SELECT 1 FROM tombs WHERE at >= ? LIMIT 1", (created,)).fetchone() is None:
                return False
            fields = ((None, origin.model), (None, origin.tenant), (None, *origin.documents), (None, *origin.chunks))
            names = [_name(key), *(_name(EntryFilter(*values)) for values in product(*fields))]
            sql = "SELECT 1 FROM tombs WHERE what=? AND at>=?"
            return any(self._db.execute(sql, (name, created)).fetchone() for name in names)


def _name(what: ChunkKey | EntryFilter) -> str:
    return what.digest if isinstance(what, ChunkKey) else json.dumps(list(what.fields_of_tombstone().values()))
