"""Counters of a store, entries without their KV, and filters that select entries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from chunkcache.errors import InputError
from chunkcache.kv import ChunkKey, ChunkKV, Origin


@dataclass
class StoreStats:
    """Counters of one store since it was opened; sizes are in bytes.

    Attributes:
        entries: chunk KV held now.
        nbytes: bytes held now.
        max_bytes: the byte budget, or None without one.
        hits: verified reads. If a layer then proves damaged or out of reach, the read becomes a miss.
        misses: all other reads.
        mismatches: entries with other token ids or shapes than asked for, deleted; or sealed with another secret.
        damaged: entries that failed verification, deleted.
        expired: entries past their time to live, deleted.
        writes: entries stored.
        refused: entries not stored: too large, not admitted, deleted meanwhile, or the queue to the tier was full.
        evictions: entries dropped to make room.
        errors: operations that failed because the tier is in trouble.
        skipped: operations not tried since the tier was in trouble a moment ago.
        unpinned: entries of an accelerator that memory could not be page-locked for.
    """

    entries: int = 0
    nbytes: int = 0
    max_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    mismatches: int = 0
    damaged: int = 0
    expired: int = 0
    writes: int = 0
    refused: int = 0
    evictions: int = 0
    errors: int = 0
    skipped: int = 0
    unpinned: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as a plain dict for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Entry(Origin):
    """An entry without its KV: its origin, size in bytes and tokens, and use; times in seconds since the epoch.

    `used` and `uses` are 0 where a tier does not know them.
    """

    key: ChunkKey
    nbytes: int
    tokens: int
    used: float = 0.0
    uses: float = 0.0
    pinned: bool = False
    expires: float | None = None

    @classmethod
    def of(cls, key: ChunkKey, kv: ChunkKV, ttl: float | None = None) -> Entry:
        """Describe `kv` as it is stored now, for `ttl` seconds from when it was computed."""
        now = time.time()
        created = kv.origin.created or now
        expires = None if ttl is None else created + ttl
        origin = {**vars(kv.origin), "created": created}
        return cls(**origin, key=key, nbytes=kv.nbytes, tokens=len(kv), used=now, expires=expires)


def has_expired(expires: float | None) -> bool:
    """Return whether the time to live of an entry is over; None never is."""
    return expires is not None and expires <= time.time()


@dataclass(frozen=True)
class EntryFilter:
    """Selects the entries that agree with everything that is set; nothing set selects all.

    An entry that was computed behind other chunks counts as computed from them and from their documents.

    Attributes:
        model: a fingerprint.
        tenant: a `hashed_label`.
        document: a `hashed_label`.
        chunk: a `chunk_name`.
        chunks: instead of `chunk`, several of them: entries of any one are selected, and by an empty set none.

    Raises:
        InputError: both `chunk` and `chunks` are set.
    """

    model: str | None = None
    tenant: str | None = None
    document: str | None = None
    chunk: str | None = None
    chunks: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunks is not None:
            raise InputError(f"chunk={self.chunk!r} and chunks are both set: put all names into chunks")

    def matches(self, origin: Origin) -> bool:
        """Return whether an entry of this origin is selected."""
        return (
            self.model in (None, origin.model)
            and self.tenant in (None, origin.tenant)
            and (self.document is None or self.document in origin.documents)
            and (self.chunk is None or self.chunk in origin.chunks)
            and (self.chunks is None or not self.chunks.isdisjoint(origin.chunks))
        )

    def of_single_chunks(self) -> Iterator[EntryFilter]:
        """Yield filters without `chunks` that together select the same; deletions are recorded in this form."""
        if self.chunks is None:
            yield self
        for chunk in sorted(self.chunks or ()):
            yield replace(self, chunk=chunk, chunks=None)

    def fields_of_tombstone(self) -> dict[str, str | None]:
        """Return the fields that a recorded deletion has, in their order, for every version of this package."""
        return {"model": self.model, "tenant": self.tenant, "document": self.document, "chunk": self.chunk}


EVERYTHING = EntryFilter()
