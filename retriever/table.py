"""What is in the index at one moment: documents, their chunks, and which passages belong to which chunk.

A table never changes. A change makes another one, so that a search sees all of it or nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from chunkcache.retriever.chunking import Chunk
from chunkcache.retriever.keywords import Keywords, words


@dataclass(frozen=True, eq=False)
class Entry:
    """A chunk, and the ids that its passages have in the vector index."""

    chunk: Chunk
    passages: range

    @cached_property
    def words(self) -> list[str]:
        """Its words, as `keywords` compares them."""
        return words(self.chunk.text)


@dataclass(frozen=True, eq=False)
class Filed:
    """A document: the SHA-256 of its text, its chunks, and its place in the order of documents."""

    sha256: str
    entries: tuple[Entry, ...]
    place: int


class Table:
    """Documents by id, in order, and the entry that each passage id belongs to."""

    def __init__(self, documents: dict[str, Filed], owners: dict[int, Entry]) -> None:
        """The dicts are the table's own from here on."""
        self.documents = documents
        self.owners = owners
        self._building = threading.Lock()

    def with_changes(self, changes: Mapping[str, Filed | None]) -> Table:
        """Return this table with documents put in, in the place of those of the same id, or (None) taken out."""
        documents, owners = self.documents.copy(), self.owners.copy()
        for name, filed in changes.items():
            for passage in self.passages_of(name):
                del owners[passage]
            if filed is None:
                del documents[name]
                continue
            documents[name] = filed
            owners.update((passage, entry) for entry in filed.entries for passage in entry.passages)
        return Table(documents, owners)

    def passages_of(self, document_id: str) -> set[int]:
        """Return the ids of a document's passages; none if it is not there."""
        filed = self.documents.get(document_id)
        return {passage for entry in filed.entries for passage in entry.passages} if filed else set()

    def rank(self, entry: Entry) -> tuple[int, int]:
        """Return what chunks are ordered by: the order of documents, then that of the text."""
        return self.documents[entry.chunk.document_id].place, entry.chunk.index

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All chunks, in order."""
        return tuple(entry for filed in self.documents.values() for entry in filed.entries)

    def keywords(self) -> Keywords:
        """Return the keyword index over `entries`, made at the first call."""
        with self._building:
            return self._keywords

    @cached_property
    def _keywords(self) -> Keywords:
        return Keywords([entry.words for entry in self.entries])


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
