"""Passages that stand twice in a prompt; data sets that have many ask something else of a policy than others do."""

from __future__ import annotations

from collections.abc import Sequence

from chunkcache.eval.answers import words_of

SHINGLE = 8  # words; a run of so many that two texts share is no coincidence
REPEATED = 0.9  # share of a chunk's words


def repeated_share(chunks: Sequence[str]) -> float:
    """Return the share of `chunks` that stand in another one of them, by 90 % of their words.

    A word stands in another chunk if it is in a run of eight words that the other has, too, but for case, punctuation
    and articles; a chunk of fewer words has to stand there as a whole.
    """
    texts = [words_of(chunk) for chunk in chunks]
    repeated = [
        any(_standing(words, other) >= REPEATED for place, other in enumerate(texts) if place != own)
        for own, words in enumerate(texts)
    ]
    return sum(repeated) / len(repeated) if repeated else 0.0


def _standing(words: Sequence[str], other: Sequence[str]) -> float:
    """Return the share of `words` that stand in `other`."""
    size = min(SHINGLE, len(words))
    if not size:
        return 0.0
    there = set(_runs(other, size))
    shared = {
        word for start, run in enumerate(_runs(words, size)) if run in there for word in range(start, start + size)
    }
    return len(shared) / len(words)


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
