"""Which chunks of a data set are nearest to those of a prompt, for policies that want them computed behind these."""

from __future__ import annotations

from collections.abc import Sequence

from chunkcache.library.neighbours import ASKED
from chunkcache.retriever.nearest import TextPool


class ChunkPool:
    """All chunks of a data set: the corpus that the chunks of its prompts are from.

    Args:
        texts: the chunks; embedded when they are first asked about.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts, self._pool = texts, TextPool(texts)

    def nearest(self, texts: Sequence[str]) -> list[list[str]]:
        """Return for each of `texts`, which are of the pool, the others most like it, best first.

        Raises:
            ModelNotFoundError: the packaged embedding model is not installed.
        """
        return [[self._texts[place] for place in places] for places in self._pool.nearest(texts, ASKED)]
