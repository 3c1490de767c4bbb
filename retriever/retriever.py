"""A query to ranked chunks: splits, embeds and indexes documents once, then only searches, and follows their changes.

Dense search ranks a chunk as its best passage ranks (MaxP: Dai and Callan, arXiv 1905.09217). One vector for a whole
chunk would hide what its second half says, because embedding models read less text than a chunk holds. Keyword search
is BM25 over whole chunks. Hybrid search, the default, fuses both rankings by their ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever.chunking import Chunk, split
from chunkcache.retriever.documents import Document
from chunkcache.retriever.embedder import Embedder, OnProgress
from chunkcache.retriever.fusion import fuse
from chunkcache.retriever.index import VectorIndex, Vectors
from chunkcache.retriever.nearest import nearest_chunks
from chunkcache.retriever.reranker import Reranker, rerank
from chunkcache.retriever.table import Entry, Filed, Table, text_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("hybrid", "dense", "keyword")

_FUSED = 100  # how deep the two rankings are that hybrid search fuses


@dataclass(frozen=True)
class Hit:
    """A chunk, and its score: higher is better, to be compared within one search only.

    It is the reranker's if there is one. Without, it is the sum of 1 / (60 + rank) in `hybrid` mode, the cosine
    similarity in `dense`, BM25 in `keyword`.
    """

    chunk: Chunk
    score: float


@dataclass(frozen=True)
class Change:
    """What a change of documents did to their chunks. `kept` ones may have moved: they are as they are now."""

    added: tuple[Chunk, ...] = ()
    removed: tuple[Chunk, ...] = ()
    kept: tuple[Chunk, ...] = ()


class Retriever:
    """The chunks of some documents, searchable; make one with `Retriever.build`, or fill an empty one with `add`.

    Any thread may search while another changes documents: it sees each document as it was before the change or as it
    is after it. Changes wait for one another.

    Args:
        tokenizer: the generation model's, because what is bounded is the length of a chunk's KV.
        embedder: makes vectors of texts; the packaged model by default.
        size: tokens of a chunk, at most.
        overlap: tokens of the text before it that each chunk begins with, at most.
        index: kind of the vector index: `flat`, `hnsw`, `ivf`, or `auto`, by its size.
        mode: `hybrid`, `dense` or `keyword`: what `search` does if it is not told.
        reranker: ranks the best hits once more.
        candidates: how many hits the reranker gets, or `k` if that is more.

    Attributes:
        unsaved: whether documents have changed since they were saved, loaded, or never were either.

    Raises:
        InputError: a value is out of range.
        ModelNotFoundError: the default embedder is not installed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        embedder: Embedder | None = None,
        size: int = 512,
        overlap: int = 0,
        index: str = "auto",
        mode: str = "hybrid",
        reranker: Reranker | None = None,
        candidates: int = 20,
    ) -> None:
        _check_mode(mode)
        if candidates < 1:
            raise InputError(f"candidates = {candidates} leaves the reranker none: give 1 or more")
        self._tokenizer = tokenizer
        self._embedder = embedder or Embedder()
        self.size, self.overlap = size, overlap
        self._mode = mode
        self._reranker, self._candidates = reranker, candidates
        split(Document("", "", ""), tokenizer, size=size, overlap=overlap)  # refuses what is out of range
        self._index = VectorIndex(self._embedder.dim, index)
        self._table = Table({}, {})
        self.unsaved = False
        self._next = 0  # id of the next passage, and place of the next document: neither is ever used twice
        self._changing = threading.Lock()

    @classmethod
    def build(
        cls,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> Retriever:
        """Split documents into chunks of at most `size` tokens of the generation tokenizer, and index them.

        `options` are those of the class. `on_progress(done, total)` counts embedded passages. Raises
        DocumentError when the documents have no text, InputError when two have the same id or a value is out of
        range, and ModelNotFoundError when the default embedder is not installed.
        """
        retriever = cls(tokenizer, **options)
        if not retriever.add(documents, on_progress).added:
            raise DocumentError(f"{len(documents)} documents have no text: give at least one that has some")
        return retriever

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks, in the order of the documents."""
        return [entry.chunk for entry in self._table.entries]

    @property
    def documents(self) -> list[str]:
        """Ids of all documents, in the order they were added; those that have no text too."""
        return list(self._table.documents)

    def add(self, documents: Sequence[Document], on_progress: OnProgress | None = None) -> Change:
        """Add documents: all of them, or none if it fails.

        `on_progress(done, total)` counts embedded passages. Raises InputError when an id is there already, or twice.
        """
        with self._changing:
            seen = set(self._table.documents)
            for document in documents:
                if document.id in seen:
                    raise InputError(
                        f"the document {document.id!r} is there already: give each id once, and call "
                        "update(document) for a new version of one"
                    )
                seen.add(document.id)
            return self._change(documents, on_progress)

    def update(self, document: Document, on_progress: OnProgress | None = None) -> Change:
        """Put a new version of a document in the place of the old one, or add it if there is none.

        Only chunks that are new are embedded. A document without text stays, with no chunks. If it fails, nothing
        has changed.
        """
        with self._changing:
            return self._change([document], on_progress)

    def delete(self, document_id: str) -> Change:
        """Take out a document and its chunks; raises InputError when there is none of that id."""
        with self._changing:
            table = self._table
            if document_id not in table.documents:
                raise InputError(
                    f"there is no document {document_id!r} to delete: give an id that is in `documents`, "
                    f"which has {len(table.documents)}"
                )
            self._put(table.with_changes({document_id: None}))
            return Change(removed=tuple(entry.chunk for entry in table.documents[document_id].entries))

    def search(self, query: str, k: int = 4, mode: str | None = None) -> list[Hit]:
        """Return the best `k` chunks, best first, equal scores in the order of `chunks`.

        There are fewer if there are no more chunks, if fewer share a word with the query in `keyword` mode, or if an
        approximate index finds fewer. Raises InputError when the query is empty, `k` is below 1 or there is no such
        mode.
        """
        if not query.strip():
            raise InputError(f"the query {query!r} is empty: give some text to search for")
        if k < 1:
            raise InputError(f"k = {k} asks for no chunks: give 1 or more")
        mode = self._mode if mode is None else mode
        _check_mode(mode)
        vector = None if mode == "keyword" else self._embedder.embed_query(query)
        while True:
            table = self._table
            found = self._find(table, mode, query, vector, max(k, self._candidates) if self._reranker else k)
            # Passages leave the vector index after their table does: had another one come, some might be missing.
            if vector is None or table is self._table:
                break
        if self._reranker is not None:
            entries = [entry for entry, _ in found]
            found = rerank(self._reranker, query, entries, [entry.chunk.text for entry in entries])
        return [Hit(entry.chunk, score) for entry, score in found[:k]]

    def has(self, chunk: Chunk) -> bool:
        """Return whether a chunk is one of its document still."""
        filed = self._table.documents.get(chunk.document_id)
        return filed is not None and any(entry.chunk.id == chunk.id for entry in filed.entries)

    def neighbours(self, chunk: Chunk) -> list[Chunk]:
        """Return the chunks right before and right behind one in its document; none if it is no longer there."""
        filed = self._table.documents.get(chunk.document_id)
        around = [entry.chunk for entry in filed.entries] if filed else []
        here = next((number for number, other in enumerate(around) if other.id == chunk.id), None)
        if here is None:
            return []
        return around[max(0, here - 1) : here] + around[here + 1 : here + 2]

    def nearest(self, chunks: Sequence[Chunk], k: int) -> list[list[Chunk]]:
        """Return for each chunk the `k` others that are most like it, best first, by exact search in any mode."""
        return nearest_chunks(self._table, self._index, self._embedder, chunks, k)

    def save(self, folder: str | Path) -> None:
        """Write the index to a folder; what was saved there before stays whole until all of it is written.

        The texts of the chunks are in it, and not encrypted. Raises InputError when the folder cannot be written.
        """
        from chunkcache.retriever import saved

        with self._changing:
            table = self._table
            self._index.remove(self._index.ids() - table.owners.keys())  # left behind by a change that was cut short
            settings = {
                "size": self.size,
                "overlap": self.overlap,
                "mode": self._mode,
                "candidates": self._candidates,
                "next": self._next,
            }
            saved.write(Path(folder), settings, table, self._index, self._embedder, self._tokenizer)
            self.unsaved = False

    @staticmethod
    def saved_in(folder: str | Path) -> bool:
        """Return whether an index was saved in a folder."""
        from chunkcache.retriever import saved

        return saved.there(Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        embedder: Embedder | None = None,
        mmap: bool = True,
        reranker: Reranker | None = None,
    ) -> Retriever:
        """Read what `save` wrote, with the same tokenizer and embedder.

        With `mmap` the vectors stay in their file, and are read as they are searched; the first change copies them
        to memory. A reranker is not saved: give it again. Load only folders that you trust: damage is found, but
        whoever can write the folder decides what is retrieved, and can crash the process.

        Raises:
            DocumentError: the folder holds no index, a damaged one, or one of another format.
            InputError: it was built with another embedder or tokenizer.
            ModelNotFoundError: the default embedder is not installed.
        """
        from chunkcache.retriever import saved

        embedder = embedder or Embedder()
        found = saved.read(Path(folder), embedder, tokenizer, mmap)
        settings = found.settings
        retriever = cls(
            tokenizer,
            embedder=embedder,
            size=settings["size"],
            overlap=settings["overlap"],
            mode=settings["mode"],
            reranker=reranker,
            candidates=settings["candidates"],
        )
        retriever._table, retriever._index, retriever._next = found.table, found.index, settings["next"]
        return retriever

    def _change(self, documents: Sequence[Document], on_progress: OnProgress | None) -> Change:
        """Put documents in, in the place of those of the same id; the caller holds `_changing`."""
        table, start = self._table, self._next
        fresh: list[Chunk] = []
        kept: list[Chunk] = []
        removed: list[Chunk] = []
        passages: list[str] = []
        filed: dict[str, Filed] = {}
        for place, document in enumerate(documents, start=start):
            old, sha256 = table.documents.get(document.id), text_sha256(document.text)
            if old and old.sha256 == sha256:
                kept += [entry.chunk for entry in old.entries]
                continue
            held = {entry.chunk.id: entry for entry in old.entries} if old else {}
            now: list[Entry] = []
            for chunk in split(document, self._tokenizer, size=self.size, overlap=self.overlap):
                same = held.pop(chunk.id, None)
                if same:
                    now.append(Entry(chunk, same.passages))
                    kept.append(chunk)
                    continue
                texts = self._embedder.passages(chunk.text)
                first = start + len(passages)
                now.append(Entry(chunk, range(first, first + len(texts))))
                fresh.append(chunk)
                passages += texts
            removed += [entry.chunk for entry in held.values()]
            filed[document.id] = Filed(sha256, tuple(now), old.place if old else place)
        self._next = start + max(len(passages), len(documents))
        if passages:
            vectors = self._embedder.embed(passages, on_progress=on_progress)
            self._index.add(np.arange(start, start + len(passages)), vectors)
        self._put(table.with_changes(filed))
        return Change(tuple(fresh), tuple(removed), tuple(kept))

    def _put(self, table: Table) -> None:
        """Make `table` the one that is searched, then drop the passages that it has no more."""
        gone = self._table.owners.keys() - table.owners.keys()
        self.unsaved = self.unsaved or table.documents != self._table.documents
        self._table = table
        self._index.remove(gone)

    def _find(
        self, table: Table, mode: str, query: str, vector: Vectors | None, count: int
    ) -> list[tuple[Entry, float]]:
        if mode == "hybrid":
            rankings = [self._find(table, one, query, vector, max(count, _FUSED)) for one in ("dense", "keyword")]
            return fuse([[entry for entry, _ in ranking] for ranking in rankings])[:count]
        if vector is None or mode == "keyword":
            return [(table.entries[position], score) for position, score in table.keywords().search(query, count)]
        return self._nearest(table, vector, count)

    def _nearest(self, table: Table, vector: Vectors, count: int) -> list[tuple[Entry, float]]:
        # A passage behind the best of `count` chunks cannot make its own chunk one of them.
        asked = 2 * count
        while True:
            best: dict[Entry, float] = {}
            scores, passages = self._index.search(vector, asked)
            for score, passage in zip(scores[0], passages[0], strict=True):
                if (entry := table.owners.get(int(passage))) is not None:
                    best.setdefault(entry, float(score))
            if len(best) >= count or asked >= len(self._index):
                return sorted(best.items(), key=lambda pair: (-pair[1], table.rank(pair[0])))[:count]
            asked *= 2


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise InputError(f"there is no search mode {mode!r}: give one of {', '.join(MODES)}")
