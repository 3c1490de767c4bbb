"""Vectors to nearest positions: an exact inner-product index. Knows nothing of texts or models."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

from chunkcache.errors import InputError

Vectors = npt.NDArray[np.float32]


class FlatIndex:
    """Exact inner-product search; a vector's position is the order it was added in."""

    def __init__(self, dim: int) -> None:
        self._index = faiss.IndexFlatIP(dim)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: Vectors) -> None:
        """Append vectors `[n, dim]`; raises InputError when their shape is another."""
        self._index.add(self._checked(vectors))

    def search(self, query_vectors: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Return scores and positions `[queries, min(k, len(self))]`, best first, equal scores by position.

        Raises InputError when `query_vectors` is not `[queries, dim]` or `k` is below 1.
        """
        if k < 1:
            raise InputError(f"k = {k} asks for no results: give 1 or more")
        queries, size = self._checked(query_vectors), len(self)
        k = min(k, size)
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        # faiss drops any of the vectors that tie for the last place: ask until that place's tie is complete.
        asked = min(k + 1, size)
        scores, positions = self._index.search(queries, asked)
        while asked < size and (scores[:, -1] == scores[:, k - 1]).any():
            asked = min(2 * asked, size)
            scores, positions = self._index.search(queries, asked)
        order = np.lexsort((positions, -scores))[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)

    def _checked(self, vectors: Vectors) -> Vectors:
        if vectors.ndim != 2 or vectors.shape[1] != self._index.d:
            raise InputError(
                f"vectors of shape {list(vectors.shape)} do not fit an index of dimension {self._index.d}: "
                f"give [n, {self._index.d}], embedded with the model the index was built with"
            )
        return np.ascontiguousarray(vectors, dtype=np.float32)
