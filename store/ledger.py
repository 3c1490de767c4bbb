"""The ledger of a tier that has a budget: which entries it holds, their uses, and which are evicted for room.

It is an SQLite table, in memory for a tier in memory and in a file for a tier on disk, where several processes share
it. Losing it loses no entry: it can be written again from the entries themselves.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from chunkcache.kv import ChunkKey
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.frequency import UseCounts
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter
from chunkcache.store.tombstones import TombstoneTable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, nbytes INTEGER, tokens INTEGER, model TEXT, tenant TEXT, documents TEXT, chunks TEXT,
    created REAL, used REAL, uses REAL, pinned INTEGER, expires REAL, compute_s REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_size ON entries (tenant, nbytes);
CREATE INDEX IF NOT EXISTS by_expiry ON entries (expires);
"""
_VERSION = 1  # of these tables; not of `ghosts`, which older code leaves alone
_WAIT_S = 10.0  # for others that open the file
_BUSY_MS = 1000  # for others that use it
_COLUMNS = tuple(field.name for field in fields(Entry))  # the table has them in another order
_LISTS = ("documents", "chunks")  # columns of words with spaces between them
_INSERT = f"INTO entries ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_ORDERS = {  # by `Budget.evict`; the first is evicted first
    "lru": "used",
    "lfu": "uses, used",
    "cost": "uses * max(compute_s, 1e-9) / nbytes, used",
}
_INDEXES = {"lru": "by_use", "lfu": "by_uses", "cost": "by_cost"}  # each ledger makes its own: they cost every use


