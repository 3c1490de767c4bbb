"""Hints from retrieval to the store: which chunks were just retrieved, and which are likely to be retrieved next.

A retriever knows which chunks a request needs before the request does. Hints are keys, and reveal no text.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from chunkcache.errors import InputError
from chunkcache.kv import ChunkKey
from chunkcache.store import Store

_HALF_LIFE = 256  # guesses of one rank after which the outcomes before them count half
_DOUBT = 8.0  # wrong guesses that each rank starts with, so that no chance is assumed


class Hints:
    """Tells a store what is retrieved; safe to use from several threads.

    A retrieved chunk is credited with a use, by which `evict=lfu` and `evict=cost` go, and prefetched to the nearest
    tier. A guess at what follows is credited with its chance, and prefetched if that is at least `least`. The chance
    is learnt for each rank in the list of guesses: the share of them that were retrieved within the next `within`
    retrievals. Guesses that are not prefetched count as well.

    Args:
        store: the store.
        likely: most guesses that are looked at per retrieval; 0 for none.
        least: chance from which on a guess is prefetched, 0 to 1; 0 prefetches all.
        within: retrievals, of all users together, within which a guess has to come true.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(self, store: Store, *, likely: int = 8, least: float = 0.1, within: int = 32) -> None:
        if likely < 0 or within < 1 or not 0 <= least <= 1:
            raise InputError(
                f"likely={likely}, least={least}, within={within}: pass likely >= 0, least from 0 to 1, within >= 1"
            )
        self._store = store
        self._likely, self._least, self._within = likely, least, within
        self._lock = threading.Lock()
        self._now = 0  # retrievals so far
        self._guesses: OrderedDict[ChunkKey, tuple[int, int]] = OrderedDict()  # rank, and when; oldest first
        self._came_true = [0.0] * likely
        self._all = [_DOUBT] * likely

    def retrieved(self, keys: Iterable[ChunkKey], likely: Iterable[ChunkKey] = ()) -> None:
        """Record one retrieval, and start to prefetch; returns at once.

        Args:
            keys: of the chunks that were retrieved, in the order of rank.
            likely: of those that may be next, likeliest first.
        """
        now = list(dict.fromkeys(keys))
        known = set(now)
        later = [key for key in dict.fromkeys(likely) if key not in known][: self._likely]
        with self._lock:
            self._now += 1
            self._score_guesses(now)
            chances = [self._chance(rank) for rank in range(len(later))]
            for rank, key in enumerate(later):
                if key not in self._guesses:  # the first guess is the one that counts
                    self._guesses[key] = (rank, self._now)
        self._store.prefetch(
            [*now, *(key for key, chance in zip(later, chances, strict=True) if chance >= self._least)]
        )
        for key in now:
            self._store.credit(key, 1.0)
        for key, chance in zip(later, chances, strict=True):
            if chance > 0:
                self._store.credit(key, chance)

    def chances(self) -> tuple[float, ...]:
        """Return how likely the guess of each rank is to come true, 0 to 1, by what was learnt so far."""
        with self._lock:
            return tuple(self._chance(rank) for rank in range(self._likely))

    def _score_guesses(self, keys: Sequence[ChunkKey]) -> None:
        """Learn from the guesses that have come true, and from those whose time is over."""
        while self._guesses:
            key, (rank, when) = next(iter(self._guesses.items()))
            if when + self._within >= self._now:
                break
            del self._guesses[key]
            self._learn(rank, 0.0)
        for key in keys:
            if key in self._guesses:
                self._learn(self._guesses.pop(key)[0], 1.0)

    def _learn(self, rank: int, came_true: float) -> None:
        fade = 0.5 ** (1 / _HALF_LIFE)
        self._came_true[rank] = self._came_true[rank] * fade + came_true
        self._all[rank] = self._all[rank] * fade + 1

    def _chance(self, rank: int) -> float:
        return self._came_true[rank] / self._all[rank]
