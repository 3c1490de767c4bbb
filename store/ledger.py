"""The ledger of a tier that has a budget: what is held, since when, how often used; and who has to go for room.

It is an SQLite table, in memory for a tier in memory and in a file for a tier on disk, where several processes share
it. Losing it loses no entry: it can be written again from the entries themselves.

Where uses decide who goes, they outlive the entry: what is evicted, missed or credited while it is not held is a
ghost, and comes back with its history. Otherwise what returns would be the first to go again, however popular.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey
from chunkcache.store.base import Entry, EntryFilter

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, nbytes INTEGER, tokens INTEGER, model TEXT, tenant TEXT, documents TEXT, chunks TEXT,
    created REAL, used REAL, uses REAL, pinned INTEGER, expires REAL, compute_s REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_size ON entries (tenant, nbytes);
CREATE INDEX IF NOT EXISTS by_expiry ON entries (expires);
CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, times REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombs (what TEXT PRIMARY KEY, at REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_death ON tombs (at);
CREATE TABLE IF NOT EXISTS ghosts (key TEXT PRIMARY KEY, uses REAL, at REAL) WITHOUT ROWID;
"""
_VERSION = 1  # of these tables; not of `ghosts`, which older code leaves alone
_COLUMNS = tuple(field.name for field in fields(Entry))  # an entry's fields are the table's columns, in order
_MARKS = ", ".join("?" * len(_COLUMNS))
_ORDERS = {  # the first has to go first
    "lru": "used",
    "lfu": "uses, used",
    "cost": "uses * max(compute_s, 1e-9) / nbytes, used",
}
_INDEXES = {"lru": "by_use", "lfu": "by_uses", "cost": "by_cost"}  # each ledger makes its own: they cost every use
_BATCH = 64  # uses noted before they are written down
_AGE_AFTER = 10_000  # uses after which all counts are halved, so that what was popular once can go; at the latest
_AGE_LEAST = 32  # at the earliest; between them, where uses decide who goes, it is half as many as there are entries
_TOMBS = 10_000  # deletions remembered; the oldest go first
GHOSTS = 10_000
_LEAST = 0.5  # uses; a ghost that has aged below this is forgotten


