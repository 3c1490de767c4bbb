"""Deletes stored chunk KV, and labels them: the methods of `ChunkLibrary` that compute nothing.

An entry that was computed behind other chunks goes with them. It names its own chunk first, then theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

from chunkcache.errors import EntryLostError
from chunkcache.kv import ChunkKey, ChunkKV, ChunkRef, TokenIds, chunk_name
from chunkcache.library.registry import ChunkRegistry
from chunkcache.store import Entry, EntryFilter, Store


class DeletionMethods(ABC):
    """The part of `ChunkLibrary` that deletes and labels.

    Attributes:
        fingerprint: identity of the model.
        registry: what is known of chunks.
    """

    fingerprint: str
    registry: ChunkRegistry
    _store: Store
    _tenant_label: str

    @abstractmethod
    def get(self, ref: ChunkRef) -> ChunkKV | None:
        """Return the stored KV of a chunk, or None."""

    @abstractmethod
    def put(self, ref: ChunkRef, kv: ChunkKV, chunks: Sequence[TokenIds] = ()) -> bool:
        """Store `kv` of a chunk, and make it findable; return whether the store took it."""

    def drop(self, key: ChunkKey) -> None:
        """Delete one entry."""
        self._store.delete(key)

    def add_document(self, ref: ChunkRef) -> None:
        """Let a stored entry name all documents that are now known to have its chunk."""
        kv = self.get(ref)
        if kv is None or self.registry.documents_of([chunk_name(ref.token_ids)]) <= set(kv.origin.documents):
            return
        with suppress(EntryLostError):  # counted by the store; whoever needs the chunk computes it, with its labels
            self.put(ref, kv.loaded())

    def delete(self, document: str | None = None, chunks: Collection[TokenIds] = ()) -> int:
        """Delete the KV of this model and tenant that were computed from a document or from chunks; else all.

        Args:
            document: label of the document.
            chunks: the chunks.

        Returns:
            how many entries there were.
        """
        own = EntryFilter(model=self.fingerprint, tenant=self._tenant_label)
        if document is not None:
            alone = self.registry.delete_document(document)  # of no other document, whatever a stored entry names
            purged = self._store.purge(replace(own, document=document))
            return purged + (self._delete_chunks(alone) if alone else 0)
        if chunks:
            return self._delete_chunks({chunk_name(chunk) for chunk in chunks})
        self.registry.clear()
        return self._store.purge(own)

    def delete_stale(self, document: str, chunks: Collection[TokenIds]) -> int:
        """Delete the KV computed from chunks that `document` (a label) once had, and no other document has.

        Args:
            document: the document.
            chunks: what it consists of now.
        """
        now = {chunk_name(chunk) for chunk in chunks}
        gone = self.registry.delete_document(document, but=now)
        entries = list(self._store.entries(EntryFilter(self.fingerprint, self._tenant_label, document)))
        left = {e.chunks[0] for e in entries if e.chunks and e.documents == (document,)} - now
        gone |= {name for name in left if not self.registry.documents_of([name])}
        for entry in entries:
            if gone.intersection(entry.chunks) or not entry.chunks:  # deleted below, or a prefix
                continue
            several = len(entry.chunks) > 1  # their documents are named together: whose a chunk is, is not
            parts = [name for name in entry.chunks if several and name not in now]
            if any(not self.registry.documents_of([name]) for name in parts):  # perhaps the document's
                self._store.delete(entry.key)
            elif not now.intersection(entry.chunks):
                self._disown(entry, document)
        return self._delete_chunks(gone) if gone else 0

    def _delete_chunks(self, names: Collection[str]) -> int:
        self.registry.delete(names)
        own = EntryFilter(model=self.fingerprint, tenant=self._tenant_label)
        return self._store.purge(replace(own, chunks=frozenset(names)))

    def _disown(self, entry: Entry, document: str) -> None:
        """Let a stored entry no longer name `document`."""
        kv = self._store.get(entry.key, None)
        if kv is not None:
            others = tuple(label for label in entry.documents if label != document)
            with suppress(EntryLostError):  # counted by the store
                self._store.put(entry.key, replace(kv.loaded(), origin=replace(kv.origin, documents=others)))
