"""Which documents a chunk is part of, as far as this process has been told."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable


class Owners:
    """Labels of documents by names of chunks; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._labels: dict[str, set[str]] = {}

    def add(self, chunk: str, document: str) -> None:
        """Take note that a chunk is part of a document."""
        with self._lock:
            self._labels.setdefault(chunk, set()).add(document)

    def of(self, chunks: Iterable[str]) -> set[str]:
        """Return the documents that any of these chunks is part of."""
        with self._lock:
            return set().union(*(self._labels.get(chunk, ()) for chunk in chunks))

    def drop(self, document: str, but: Collection[str] = ()) -> set[str]:
        """A document has none of its chunks any more but these; return those that are now part of none."""
        with self._lock:
            gone = {name for name, labels in self._labels.items() if document in labels and name not in but}
            for name in gone:
                self._labels[name].discard(document)
            orphans = {name for name in gone if not self._labels[name]}
            for name in orphans:
                del self._labels[name]
            return orphans

    def forget(self, chunk: str) -> None:
        """A chunk is part of nothing any more."""
        with self._lock:
            self._labels.pop(chunk, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._labels.clear()
