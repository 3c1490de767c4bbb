"""What befalls a Valkey: it is killed and started again, and what it holds is damaged."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import redis

from chunkcache.store import open_store

DAMAGE_EVERY, DAMAGED = 5, 4  # requests between two damages, and values that are damaged then


class Faults:
    """What befalls the Valkey of a run, at shares of its requests.

    Args:
        store: the server.
        requests: of the run.
        kills: how often it is killed meanwhile.
        draw: says what is damaged.

    Attributes:
        counts: what was done.
    """

    def __init__(self, store: Any, requests: int, kills: int, draw: random.Random) -> None:
        self._store, self._port, self._draw = store, store.port, draw
        self._lock = threading.Lock()
        between = requests / kills
        self._kills = {round((index + 0.5) * between) for index in range(kills)}
        self._starts = {round((index + 0.7) * between) for index in range(kills)}
        self.counts = Counter(kills=0, restarts=0, damaged=0)

    def before(self, number: int) -> None:
        """Do what is due before request `number`."""
        with self._lock:
            if number in self._kills:
                self._store.terminate()
                self.counts["kills"] += 1
            if number in self._starts:
                self.start()
            if number % DAMAGE_EVERY == 0 and self._store.is_running():
                client = redis.Redis(port=self._port)
                self.counts["damaged"] += sum(self._damage(client) for _ in range(DAMAGED))

    def start(self) -> None:
        """Start the server, if it is down."""
        if not self._store.is_running():
            self._store.start()
            self.counts["restarts"] += 1

    def _damage(self, client: Any) -> bool:
        """Flip a bit of a stored value, cut it or take it away; return whether there was one."""
        kind = self._draw.choice(("*:h", "*:[0-9]*"))
        names = sorted(client.scan_iter(match=kind, count=1000, _type="string"))
        if not names:
            return False
        name = self._draw.choice(names)
        value = bytearray(client.get(name) or b"")
        what = self._draw.choice(("flip", "flip", "flip", "cut", "delete"))
        if not value or what == "delete":
            return bool(client.delete(name))
        at = self._draw.randrange(len(value))
        if what == "cut":
            return bool(client.set(name, bytes(value[:at]), xx=True, keepttl=True))
        value[at] ^= 1 << self._draw.randrange(8)
        return bool(client.set(name, bytes(value), xx=True, keepttl=True))

    def clear(self) -> None:
        """Take all entries away."""
        redis.Redis(port=self._port).flushall()

    def delete(self, tokens: int) -> None:
        """Take away the entries of so many tokens."""
        with open_store(f"redis://127.0.0.1:{self._port}?timeout=5") as store:
            for key in [entry.key for entry in store.entries() if entry.tokens == tokens]:
                store.delete(key)
