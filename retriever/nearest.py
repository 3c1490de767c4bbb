"""Which chunks are most like which: exact search over the mean vectors of whole chunks.

A chunk's vector is the mean of those of its passages: what the chunk is about, where a search looks for its best
passage. All pairs are compared, so an approximate index misses none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np

from chunkcache.errors import InputError
from chunkcache.retriever.chunking import Chunk
from chunkcache.retriever.embedder import Embedder
from chunkcache.retriever.index import VectorIndex, Vectors
from chunkcache.retriever.table import Entry, Table

_ROWS = 256  # chunks that are compared with all others at a time


def nearest_rows(vectors: Vectors, queries: Vectors, own: Sequence[int | None], k: int) -> list[list[int]]:
    """Return for each query `[q, dim]` the rows of the `k` vectors `[n, dim]` most like it, best first.

    Equal ones are in order. The row in `own`, of the query itself, is none of them.

    Raises:
        InputError: `k` is below 1.
    """
    if k < 1:
        raise InputError(f"k = {k} asks for no neighbours: give 1 or more")
    found: list[list[int]] = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ vectors.T
        for row, itself in zip(scores, own[start : start + _ROWS], strict=True):
            if itself is not None:
                row[itself] = -np.inf
            count = min(k, len(row) - (itself is not None))
            least = np.partition(row, -count)[-count] if count else np.inf
            best = np.flatnonzero(row >= least)
            found.append(best[np.argsort(-row[best], kind="stable")][:count].tolist())
    return found


class TextPool:
    """Texts of which the nearest are asked for; they are embedded at the first question.

    Args:
        texts: of equal ones the first stands for all.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._places = {text.strip(): place for place, text in reversed(list(enumerate(texts)))}
        self._rows = {text: row for row, text in enumerate(self._places)}

    def nearest(self, asked: Sequence[str], k: int) -> list[list[int]]:
        """Return for each of `asked`, all of which are in the pool, the places of the `k` most like it, best first.

        Raises:
            ModelNotFoundError: the packaged embedding model is not installed.
        """
        own = [self._rows[text.strip()] for text in asked]
        numbers = list(self._places.values())
        found = nearest_rows(self._vectors, self._vectors[own], own, k)
        return [[numbers[row] for row in rows] for rows in found]

    @cached_property
    def _vectors(self) -> Vectors:
        return _embedded(Embedder(), list(self._places))


def nearest_texts(texts: Sequence[str], asked: Sequence[str], k: int) -> list[list[int]]:
    """Return what `TextPool(texts).nearest` does, for one question."""
    return TextPool(texts).nearest(asked, k)


def nearest_chunks(
    table: Table, index: VectorIndex, embedder: Embedder, chunks: Sequence[Chunk], k: int
) -> list[list[Chunk]]:
    """Return for each chunk the `k` others of `table` most like it, best first.

    Vectors come from `index`; a chunk that is not there, or no longer, is embedded. Of chunks with the same text one
    stands for all, and none is its own neighbour.
    """
    ids, held = index.vectors()
    place = {int(number): row for row, number in enumerate(ids)}
    firsts: dict[str, Entry] = {}
    for entry in table.entries:
        if entry.passages and all(passage in place for passage in entry.passages):  # none has gone meanwhile
            firsts.setdefault(entry.chunk.text.strip(), entry)
    if not firsts or not chunks:
        return [[] for _ in chunks]
    entries = list(firsts.values())
    rows = [place[passage] for entry in entries for passage in entry.passages]
    vectors = _means(held[rows], [len(entry.passages) for entry in entries])
    row_of = {text: row for row, text in enumerate(firsts)}
    own = [row_of.get(chunk.text.strip()) for chunk in chunks]
    queries = np.empty((len(chunks), index.dim), dtype=np.float32)
    gone = [number for number, row in enumerate(own) if row is None]
    if gone:
        queries[gone] = _embedded(embedder, [chunks[number].text for number in gone])
    there = [number for number, row in enumerate(own) if row is not None]
    queries[there] = vectors[[row for row in own if row is not None]]
    return [[entries[row].chunk for row in each] for each in nearest_rows(vectors, queries, own, k)]


def _embedded(embedder: Embedder, texts: Sequence[str]) -> Vectors:
    """Return one vector for each text, of all of it, `[n, dim]`."""
    passages = [embedder.passages(text) for text in texts]
    return _means(embedder.embed([passage for each in passages for passage in each]), [len(p) for p in passages])


def _means(vectors: Vectors, counts: Sequence[int]) -> Vectors:
    """Return the directions `[n, dim]` of the means of so many `vectors` `[passages, dim]` each, none of them 0."""
    sums = np.add.reduceat(vectors, [0, *accumulate(counts[:-1])], axis=0)
    unit: Vectors = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return unit
