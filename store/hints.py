"""Hints from retrieval to the store: what was just retrieved, and what is likely to be retrieved next.

The retriever knows which chunks a request needs before the request does, and has an idea of which ones the next will
need. Keys go in, no text: a hint says nothing of what a chunk says.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from chunkcache.errors import InputError
from chunkcache.kv import ChunkKey
from chunkcache.store import Store

_HALF_LIFE = 256  # guesses at one place after which what was learnt there counts half
_DOUBT = 8.0  # guesses, all wrong, that each place begins with: nothing is believed unseen


class Hints:
    """Tells a store what is retrieved; safe to use from several threads.

    What was retrieved is credited to its popularity, which `evict=lfu` and `evict=cost` go by, and is prefetched to
    the nearest tier. What is likely to follow is credited with the chance that it does, and prefetched behind it if
    that chance is good. The chance is learnt: a guess comes true if it is retrieved within the next `within`
    retrievals, and each place in the list of guesses has its own record. A guess that is not prefetched is watched
    all the same, so that a retriever that begins to guess well is found out.

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
        self._guesses: OrderedDict[ChunkKey, tuple[int, int]] = OrderedDict()  # place, and when; oldest first
        self._came_true = [0.0] * likely
        self._all = [_DOUBT] * likely

    def retrieved(self, keys: Iterable[ChunkKey], likely: Iterable[ChunkKey] = ()) -> None:
        """Take note of one retrieval, and start to prefetch; returns at once.

        Args:
            keys: of the chunks that were retrieved, in the order of rank.
            likely: of those that may be next, likeliest first: what ranked right behind, the neighbours in the
                document of what was retrieved.
        """
        now = list(dict.fromkeys(keys))
        known = set(now)
        later = [key for key in dict.fromkeys(likely) if key not in known][: self._likely]
        with self._lock:
            self._now += 1
            self._settle(now)
            chances = [self._chance(place) for place in range(len(later))]
            for place, key in enumerate(later):
                if key not in self._guesses:  # the first guess is the one that counts
                    self._guesses[key] = (place, self._now)
        self._store.prefetch(
            [*now, *(key for key, chance in zip(later, chances, strict=True) if chance >= self._least)]
        )
        for key in now:
            self._store.credit(key, 1.0)
        for key, chance in zip(later, chances, strict=True):
            if chance > 0:
                self._store.credit(key, chance)

    def chances(self) -> tuple[float, ...]:
        """Return what was learnt so far: how likely the guess at each place is to come true, 0 to 1."""
        with self._lock:
            return tuple(self._chance(place) for place in range(self._likely))

    def _settle(self, keys: Sequence[ChunkKey]) -> None:
        """Learn from the guesses that have come true, and from those whose time is over."""
        while self._guesses:
            key, (place, when) = next(iter(self._guesses.items()))
            if when + self._within >= self._now:
                break
            del self._guesses[key]
            self._learn(place, 0.0)
        for key in keys:
            if key in self._guesses:
                self._learn(self._guesses.pop(key)[0], 1.0)

    def _learn(self, place: int, came_true: float) -> None:
        fade = 0.5 ** (1 / _HALF_LIFE)
        self._came_true[place] = self._came_true[place] * fade + came_true
        self._all[place] = self._all[place] * fade + 1

    def _chance(self, place: int) -> float:
        return self._came_true[place] / self._all[place]
