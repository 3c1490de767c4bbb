"""A tier that keeps entries as bytes, outside the process: what they have in common is done here.

Such a tier implements `_open`, `_save`, `_remove` and `_headers`, which move bytes that they need not understand.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Layer, LazyLayers
from chunkcache.store.base import Entry, EntryFilter, Heads, Tier
from chunkcache.store.entry import DamagedError, ForeignSealError, Header, encode

SECRET = "CHUNKCACHE_SECRET"  # environment variable


def own_secret() -> bytes | None:
    """Return the secret in the environment, if there is one."""
    return os.environ.get(SECRET, "").encode() or None


class Blob(Protocol):
    """The bytes of one entry, as far as they have been read.

    Attributes:
        header: the header, whole.
    """

    header: bytes

    def block(self, index: int, sizes: Sequence[int]) -> Any:
        """Return block `index` as a buffer that is the caller's to keep and may be written to.

        Called for every layer in order, as a rule, but any order must work, and any number of times.

        Args:
            index: number of the layer.
            sizes: bytes of every block of the entry.

        Raises:
            DamagedError: it is not there, or shorter.
        """


class ByteStore(Tier):
    """A tier outside the process.

    Args:
        max_bytes: byte budget; None for none.
        codec: `raw`, `bf16`, `fp16`, `int8` or `int4`; see `chunkcache.store.codec`.
        compress: `none` or `zstd`.
        ttl: seconds that an entry is kept after it was computed; None for ever.
        secret: what entries are sealed with, by HMAC-SHA-256; '' takes it from the environment variable
            CHUNKCACHE_SECRET, and if there is none entries are protected against accidents only. Entries that are
            sealed otherwise are not used, and are replaced when they are computed again.

    Attributes:
        secret: as bytes, None for none.

    Raises:
        StoreURLError: a value is none of these.
    """

    waits: ClassVar[bool] = True

    def __init__(
        self,
        max_bytes: int | None = None,
        codec: str = "raw",
        compress: str = "none",
        ttl: float | None = None,
        secret: str = "",
    ) -> None:
        super().__init__(max_bytes, codec, ttl)
        if compress not in ("none", "zstd"):
            raise StoreURLError(f"compress={compress!r} is neither 'none' nor 'zstd'")
        self._compress = compress == "zstd"
        self.secret = secret.encode() or own_secret()

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        kv = super().get(key, token_ids, heads)
        if kv is not None and isinstance(kv.layers, StoredLayers):
            kv.layers.counted = True
        return kv

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        blob = self._open(key)
        if blob is None:
            return None
        try:
            header = Header.parse(blob.header, key, self.secret)
        except ForeignSealError:
            self._note_foreign()
            return None
        except DamagedError as damage:
            raise EntryLostError(key, str(damage)) from None
        if header.expires is not None and header.expires < time.time():
            self.count(expired=1)
            self._remove(key)
            return None
        layers = StoredLayers(self, header, blob)
        return ChunkKV(header.token_ids, header.position, layers, sum(header.sizes), header.context, header.origin)

    def _write(self, key: ChunkKey, kv: ChunkKV) -> bool:
        expires = self._expiry(kv)
        kept = self._codec(kv)
        header, blocks = encode(key, kept, self._compress, self.secret, expires)
        entry = replace(Entry.of(key, kept, expires), nbytes=sum(map(len, blocks)))
        return self.fits(entry.nbytes) and self._save(entry, header, blocks)

    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        for key, data in self._headers():
            try:
                entry = Header.parse(data, key, self.secret).entry()
            except ForeignSealError:
                self._note_foreign()
                continue
            except DamagedError as damage:
                self.lose(key, str(damage))
                continue
            if where.matches(entry):
                yield entry

    def _note_foreign(self) -> None:
        """Leave an entry that another secret may vouch for: a mistyped one shall not delete them all."""
        self.count(mismatches=1)
        self.say_once(
            f"entries are not sealed with this store's secret, or with none: they are not used; see {SECRET}"
        )

    def layer(self, header: Header, blob: Blob, index: int) -> Layer:
        """Read and verify one layer.

        Raises:
            EntryLostError: it cannot be had. That is counted, and what is damaged is deleted.
        """
        block = header.blocks[index]
        if self.breaker.is_open:
            self.count(skipped=1)
            raise EntryLostError(header.key, "its tier is in trouble")
        try:
            return block.layer(blob.block(index, header.sizes), header.compressed, self.secret)
        except DamagedError as damage:
            self.lose(header.key, str(damage))
            why = str(damage)
        except self.faults as fault:
            self.trouble(fault)
            why = f"the tier is in trouble ({type(fault).__name__})"
        raise EntryLostError(header.key, why)

    @abstractmethod
    def _open(self, key: ChunkKey) -> Blob | None:
        """Return the entry under `key`, its header read, or None; raise `EntryLostError` if it is damaged."""

    @abstractmethod
    def _save(self, entry: Entry, header: bytes, blocks: Sequence[memoryview]) -> bool:
        """Write an entry, replacing one of the same key, so that no reader takes a part of it for the whole.

        Returns:
            False if it is refused.
        """

    @abstractmethod
    def _headers(self) -> Iterator[tuple[ChunkKey, bytes]]:
        """Yield key and header of every entry."""


class StoredLayers(LazyLayers):
    """The layers of an entry, each read and verified when it is indexed."""

    def __init__(self, store: ByteStore, header: Header, blob: Blob) -> None:
        super().__init__(tuple(block.shape for block in header.blocks), store.waits)
        self._store, self._header, self._blob = store, header, blob
        self.counted = False  # as a hit
        self._lost: EntryLostError | None = None

    def read(self, index: int) -> Layer:
        if self._lost is not None:  # what is lost is so for good, and counted once
            raise self._lost
        try:
            return self._store.layer(self._header, self._blob, index)
        except EntryLostError as lost:
            self._lost = lost
            self._store.count(hits=-self.counted, misses=self.counted)
            raise