class Ledger:
    """Entries of one tier, its budget and quotas; safe to use from several threads.

    Args:
        budget: of the tier.
        path: file of the table; None keeps it in memory.

    Attributes:
        tombstones: what was deleted.

    Raises:
        sqlite3.OperationalError: the file cannot be used now.
        sqlite3.DatabaseError: it is damaged, or of another version.
    """

    def __init__(self, budget: Budget = UNBOUNDED, path: Path | None = None) -> None:
        self._budget = budget
        self._order = _ORDERS[budget.evict]
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path or ":memory:", timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
        self._close = weakref.finalize(self, self._db.close)
        self._db.text_factory = partial(str, encoding="utf-8", errors="replace")  # reads a damaged file, too
        self.tombstones = TombstoneTable(self._db, self._lock)
        self._counts = UseCounts(self._db, budget)
        try:
            if path is not None:
                self._open_file()
            self._db.executescript(_SCHEMA + TombstoneTable.SCHEMA + UseCounts.SCHEMA)
            self._db.execute(f"CREATE INDEX IF NOT EXISTS {_INDEXES[budget.evict]} ON entries ({self._order})")
            self._counts.start()
            self._db.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
        except sqlite3.Error:
            self._close()
            raise

    def add(self, entry: Entry) -> None:
        """Enter `entry`, replacing one of the same key but for its uses and pin; a ghost entry gives it its uses."""
        with self._lock:
            self._counts.write()
            entry = replace(entry, used=self._counts.now(), uses=entry.uses + self._counts.recall(entry.key.digest))
            kept = ("key", "uses", "pinned")
            replaced = ", ".join(f"{name}=excluded.{name}" for name in _COLUMNS if name not in kept)
            self._db.execute(f"INSERT {_INSERT} ON CONFLICT (key) DO UPDATE SET {replaced}", _row(entry))
            self._counts.leaving.clear()  # room has been made

    def add_all(self, entries: Iterable[Entry]) -> None:
        """Enter many at once; those that are there stay as they are."""
        rows = [_row(replace(entry, used=entry.used or entry.created)) for entry in entries]
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                self._db.executemany(f"INSERT OR IGNORE {_INSERT}", rows)

    def drop(self, key: ChunkKey) -> bool:
        """Remove the row of the entry under `key`; False if there was none."""
        with self._lock:
            row = self._db.execute("SELECT uses FROM entries WHERE key=?", (key.digest,)).fetchone()
            dropped = 0
            if row is not None:  # else a DELETE would wait for other writers
                dropped = self._db.execute("DELETE FROM entries WHERE key=?", (key.digest,)).rowcount
            self._counts.drop(key.digest, None if row is None else row[0])
            return dropped > 0

    def asked(self, key: ChunkKey) -> None:
        """Count a request for `key`, whether or not it is held."""
        with self._lock:
            self._counts.request(key.digest)

    def use(self, key: ChunkKey, worth: float = 1.0) -> None:
        """Count a use of the entry under `key`."""
        with self._lock:
            self._counts.use(key.digest, worth)

    def credit(self, key: ChunkKey, worth: float) -> None:
        """Add to the uses of the entry under `key`, held or not, which does not count as using it now."""
        with self._lock:
            self._counts.credit(key.digest, worth)

    def pin(self, key: ChunkKey, pinned: bool) -> None:
        """Keep the entry under `key` from being a victim, or no longer."""
        with self._lock:
            self._db.execute("UPDATE entries SET pinned=? WHERE key=?", (pinned, key.digest))

    def victims(self, entry: Entry) -> list[ChunkKey] | None:
        """Return what has to be evicted so that `entry` fits, or None if it is not admitted."""
        with self._lock:
            self._counts.write()
            going = self._budget.victims(
                entry.nbytes,
                entry.tenant,
                lambda tenant: self._others(entry, tenant, "coalesce(sum(nbytes), 0)").fetchone()[0],
                lambda tenant: self._others(entry, tenant, "key, nbytes", f"AND NOT pinned ORDER BY {self._order}"),
            )
            if going is None or not self._counts.admits(entry.key.digest, going):
                return None
            self._counts.leaving.update(going)
            return [ChunkKey(digest) for digest in going]

    def expired(self, now: float) -> list[ChunkKey]:
        """Return the keys of entries past their time to live."""
        with self._lock:
            expired = [key for (key,) in self._db.execute("SELECT key FROM entries WHERE expires<=?", (now,))]
            self._counts.leaving.update(expired)
            return [ChunkKey(key) for key in expired]

    def is_current(self, key: ChunkKey) -> bool | None:
        """Return whether the entry under `key` is within its time to live; None if there is no such entry."""
        with self._lock:
            sql = "SELECT expires IS NULL OR expires > ? FROM entries WHERE key=?"
            row = self._db.execute(sql, (time.time(), key.digest)).fetchone()
            return None if row is None else bool(row[0])

    def known_keys(self) -> set[ChunkKey]:
        """Return the keys of all entries."""
        with self._lock:
            return {ChunkKey(key) for (key,) in self._db.execute("SELECT key FROM entries")}

    def entries(self, where: EntryFilter = EVERYTHING) -> Iterator[Entry]:
        """Yield the entries that `where` selects."""
        tests = {"model=?": where.model, "tenant=?": where.tenant}
        tests |= {"instr(documents, ?)": where.document, "instr(chunks, ?)": where.chunk}
        if where.chunks is not None:
            tests["EXISTS (SELECT 1 FROM json_each(?) WHERE instr(chunks, value))"] = json.dumps(list(where.chunks))
        tests = {test: value for test, value in tests.items() if value is not None}
        sql = f"SELECT {', '.join(_COLUMNS)} FROM entries WHERE {' AND '.join(['1', *tests])}"
        with self._lock:
            self._counts.write()
            rows = self._db.execute(sql, tuple(tests.values())).fetchall()
        # `instr` finds parts of words as well, which `matches` leaves out.
        return (entry for entry in map(_entry, rows) if where.matches(entry))

    def totals(self) -> tuple[int, int]:
        """Return how many entries there are, and their bytes."""
        with self._lock:
            count, nbytes = self._db.execute("SELECT count(*), coalesce(sum(nbytes), 0) FROM entries").fetchone()
            return int(count), int(nbytes)

    def __contains__(self, key: ChunkKey) -> bool:
        return self.is_current(key) is not None

    def close(self) -> None:
        """Write what is kept in memory, and close the table."""
        with self._lock:
            self._counts.write()
            self._close()

    def _others(self, entry: Entry, tenant: str | None, what: str, rest: str = "") -> sqlite3.Cursor:
        """Select from the other entries of a tenant, or of all for None."""
        of_tenant, values = ("", ()) if tenant is None else ("AND tenant=?", (tenant,))
        sql = f"SELECT {what} FROM entries WHERE key<>? {of_tenant} {rest}"
        return self._db.execute(sql, (entry.key.digest, *values))

    def _open_file(self) -> None:
        self._use_wal()
        self._db.execute("PRAGMA synchronous=OFF")  # a ledger that a power cut damages is written again
        version, well = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "quick_check"))
        if version not in (0, _VERSION) or well != "ok":
            raise sqlite3.DatabaseError(f"version {version}, {well}")
        if version == 0:  # it is new
            self._db.execute(f"PRAGMA user_version={_VERSION}")

    def _use_wal(self) -> None:
        """Switch the journal over. While others open the same new file, SQLite refuses that without waiting."""
        end = time.monotonic() + _WAIT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)


def _row(entry: Entry) -> tuple[object, ...]:
    values = {**vars(entry), "key": entry.key.digest, **{name: " ".join(getattr(entry, name)) for name in _LISTS}}
    return tuple(values[name] for name in _COLUMNS)


def _entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=True))
    lists = {name: tuple(values[name].split()) for name in _LISTS}
    return Entry(**{**values, **lists, "key": ChunkKey(values["key"]), "pinned": bool(values["pinned"])})
