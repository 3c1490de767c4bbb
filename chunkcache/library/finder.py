"""Finding stored chunks inside any prompt, by their token ids alone.

A few windows of every chunk, its anchors, are hashed. A prompt is scanned with a rolling polynomial hash
(Karp and Rabin 1987) over all of its windows at once; where an anchor is met, the token ids are compared and
the match is grown to both sides as far as they agree. Tokens at a chunk's edges that were tokenised
differently inside the prompt are thereby left out.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chunkcache.kv import ChunkKey

WINDOW = 16  # tokens; a shorter match saves less than it costs to repair

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64)


@dataclass(frozen=True)
class Known:
    """A chunk that can be found: its key, its token ids, those it was computed behind, and its `chunk_name`."""

    key: ChunkKey
    token_ids: tuple[int, ...]
    context: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True)
class Match:
    """A run of `length` tokens of `known`, from its index `first` on, at position `start` of a prompt."""

    known: Known
    start: int
    first: int
    length: int


class Finder:
    """An index of chunks by the hashes of their anchors, one every `WINDOW` tokens; for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._known: dict[ChunkKey, Known] = {}
        self._named: dict[str, list[Known]] = {}  # by `chunk_name`, in whichever contexts they were computed
        self._anchors: dict[int, list[tuple[Known, int]]] = {}

    def add(self, known: Known) -> None:
        """Make a chunk findable; one that is shorter than `WINDOW` tokens cannot be."""
        if known.key in self._known:
            return
        with self._lock:
            self._known[known.key] = known
            self._named.setdefault(known.name, []).append(known)
            for offset, digest in enumerate(_window_hashes(known.token_ids)[::WINDOW].tolist()):
                self._anchors.setdefault(digest, []).append((known, offset * WINDOW))

    def remove(self, known: Known) -> None:
        """Make a chunk no longer findable."""
        with self._lock:
            if self._known.pop(known.key, None) is None:
                return
            named = [other for other in self._named.pop(known.name) if other.key != known.key]
            if named:
                self._named[known.name] = named
            for digest in set(_window_hashes(known.token_ids)[::WINDOW].tolist()):
                rest = [anchor for anchor in self._anchors[digest] if anchor[0].key != known.key]
                if rest:
                    self._anchors[digest] = rest
                else:
                    del self._anchors[digest]

    def forget(self, name: str) -> None:
        """Make a chunk no longer findable, by its `chunk_name`, in whichever contexts it was computed."""
        with self._lock:
            for known in self._named.get(name, []).copy():
                self.remove(known)

    def clear(self) -> None:
        """Make nothing findable."""
        with self._lock:
            self._known.clear()
            self._named.clear()
            self._anchors.clear()

    def find(self, token_ids: Sequence[int]) -> list[Match]:
        """Return the longest matches in `token_ids`, in order and without overlap."""
        ids = tuple(token_ids)
        matches: list[Match] = []
        end = 0
        for position, digest in enumerate(_window_hashes(ids).tolist()):
            anchors = self._anchors.get(digest)
            if position < end or not anchors:
                continue
            grown = [self._grow(ids, position, known, offset, end) for known, offset in anchors]
            best = max(grown, key=lambda match: match.length)
            if best.length >= WINDOW:
                matches.append(best)
                end = best.start + best.length
        return matches

    @staticmethod
    def _grow(ids: tuple[int, ...], position: int, known: Known, offset: int, floor: int) -> Match:
        """Extend an anchor to both sides, not past position `floor`; length 0 if its tokens differ after all."""
        theirs = known.token_ids
        last = 0
        while (
            position + last < len(ids)
            and offset + last < len(theirs)
            and (ids[position + last] == theirs[offset + last])
        ):
            last += 1
        if last < WINDOW:
            return Match(known, position, offset, 0)
        back = 0
        while position - back > floor and offset - back > 0 and ids[position - back - 1] == theirs[offset - back - 1]:
            back += 1
        return Match(known, position - back, offset - back, back + last)


def _window_hashes(token_ids: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return the hash of each window of `WINDOW` tokens, `[tokens - WINDOW + 1]`, modulo 2^64."""
    count = len(token_ids) - WINDOW + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(token_ids), _BASE, dtype=np.uint64))
        inverses = np.cumprod(np.full(count, _INVERSE, dtype=np.uint64))
        sums = np.concatenate(
            (np.zeros(1, dtype=np.uint64), np.cumsum((np.asarray(token_ids, dtype=np.uint64) + 1) * powers))
        )
        hashes: npt.NDArray[np.uint64] = (sums[WINDOW:] - sums[:-WINDOW]) * inverses
        return hashes