class Ledger:
    """Entries of one tier, its budget and quotas; safe to use from several threads.

    Args:
        max_bytes: byte budget of the tier; None for none.
        evict: which entry goes first: `lru`, the least recently used; `lfu`, the least often used, lately; `cost`,
            that of the least such uses (and credit, such as Cache-Craft's 1/CFO) x recompute seconds / bytes.
        admit: `all` lets every entry in; `frequent` only if it was asked for, lately, at least as often as each that
            would have to go for it (TinyLFU, arXiv 1512.00727): what is used once flushes nothing that is used often.
        tenant_bytes: byte quota of each tenant; None for none. A tenant that is over it evicts its own entries.
        path: file of the table; None keeps it in memory.
        ghosts: how many keys that are not held are remembered with their uses, under a budget and `lfu` or `cost`.
            Those of the least uses are forgotten first.

    Raises:
        StoreURLError: `evict` or `admit` has no such value.
        sqlite3.OperationalError: the file cannot be used now.
        sqlite3.DatabaseError: it is damaged, or of another version.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        evict: str = "lru",
        admit: str = "all",
        tenant_bytes: int | None = None,
        path: Path | None = None,
        ghosts: int = GHOSTS,
    ) -> None:
        if evict not in _ORDERS:
            raise StoreURLError(f"evict={evict!r} is none of {', '.join(_ORDERS)}")
        if admit not in ("frequent", "all"):
            raise StoreURLError(f"admit={admit!r} is neither 'frequent' nor 'all'")
        self._order = _ORDERS[evict]
        self._frequent = admit == "frequent"
        self._max_bytes, self._tenant_bytes = max_bytes, tenant_bytes
        self._bounded = max_bytes is not None or tenant_bytes is not None
        self._ghosts = ghosts if self._bounded and evict != "lru" else 0
        self._lock = threading.RLock()
        self._uses: dict[str, tuple[float, float]] = {}  # key: uses and time of the last, not yet written
        self._credits: dict[str, float] = {}  # of those that are held, and those that are not
        self._missed: dict[str, int] = {}
        self._leaving: set[str] = set()  # for room or age: what is struck out otherwise is deleted, with its uses
        self._asked: dict[str, int] = {}
        self._noted = self._new_ghosts = 0
        self._worth = self._since_aged = self._since_aged_seen = 0.0
        self._last = 0.0
        self._db = sqlite3.connect(path or ":memory:", timeout=1.0, check_same_thread=False, isolation_level=None)
        self._close = weakref.finalize(self, self._db.close)
        self._db.text_factory = partial(str, encoding="utf-8", errors="replace")  # also what is damaged
        try:
            if path is not None:
                self._open_file()
            self._db.executescript(_SCHEMA)
            self._db.execute(f"CREATE INDEX IF NOT EXISTS {_INDEXES[evict]} ON entries ({self._order})")
            self._age_after = self._period()
        except sqlite3.Error:
            self._close()
            raise

    def add(self, entry: Entry) -> None:
        """Enter `entry`, replacing one of the same key but for its uses and its pin.

        One that was not held has the uses that are remembered of its key.
        """
        with self._lock:
            self._write_uses()
            entry = replace(entry, used=self._now(), uses=entry.uses + self._recall(entry.key))
            kept = ("key", "uses", "pinned")
            replaced = ", ".join(f"{name}=excluded.{name}" for name in _COLUMNS if name not in kept)
            sql = f"INSERT INTO entries VALUES ({_MARKS}) ON CONFLICT (key) DO UPDATE SET {replaced}"
            self._db.execute(sql, _row(entry))
            self._leaving.clear()  # room has been made

    def add_all(self, entries: Iterable[Entry]) -> None:
        """Enter many at once; those that are there stay as they are."""
        rows = [_row(replace(entry, used=entry.used or entry.created)) for entry in entries]
        with self._lock, self._transaction():
            self._db.executemany(f"INSERT OR IGNORE INTO entries VALUES ({_MARKS})", rows)

    def drop(self, key: ChunkKey) -> bool:
        """Strike out the entry under `key`; False if there was none."""
        with self._lock:
            uses, _ = self._uses.pop(key.digest, (0.0, 0.0))
            row = self._db.execute("SELECT uses FROM entries WHERE key=?", (key.digest,)).fetchone()
            if row is None:  # or it would wait until it may write, for nothing
                return False
            gone = self._db.execute("DELETE FROM entries WHERE key=?", (key.digest,)).rowcount > 0
            uses += row[0] + self._credits.pop(key.digest, 0.0)
            if key.digest in self._leaving and uses:
                self._credits[key.digest] = uses  # which makes it a ghost
            return gone

    def asked(self, key: ChunkKey) -> None:
        """Take note that `key` was asked for, whether or not it is held."""
        if not (self._ghosts or (self._frequent and self._bounded)):
            return
        with self._lock:
            if self._frequent:
                self._asked[key.digest] = self._asked.get(key.digest, 0) + 1
            if self._ghosts:
                self._missed[key.digest] = self._missed.get(key.digest, 0) + 1  # unless `use` follows
            self._note(1.0)

    def use(self, key: ChunkKey, worth: float = 1.0) -> None:
        """Take note of a use of the entry under `key`."""
        with self._lock:
            uses, _ = self._uses.get(key.digest, (0.0, 0.0))
            self._uses[key.digest] = (uses + worth, self._now())
            if self._missed and (missed := self._missed.pop(key.digest, 0)):
                if missed > 1:
                    self._missed[key.digest] = missed - 1
                return  # `asked` has noted it
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
        """Return what has to go so that `entry` fits, or None if it is not to be let in."""
        with self._lock:
            self._write_uses()
            going: dict[str, int] = {}
            for limit, tenant in ((self._tenant_bytes, entry.tenant), (self._max_bytes, None)):
                if limit is None or (tenant is not None and not tenant):
                    continue
                over = self._held(tenant, but=entry.key) + entry.nbytes - limit
                over -= sum(going.values())
                for key, nbytes in self._in_order(tenant, entry.key) if over > 0 else ():
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
            expired = [key for (key,) in self._db.execute("SELECT key FROM entries WHERE expires<?", (now,))]
            if self._ghosts:
                self._leaving.update(expired)
            return [ChunkKey(key) for key in expired]

    def bury(self, what: ChunkKey | EntryFilter) -> None:
        """Take note that the entry under a key, or all that agree with a condition, are deleted now."""
        with self._lock, self._transaction():
            self._db.execute("REPLACE INTO tombs VALUES (?,?)", (_name(what), time.time()))
            oldest = f"(SELECT at FROM tombs ORDER BY at DESC LIMIT 1 OFFSET {_TOMBS})"
            self._db.execute(f"DELETE FROM tombs WHERE at <= {oldest}")

    def buried(self, entry: Entry) -> bool:
        """Return whether `entry` was deleted, by any process, after its KV were computed."""
        with self._lock:
            if self._db.execute("SELECT 1 FROM tombs WHERE at >= ? LIMIT 1", (entry.created,)).fetchone() is None:
                return False
            fields = ((None, entry.model), (None, entry.tenant), (None, *entry.documents), (None, *entry.chunks))
            names = [_name(entry.key), *(_name(EntryFilter(*each)) for each in product(*fields))]
            sql = "SELECT 1 FROM tombs WHERE what=? AND at>=?"
            return any(self._db.execute(sql, (name, entry.created)).fetchone() for name in names)

    def known(self) -> set[ChunkKey]:
        """Return the keys of all entries."""
        with self._lock:
            return {ChunkKey(key) for (key,) in self._db.execute("SELECT key FROM entries")}

    def entries(self, where: EntryFilter) -> Iterator[Entry]:
        """Yield the entries that agree with `where`."""
        with self._lock:
            self._write_uses()
            wanted = {name: value for name, value in asdict(where).items() if value is not None}
            tests = {"document": "instr(documents, ?)", "chunk": "instr(chunks, ?)"}  # some too many; see below
            sql = " AND ".join(["SELECT * FROM entries WHERE 1", *(tests.get(name, f"{name}=?") for name in wanted)])
            rows = self._db.execute(sql, tuple(wanted.values())).fetchall()
        return (entry for entry in map(_entry, rows) if where.matches(entry))

    def totals(self) -> tuple[int, int]:
        """Return how many entries there are, and their bytes."""
        with self._lock:
            count, nbytes = self._db.execute("SELECT count(*), coalesce(sum(nbytes), 0) FROM entries").fetchone()
            return int(count), int(nbytes)

    def __contains__(self, key: ChunkKey) -> bool:
        with self._lock:
            return self._db.execute("SELECT 1 FROM entries WHERE key=?", (key.digest,)).fetchone() is not None

    def close(self) -> None:
        """Write down what was only noted, and close the table."""
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

    def _held(self, tenant: str | None, but: ChunkKey) -> int:
        condition, values = ("AND tenant=?", (but.digest, tenant)) if tenant is not None else ("", (but.digest,))
        sql = f"SELECT coalesce(sum(nbytes), 0) FROM entries WHERE key<>? {condition}"
        return int(self._db.execute(sql, values).fetchone()[0])

    def _in_order(self, tenant: str | None, but: ChunkKey) -> Iterator[tuple[str, int]]:
        condition, values = ("AND tenant=?", (but.digest, tenant)) if tenant is not None else ("", (but.digest,))
        sql = f"SELECT key, nbytes FROM entries WHERE key<>? AND NOT pinned {condition} ORDER BY {self._order}"
        return iter(self._db.execute(sql, values))

    def _admits(self, digest: str, going: dict[str, int]) -> bool:
        if not self._frequent or not going:
            return True
        asked = self._times(digest)
        return all(asked >= self._times(victim) for victim in going)

    def _times(self, digest: str) -> float:
        row = self._db.execute("SELECT times FROM seen WHERE key=?", (digest,)).fetchone()
        return row[0] if row else 0.0

    def _recall(self, key: ChunkKey) -> float:
        """Return the uses remembered of a key that is about to be held, and forget them."""
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


def _name(what: ChunkKey | EntryFilter) -> str:
    return what.digest if isinstance(what, ChunkKey) else json.dumps(astuple(what))


def _row(entry: Entry) -> tuple[object, ...]:
    values = {name: getattr(entry, name) for name in _COLUMNS}
    lists = {"documents": " ".join(entry.documents), "chunks": " ".join(entry.chunks)}
    return tuple({**values, "key": entry.key.digest, **lists}.values())


def _entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_COLUMNS, row, strict=True))
    lists = {name: tuple(values[name].split()) for name in ("documents", "chunks")}
    return Entry(**{**values, "key": ChunkKey(values["key"]), "pinned": bool(values["pinned"]), **lists})
