"""Which chunks of a data set are nearest to those of a prompt, for policies that want them computed behind these."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from chunkcache.library.neighbours import MOST

if TYPE_CHECKING:
    from chunkcache.retriever.index import Vectors


class ChunkPool:
    """All chunks of a data set: the corpus that the chunks of its prompts are from.

    Args:
        texts: the chunks; embedded when they are first asked about.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._rows = {text: row for row, text in enumerate(dict.fromkeys(text.strip() for text in texts))}

    def nearest(self, texts: Sequence[str]) -> list[list[str]]:
        """Return for each of `texts`, which are of the pool, the others most like it, best first.

        Raises:
            ModelNotFoundError: the packaged embedding model is not installed.
        """
        from chunkcache.retriever.nearest import nearest_rows

        own = [self._rows[text.strip()] for text in texts]
        pool = list(self._rows)
        return [[pool[row] for row in rows] for rows in nearest_rows(self._vectors, self._vectors[own], own, MOST)]

    @cached_property
    def _vectors(self) -> Vectors:
        from chunkcache.retriever.embedder import Embedder
        from chunkcache.retriever.nearest import embed_whole

        return embed_whole(Embedder(), list(self._rows))
