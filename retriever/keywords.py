"""Texts to those that share words with a query: BM25, by bm25s. Knows nothing of documents or vectors."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from chunkcache.errors import missing_extra

# Written without spaces between words, or in words that are put together: pairs of characters stand for words there.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003ffff]+)"
)


def words(text: str) -> list[str]:
    """Return the words of a text of any language, in order, as they are compared: folded to one case and one form.

    Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese become overlapping pairs of characters.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    found: list[str] = _word().findall(text)
    if not _UNSPACED.search(text):
        return found
    return [part for word in found for part in _pairs(word)]


def _pairs(word: str) -> Iterator[str]:
    for part in _UNSPACED.split(word):
        if _UNSPACED.match(part):
            yield from (part[at : at + 2] for at in range(max(1, len(part) - 1)))
        elif part:
            yield part


class Keywords:
    """Texts, each given by its `words`, ranked by BM25 (Lucene's variant, k1 = 1.5, b = 0.75); it never changes."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        vocabulary: dict[str, int] = {}
        rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in text] for text in texts]
        self._index: Any = None
        if vocabulary:  # bm25s divides by the mean length
            self._index = _bm25s().BM25(csc_backend="numpy", backend="numpy")
            self._index.index((rows, vocabulary), create_empty_token=False, show_progress=False)

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """Return the positions and scores of the best `k` texts that have a word of the query, best first.

        Equal scores are ordered by position.
        """
        asked = self._index.get_tokens_ids(words(query)) if self._index else []
        if not asked:
            return []
        scores = self._index.get_scores_from_ids(asked)
        found = np.flatnonzero(scores > 0)
        if len(found) > k:
            least = np.partition(scores[found], -k)[-k]
            found = found[scores[found] >= least]
        best = found[np.lexsort((found, -scores[found]))][:k]
        return [(int(position), float(scores[position])) for position in best]


@cache
def _word() -> re.Pattern[str]:
    # Python's \w leaves out the marks that vowels are in Hindi, Tamil and others, and would cut words there.
    marks = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(f"[\\w{marks}]+")


@cache
def _bm25s() -> Any:
    # Imported here because it imports Numba and JAX where they are installed, which takes seconds.
    try:
        import bm25s  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra("retriever", "search by keywords", error) from error

    logging.getLogger("bm25s").setLevel(logging.NOTSET)  # it asks for debug messages of every program that imports it
    return bm25s
