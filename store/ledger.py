"""The ledger of a tier that has a budget: which entries it holds, their uses, and which are evicted for room.

It is an SQLite table, in memory for a tier in memory and in a file for a tier on disk, where several processes share
it. Losing it loses no entry: it can be written again from the entries themselves.

Where uses decide what is evicted, they outlive the entry: a key that is evicted, missed or credited while it is not
held is a ghost entry, and comes back with its uses. Otherwise it would be the first to go again, however popular.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from chunkcache.kv import ChunkKey
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter
from chunkcache.store.tombstones import TombstoneTable

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, nbytes INTEGER, tokens INTEGER, model TEXT, tenant TEXT, documents TEXT, chunks TEXT,
    created REAL, used REAL, uses REAL, pinned INTEGER, expires REAL, compute_s REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_size ON entries (tenant, nbytes);
CREATE INDEX IF NOT EXISTS by_expiry ON entries (expires);
CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, times REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ghosts (key TEXT PRIMARY KEY, uses REAL, at REAL) WITHOUT ROWID;
"""
_VERSION = 1  # of these tables; not of `ghosts`, which older code leaves alone
_COLUMNS = tuple(field.name for field in fields(Entry))  # the table has them in another order
_LISTS = ("documents", "chunks")  # columns of words with spaces between them
_INSERT = f"INTO entries ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_ORDERS = {  # by `Budget.evict`; the first is evicted first
    "lru": "used",
    "lfu": "uses, used",
    "cost": "uses * max(compute_s, 1e-9) / nbytes, used",
}
_INDEXES = {"lru": "by_use", "lfu": "by_uses", "cost": "by_cost"}  # each ledger makes its own: they cost every use
_BATCH = 64  # uses noted before they are written down
_AGE_AFTER = 10_000  # uses after which all counts are halved, so that what was popular once can go; at the latest
_AGE_LEAST = 32  # at the earliest; between them, where uses decide who goes, it is half as many as there are entries
_LEAST = 0.5  # uses; a ghost entry that has aged below this is forgotten


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
        self._counts_requests = budget.admit == "frequent" and budget.bounded
        self._ghosts = budget.ghosts if budget.bounded and budget.evict != "lru" else 0
        self._lock = threading.RLock()
        # What is not yet written, by key:
        self._uses: dict[str, tuple[float, float]] = {}  # uses, and time of the last
        self._credits: dict[str, float] = {}  # of keys held and not held
        self._missed: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._leaving: set[str] = set()  # evicted or expired: these keep their uses, other entries dropped do not
        self._noted = self._new_ghosts = 0
        self._worth = self._since_aged = self._since_aged_seen = 0.0
        self._last = 0.0
        self._db = sqlite3.connect(path or ":memory:", timeout=1.0, check_same_thread=False, isolation_level=None)
        self._close = weakref.finalize(self, self._db.close)
        self._db.text_factory = partial(str, encoding="utf-8", errors="replace")  # reads a damaged file, too
        self.tombstones = TombstoneTable(self._db, self._lock)
        try:
            if path is not None:
                self._open_file()
            self._db.executescript(_SCHEMA + TombstoneTable.SCHEMA)
            self._db.execute(f"CREATE INDEX IF NOT EXISTS {_INDEXES[budget.evict]} ON entries ({self._order})")
            self._age_after = self._period()
        except sqlite3.Error:
            self._close()
            raise

    def add(self, entry: Entry) -> None:
        """Enter `entry`, replacing one of the same key but for its uses and pin; a ghost entry gives it its uses."""
        with self._lock:
            self._write_uses()
            entry = replace(entry, used=self._now(), uses=entry.uses + self._recall(entry.key))
            kept = ("key", "uses", "pinned")
            replaced = ", ".join(f"{name}=excluded.{name}" for name in _COLUMNS if name not in kept)
            self._db.execute(f"INSERT {_INSERT} ON CONFLICT (key) DO UPDATE SET {replaced}", _row(entry))
            self._leaving.clear()  # room has been made

    def add_all(self, entries: Iterable[Entry]) -> None:
        """Enter many at once; those that are there stay as they are."""
        rows = [_row(replace(entry, used=entry.used or entry.created)) for entry in entries]
        with self._lock, self._transaction():
            self._db.executemany(f"INSERT OR IGNORE {_INSERT}", rows)

    def drop(self, key: ChunkKey) -> bool:
        """Remove the row of the entry under `key`; False if there was none."""
        with self._lock:
            uses, _ = self._uses.pop(key.digest, (0.0, 0.0))
            row = self._db.execute("SELECT uses FROM entries WHERE key=?", (key.digest,)).fetchone()
            if row is None:  # a DELETE would wait for other writers
                return False
            dropped = self._db.execute("DELETE FROM entries WHERE key=?", (key.digest,)).rowcount > 0
            uses += row[0] + self._credits.pop(key.digest, 0.0)
            if key.digest in self._leaving and uses:
                self._credits[key.digest] = uses  # written as a ghost entry
            return dropped

    def asked(self, key: ChunkKey) -> None:
        """Count a request for `key`, whether or not it is held."""
        if not (self._ghosts or self._counts_requests):
            return
        with self._lock:
            if self._counts_requests:
                self._asked[key.digest] = self._asked.get(key.digest, 0) + 1
            if self._ghosts:
                self._missed[key.digest] = self._missed.get(key.digest, 0) + 1  # unless `use` follows
            self._note(1.0)

    def use(self, key: ChunkKey, worth: float = 1.0) -> None:
        """Count a use of the entry under `key`."""
        with self._lock:
            uses, _ = self._uses.get(key.digest, (0.0, 0.0))
            self._uses[key.digest] = (uses + worth, self._now())
            if self._missed and (missed := self._missed.pop(key.digest, 0)):
                if missed > 1:
                    self._missed[key.digest] = missed - 1
                return  # `asked` has counted it
            self._note(min(worth, 1.0))

    def credit(self, key: ChunkKey, worth: float) -> None:
        """Add to the uses of the entry under `key`, held or not, which does not count as using it now."""
        with self._lock:
            self._credits[key.digest] = self._credits.get(key.digest, 0.0) + worth
            self._note(min(worth, 1.0))

    def pin(self, key: ChunkKey, pinned: bool) -> None:
        """Keep the entry under `key` from being a victim, or no longer."""
        with self._lock:
            self._db.execute("UPDATE entries SET pinned=? WHERE key=?", (pinned, key.digest))

    def victims(self, entry: Entry) -> list[ChunkKey] | None:
        """Return what has to be evicted so that `entry` fits, or None if it is not admitted."""
        with self._lock:
            self._write_uses()
            going: dict[str, int] = {}
            for limit, tenant in ((self._budget.tenant_bytes, entry.tenant), (self._budget.max_bytes, None)):
                if limit is None or tenant == "":
                    continue
                others = "key<>?" if tenant is None else "key<>? AND tenant=?"
                values = (entry.key.digest,) if tenant is None else (entry.key.digest, tenant)
                [held] = self._db.execute(f"SELECT coalesce(sum(nbytes), 0) FROM entries WHERE {others}", values)
                over = held[0] + entry.nbytes - limit - sum(going.values())
                sql = f"SELECT key, nbytes FROM entries WHERE {others} AND NOT pinned ORDER BY {self._order}"
                for key, nbytes in self._db.execute(sql, values) if over > 0 else ():
                    if key not in going:
                        going[key] = nbytes
                        over -= nbytes
                    if over <= 0:
                        break
                if over > 0 or not self._admits(entry.key.digest, going):
                    return None
            if self._ghosts:
                self._leaving.update(going)
            return [ChunkKey(digest) for digest in going]

    def expired(self, now: float) -> list[ChunkKey]:
        """Return the keys of entries past their time to live."""
        with self._lock:
            expired = [key for (key,) in self._db.execute("SELECT key FROM entries WHERE expires<=?", (now,))]
            if self._ghosts:
                self._leaving.update(expired)
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
            self._write_uses()
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
            self._write_uses()
            self._close()

    def _open_file(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=OFF")  # a ledger that a power cut damages is written again
        version, well = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "quick_check"))
        if version not in (0, _VERSION) or well != "ok":
            raise sqlite3.DatabaseError(f"version {version}, {well}")
        if version == 0:  # it is new
            self._db.execute(f"PRAGMA user_version={_VERSION}")

    def _admits(self, digest: str, going: dict[str, int]) -> bool:
        if not self._counts_requests or not going:
            return True
        asked = self._times(digest)
        return all(asked >= self._times(victim) for victim in going)

    def _times(self, digest: str) -> float:
        row = self._db.execute("SELECT times FROM seen WHERE key=?", (digest,)).fetchone()
        return row[0] if row else 0.0

    def _recall(self, key: ChunkKey) -> float:
        """Return the uses of the ghost entry under `key`, and remove it."""
        if not self._ghosts:
            return 0.0
        row = self._db.execute("SELECT uses FROM ghosts WHERE key=?", (key.digest,)).fetchone()
        if row is not None:
            self._db.execute("DELETE FROM ghosts WHERE key=?", (key.digest,))
        return row[0] if row else 0.0

    def _note(self, worth: float) -> None:
        self._noted += 1
        self._worth += worth
        if self._noted >= _BATCH:
            self._write_uses()

    def _write_uses(self) -> None:
        if not (self._uses or self._credits or self._missed or self._asked):
            return
        uses = [(worth, used, key) for key, (worth, used) in self._uses.items()]
        uses += [(worth, 0.0, key) for key, worth in self._credits.items()]
        asked, worth = list(self._asked.items()), self._worth
        ghosts = self._credits if self._ghosts else {}
        for key, times in self._missed.items():
            ghosts[key] = ghosts.get(key, 0.0) + times
        self._uses, self._credits, self._missed, self._asked, self._noted, self._worth = {}, {}, {}, {}, 0, 0.0
        with suppress(sqlite3.OperationalError), self._transaction():  # nobody who reads must fail for want of these
            self._db.executemany("UPDATE entries SET uses = uses + ?, used = max(used, ?) WHERE key=?", uses)
            self._db.executemany(
                "INSERT INTO seen VALUES (?,?) ON CONFLICT (key) DO UPDATE SET times = times + excluded.times",
                asked,
            )
            self._remember(ghosts)
            self._age(worth)

    def _remember(self, ghosts: dict[str, float]) -> None:
        """Add to the uses of those keys that are not held."""
        if not ghosts:
            return
        now = time.time()
        self._db.executemany(
            "INSERT INTO ghosts SELECT ?1, ?2, ?3 WHERE NOT EXISTS (SELECT 1 FROM entries WHERE key=?1)"
            " ON CONFLICT (key) DO UPDATE SET uses = uses + excluded.uses, at = excluded.at",
            [(key, worth, now) for key, worth in ghosts.items()],
        )
        self._new_ghosts += len(ghosts)
        if self._new_ghosts > self._ghosts // 10:  # counting them each time would take longer than all else
            self._new_ghosts = 0
            [over] = self._db.execute("SELECT max(count(*) - ?, 0) FROM ghosts", (self._ghosts,)).fetchone()
            least = "SELECT key FROM ghosts ORDER BY uses, at LIMIT ?"
            self._db.execute(f"DELETE FROM ghosts WHERE key IN ({least})", (over,))

    def _age(self, worth: float) -> None:
        """Halve the counts, if uses worth so much have made it time.

        A tier that is used as often as it has entries has seen most of them come and go: counts that are much older
        than that keep out what is wanted now, and lose to the order of use alone.
        """
        self._since_aged += worth
        if self._since_aged >= self._age_after:
            self._since_aged = 0.0
            self._db.execute("UPDATE entries SET uses = uses / 2")
            self._db.execute("UPDATE ghosts SET uses = uses / 2")
            self._db.execute("DELETE FROM ghosts WHERE uses < ?", (_LEAST,))
            self._age_after = self._period()
        self._since_aged_seen += worth
        if self._since_aged_seen >= _AGE_AFTER:
            self._since_aged_seen = 0.0
            self._db.execute("UPDATE seen SET times = times / 2")
            self._db.execute("DELETE FROM seen WHERE times < 1")

    def _period(self) -> int:
        """Return the uses after which counts are halved."""
        if not self._ghosts:
            return _AGE_AFTER
        [entries] = self._db.execute("SELECT count(*) FROM entries").fetchone()
        return int(min(max(entries // 2, _AGE_LEAST), _AGE_AFTER))

    def _transaction(self) -> sqlite3.Connection:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db  # as a context it commits, or rolls back

    def _now(self) -> float:
        """Return a time that is later than every one returned before."""
        self._last = max(time.time(), self._last + 1e-6)
        return self._last


def _row(entry: Entry) -> tuple[object, ...]:
    values = {**vars(entry), "key": entry.key.digest, **{name: " ".join(getattr(entry, name)) for name in _LISTS}}
    return tuple(values[name] for name in _COLUMNS)


def _entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=True))
    lists = {name: tuple(values[name].split()) for name in _LISTS}
    return Entry(**{**values, **lists, "key": ChunkKey(values["key"]), "pinned": bool(values["pinned"])})
