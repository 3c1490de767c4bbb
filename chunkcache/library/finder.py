"""Finds chunks inside any prompt, by their token ids alone.

Short runs of every chunk, its anchors, are hashed. A prompt is scanned with a rolling polynomial hash
(Karp and Rabin 1987) over all of its runs of that length at once; where an anchor is met, the token ids are compared
and the match is grown to both sides as far as they agree. Tokens at a chunk's edges that were tokenised
differently inside the prompt, as they are right behind a letter, are thereby left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 16  # tokens; a shorter match saves less than it costs to repair
SEED = WINDOW // 2  # tokens of an anchor: half, so that what agrees for `WINDOW` tokens holds one wherever it begins
SHORT = 4 * WINDOW  # tokens; a longer chunk has an anchor every `WINDOW`, so half as many more have to agree

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(BASE, -1, 2**64)

Ids = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Match:
    """A run of `length` tokens of the chunk `name`, from its index `first` on, at position `start` of a prompt."""

    name: str
    start: int
    first: int
    length: int


class TokenIndex:
    """An index of chunks by the hashes of their anchors, one every `SEED` tokens of short ones, else every `WINDOW`.

    Not safe for several threads: `ChunkRegistry` locks.
    """

    def __init__(self) -> None:
        self._ids: dict[str, Ids] = {}
        self._anchors: dict[int, list[tuple[str, int]]] = {}

    def add(self, name: str, token_ids: Sequence[int]) -> None:
        """Index a chunk; one that is shorter than `WINDOW` tokens is never found."""
        if name in self._ids or len(token_ids) < WINDOW:
            return
        self._ids[name] = ids = np.asarray(token_ids, dtype=np.uint64)
        for offset, digest in _anchors(ids):
            self._anchors.setdefault(digest, []).append((name, offset))

    def remove(self, name: str) -> None:
        """Remove a chunk, if it is there."""
        ids = self._ids.pop(name, None)
        if ids is None:
            return
        for digest in {digest for _, digest in _anchors(ids)}:
            rest = [anchor for anchor in self._anchors[digest] if anchor[0] != name]
            if rest:
                self._anchors[digest] = rest
            else:
                del self._anchors[digest]

    def find(self, token_ids: Sequence[int]) -> list[Match]:
        """Return the longest matches in `token_ids`, in order and without overlap."""
        ids = np.asarray(token_ids, dtype=np.uint64)
        matches: list[Match] = []
        end = 0
        for position, digest in enumerate(window_hashes(ids, SEED).tolist()):
            anchors = self._anchors.get(digest)
            if position < end or not anchors:
                continue
            grown = [self._grow(ids, position, name, offset, end) for name, offset in anchors]
            best = max(grown, key=lambda match: match.length)
            if best.length >= WINDOW:
                matches.append(best)
                end = best.start + best.length
        return matches

    def _grow(self, ids: Ids, position: int, name: str, offset: int, floor: int) -> Match:
        """Extend an anchor to both sides, not past position `floor`; length 0 if its tokens differ after all."""
        chunk = self._ids[name]
        ahead = _agreeing(ids[position:], chunk[offset:])
        if ahead < SEED:
            return Match(name, position, offset, 0)
        back = _agreeing(ids[floor:position][::-1], chunk[:offset][::-1])
        return Match(name, position - back, offset - back, back + ahead)


def _anchors(ids: Ids) -> list[tuple[int, int]]:
    """Return the offset and the hash of each anchor of a chunk."""
    step = SEED if len(ids) <= SHORT else WINDOW
    return [(index * step, digest) for index, digest in enumerate(window_hashes(ids, SEED)[::step].tolist())]


def _agreeing(ids: Ids, others: Ids) -> int:
    """Return how many tokens two sequences begin alike with."""
    count = min(len(ids), len(others))
    differ = np.flatnonzero(ids[:count] != others[:count])
    return int(differ[0]) if len(differ) else count


def window_hashes(ids: Ids, size: int = WINDOW) -> npt.NDArray[np.uint64]:
    """Return the hash of each window of `size` tokens, `[tokens - size + 1]`, modulo 2^64."""
    count = len(ids) - size + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(ids), BASE, dtype=np.uint64))
        inverses = np.cumprod(np.full(count, _INVERSE, dtype=np.uint64))
        sums = np.concatenate((np.zeros(1, dtype=np.uint64), np.cumsum((ids + np.uint64(1)) * powers)))
        hashes: npt.NDArray[np.uint64] = (sums[size:] - sums[:-size]) * inverses
        return hashes
