"""A query to ranked chunks: splits, embeds and indexes documents once, then only searches.

A chunk scores as its best passage does (MaxP: Dai and Callan, arXiv 1905.09217). One vector for a whole chunk
would hide what its second half says, because embedding models read less text than a chunk holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever.chunking import Chunk, split
from chunkcache.retriever.documents import Document
from chunkcache.retriever.embedder import Embedder, OnProgress
from chunkcache.retriever.index import FlatIndex

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Hit:
    """A chunk and its cosine similarity to the query, in [-1, 1]."""

    chunk: Chunk
    score: float


class Retriever:
    """The chunks of some documents, searchable; make one with `Retriever.build`."""

    def __init__(self, chunks: list[Chunk], owners: list[int], index: FlatIndex, embedder: Embedder) -> None:
        """`owners[p]` is the position in `chunks` of the chunk that passage `p` of the index belongs to."""
        self.chunks = chunks
        self._owners = owners
        self._index = index
        self._embedder = embedder
        self._most_passages = max(Counter(owners).values())

    @classmethod
    def build(
        cls,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        embedder: Embedder | None = None,
        size: int = 512,
        overlap: int = 0,
        on_progress: OnProgress | None = None,
    ) -> Retriever:
        """Split documents into chunks of at most `size` tokens of the generation tokenizer, and index them.

        `on_progress(done, total)` counts embedded passages. Raises DocumentError when the documents have no
        text, InputError as `split` does, and ModelNotFoundError when the default embedder is not installed.
        """
        chunks = [chunk for document in documents for chunk in split(document, tokenizer, size=size, overlap=overlap)]
        if not chunks:
            raise DocumentError(f"{len(documents)} documents have no text: give at least one that has some")
        embedder = embedder or Embedder()
        passages = [(owner, text) for owner, chunk in enumerate(chunks) for text in embedder.passages(chunk.text)]
        index = FlatIndex(embedder.dim)
        index.add(embedder.embed([text for _, text in passages], on_progress=on_progress))
        return cls(chunks, [owner for owner, _ in passages], index, embedder)

    def search(self, query: str, k: int = 5) -> list[Hit]:
        """Return the `min(k, len(chunks))` best chunks, best first, equal scores in the order of `chunks`.

        Raises InputError when the query is empty or `k` is below 1.
        """
        if not query.strip():
            raise InputError(f"the query {query!r} is empty: give some text to search for")
        if k < 1:
            raise InputError(f"k = {k} asks for no chunks: give 1 or more")
        # The best passage of the k-th best chunk ranks at worst behind every passage of the chunks before it.
        scores, positions = self._index.search(self._embedder.embed_query(query), k * self._most_passages)
        best: dict[int, float] = {}
        for score, position in zip(scores[0], positions[0], strict=True):
            best.setdefault(self._owners[position], float(score))
        return [Hit(self.chunks[owner], score) for owner, score in list(best.items())[:k]]
