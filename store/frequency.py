"""How often keys are used and requested: counts in the ledger's database, written in batches.

Where uses decide what is evicted, they outlive the entry: a key that is evicted, missed or credited while it is not
held is a ghost entry, and comes back with its uses. Otherwise it would be the first to go again, however popular.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from contextlib import suppress

from chunkcache.store.budget import Budget

_BATCH = 64  # uses that are kept in memory before they are written
# Uses after which all counts are halved, so that an entry that was popular once can go: half as many as there are
# entries, within these bounds.
_AGE_LEAST, _AGE_AFTER = 32, 10_000
_LEAST = 0.5  # uses; a ghost entry that has aged below this is forgotten


class UseCounts:
    """Counts of one ledger, which holds its lock during each call.

    Args:
        db: the ledger's database, in autocommit mode.
        budget: of the tier.

    Attributes:
        leaving: keys evicted or expired: these keep their uses, other keys that are dropped do not.
    """

    SCHEMA = """
    CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, times REAL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS ghosts (key TEXT PRIMARY KEY, uses REAL, at REAL) WITHOUT ROWID;
    """

    def __init__(self, db: sqlite3.Connection, budget: Budget) -> None:
        self._db = db
        self._counts_requests = budget.admit == "frequent" and budget.bounded
        self._ghosts = budget.ghosts if budget.bounded and budget.evict != "lru" else 0
        self.leaving: set[str] = set()
        # What is not yet written, by key:
        self._uses: dict[str, tuple[float, float]] = {}  # uses, and time of the last
        self._credits: dict[str, float] = {}  # of keys held and not held
        self._missed: dict[str, int] = {}
        self._requests: dict[str, int] = {}
        self._noted = self._new_ghosts = self._age_after = 0
        self._worth = self._since_aged = self._since_aged_requests = self._last = 0.0

    def start(self) -> None:
        """Begin to count, when the tables are there."""
        self._age_after = self._period()

    def now(self) -> float:
        """Return a time that is later than every one returned before."""
        self._last = max(time.time(), self._last + 1e-6)
        return self._last

    def request(self, key: str) -> None:
        """Count a request for a key, held or not."""
        if self._counts_requests:
            self._requests[key] = self._requests.get(key, 0) + 1
        if self._ghosts:
            self._missed[key] = self._missed.get(key, 0) + 1  # unless `use` follows
        if self._counts_requests or self._ghosts:
            self._note(1.0)

    def use(self, key: str, worth: float) -> None:
        """Count a use of an entry."""
        uses, _ = self._uses.get(key, (0.0, 0.0))
        self._uses[key] = (uses + worth, self.now())
        if self._missed and (missed := self._missed.pop(key, 0)):
            if missed > 1:
                self._missed[key] = missed - 1
            return  # `request` has counted it
        self._note(min(worth, 1.0))

    def credit(self, key: str, worth: float) -> None:
        """Add to the uses of a key, held or not."""
        self._credits[key] = self._credits.get(key, 0.0) + worth
        self._note(min(worth, 1.0))

    def drop(self, key: str, uses: float | None) -> None:
        """Forget what is not yet written of an entry that is dropped and has `uses`; None if there was no entry."""
        unwritten, _ = self._uses.pop(key, (0.0, 0.0))
        if uses is None:
            return
        uses += unwritten + self._credits.pop(key, 0.0)
        if self._ghosts and key in self.leaving and uses:
            self._credits[key] = uses  # written as a ghost entry

    def recall(self, key: str) -> float:
        """Return the uses of the ghost entry under a key, and remove it."""
        if not self._ghosts:
            return 0.0
        row = self._db.execute("SELECT uses FROM ghosts WHERE key=?", (key,)).fetchone()
        if row is not None:
            self._db.execute("DELETE FROM ghosts WHERE key=?", (key,))
        return row[0] if row else 0.0

    def admits(self, key: str, victims: Iterable[str]) -> bool:
        """Return whether a key was requested as often as each victim, or requests do not count."""
        if not self._counts_requests:
            return True
        requests = self._times(key)
        return all(requests >= self._times(victim) for victim in victims)

    def write(self) -> None:
        """Write what is kept in memory."""
        if not (self._uses or self._credits or self._missed or self._requests):
            return
        uses = [(worth, used, key) for key, (worth, used) in self._uses.items()]
        uses += [(worth, 0.0, key) for key, worth in self._credits.items()]
        requests, worth = list(self._requests.items()), self._worth
        ghosts = self._credits if self._ghosts else {}
        for key, times in self._missed.items():
            ghosts[key] = ghosts.get(key, 0.0) + times
        self._uses, self._credits, self._missed, self._requests, self._noted, self._worth = {}, {}, {}, {}, 0, 0.0
        with suppress(sqlite3.OperationalError):  # readers must not fail for want of a write
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                self._db.executemany("UPDATE entries SET uses = uses + ?, used = max(used, ?) WHERE key=?", uses)
                self._db.executemany(
                    "INSERT INTO seen VALUES (?,?) ON CONFLICT (key) DO UPDATE SET times = times + excluded.times",
                    requests,
                )
                self._remember(ghosts)
                self._age(worth)

    def _note(self, worth: float) -> None:
        self._noted += 1
        self._worth += worth
        if self._noted >= _BATCH:
            self.write()

    def _times(self, key: str) -> float:
        row = self._db.execute("SELECT times FROM seen WHERE key=?", (key,)).fetchone()
        return row[0] if row else 0.0

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

        A tier that is used as often as it has entries has replaced most of them: with much older counts, the hit rate
        is lower than with LRU.
        """
        self._since_aged += worth
        if self._since_aged >= self._age_after:
            self._since_aged = 0.0
            self._db.execute("UPDATE entries SET uses = uses / 2")
            self._db.execute("UPDATE ghosts SET uses = uses / 2")
            self._db.execute("DELETE FROM ghosts WHERE uses < ?", (_LEAST,))
            self._age_after = self._period()
        self._since_aged_requests += worth
        if self._since_aged_requests >= _AGE_AFTER:
            self._since_aged_requests = 0.0
            self._db.execute("UPDATE seen SET times = times / 2")
            self._db.execute("DELETE FROM seen WHERE times < 1")

    def _period(self) -> int:
        """Return the uses after which counts are halved."""
        if not self._ghosts:
            return _AGE_AFTER
        [entries] = self._db.execute("SELECT count(*) FROM entries").fetchone()
        return int(min(max(entries // 2, _AGE_LEAST), _AGE_AFTER))
