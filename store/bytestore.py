"""The base of tiers that keep entries as bytes, outside the process: it encodes, verifies and decodes them.

Such a tier implements `_open`, `_save`, `_remove` and `_headers`, which move bytes without knowing the format.
"""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Layer, LazyLayers
from chunkcache.kv.transfer import to_host
from chunkcache.store.base import Heads, Tier
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.encryption import KEYS, MOST, OVERHEAD, Opened, find_keyring
from chunkcache.store.entry import DamagedError, ForeignSealError, Header, encode
from chunkcache.store.records import Entry, EntryFilter, has_expired

SECRET = "CHUNKCACHE_SECRET"  # environment variable


def own_secret() -> bytes | None:
    """Return the secret in the environment, if there is one."""
    return os.environ.get(SECRET, "").encode() or None


class Blob(Protocol):
    """An entry of which the header has been read."""

    header: bytes

    def block(self, index: int, sizes: Sequence[int]) -> Any:
        """Return the block of a layer as a new writable buffer; layers are read in any order, any number of times.

        Args:
            index: number of the layer.
            sizes: bytes of every block of the entry.

        Raises:
            DamagedError: it is not there, or shorter.
        """


@dataclass(frozen=True)
class Encoding:
    """How entries become bytes.

    Attributes:
        codec: `raw`, `bf16`, `fp16`, `int8` or `int4`; see `chunkcache.store.codec`.
        compress: `none` or `zstd`.
        secret: key of the HMAC-SHA-256 that seals entries; '' takes that of the environment variable
            CHUNKCACHE_SECRET. Without one, entries are protected against accidents only. Entries with another seal
            are not used, and are replaced when they are computed again.
        encryption_key_file: a file of keys, `id:base64` each, that entries are encrypted under: the first encrypts,
            all decrypt. None takes those of the environment variable CHUNKCACHE_ENCRYPTION_KEYS; without any,
            entries are not encrypted. What is encrypted under another key, or is not, is not used either.

    Raises:
        StoreURLError: `compress` is none of these.
    """

    codec: str = "raw"
    compress: str = "none"
    secret: str = field(default="", repr=False)
    encryption_key_file: str | None = None

    def __post_init__(self) -> None:
        if self.compress not in ("none", "zstd"):
            raise StoreURLError(f"compress={self.compress!r} is neither 'none' nor 'zstd'")


RAW = Encoding()


class ByteStore(Tier):
    """A tier outside the process.

    Attributes:
        secret: what entries are sealed with, None for nothing.
        keyring: the keys that entries are encrypted under, None for none.
    """

    waits: ClassVar[bool] = True

    def __init__(self, budget: Budget = UNBOUNDED, encoding: Encoding = RAW) -> None:
        super().__init__(budget, encoding.codec)
        self._compress = encoding.compress == "zstd"
        self.secret = encoding.secret.encode() or own_secret()
        self.keyring = find_keyring(encoding.encryption_key_file)

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        kv = super().get(key, token_ids, heads)
        if kv is not None and isinstance(kv.layers, StoredLayers):
            kv.layers.counted = True
        return kv

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        try:
            blob = self._opened(key)
            if blob is None:
                return None
            header = Header.parse(blob.header, key, self.secret)
        except ForeignSealError as foreign:
            self._note_foreign(foreign)
            return None
        except DamagedError as damage:
            raise EntryLostError(key, str(damage)) from None
        if has_expired(header.expires):
            self.count(expired=1)
            self._remove(key)
            return None
        layers = StoredLayers(self, header, blob)
        return ChunkKV(header.token_ids, header.position, layers, sum(header.sizes), header.context, header.origin)

    def __contains__(self, key: ChunkKey) -> bool:
        return self._attempt(lambda: self._is_current(key), False)

    def _is_current(self, key: ChunkKey) -> bool:
        """Return whether there is an entry of ours, within its time to live, by what its header says."""
        try:
            blob = self._opened(key)
            return blob is not None and not has_expired(Header.parse(blob.header, key, self.secret).expires)
        except (EntryLostError, DamagedError):
            return False

    def _write(self, entry: Entry, kv: ChunkKV) -> bool:
        header, blocks = encode(entry.key, self._codec(to_host(kv)), self._compress, self.secret, entry.expires)
        entry = replace(entry, nbytes=sum(map(len, blocks)))
        if not self.fits(entry.nbytes):
            return False
        if self.keyring is not None:
            if max(len(header), *map(len, blocks)) > MOST:
                self.warn_once("a layer has more than the %d bytes that can be encrypted: not stored", MOST)
                return False
            header, blocks = self.keyring.encrypt(entry.key, header, blocks)
        return self._save(entry, header, blocks)

    def _opened(self, key: ChunkKey) -> Blob | None:
        """Return the entry under `key`, its header read and decrypted, or None.

        Raises:
            EntryLostError, DamagedError: it is damaged, or encrypted under another key.
        """
        blob = self._open(key)
        if blob is None or self.keyring is None:
            return blob
        return DecryptedBlob(blob, self.keyring.open(key, blob.header))

    def _parsed(self, key: ChunkKey, data: bytes) -> Header:
        """Decrypt and parse the header of the entry under `key`; raises DamagedError."""
        if self.keyring is not None:
            data = self.keyring.open(key, data).header
        return Header.parse(data, key, self.secret)

    def _stored_sizes(self, key: ChunkKey, data: bytes) -> list[int]:
        """Return the bytes of each block as it is stored, by the header as it is stored; raises DamagedError."""
        return [size + OVERHEAD * (self.keyring is not None) for size in self._parsed(key, data).sizes]

    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        for key, data in self._headers():
            try:
                entry = self._parsed(key, data).entry()
            except ForeignSealError as foreign:
                self._note_foreign(foreign)
                continue
            except DamagedError as damage:
                self.drop_damaged(key, str(damage))
                continue
            if where.matches(entry):
                yield entry

    def _note_foreign(self, why: ForeignSealError) -> None:
        """Count an entry of another secret or key. It stays: a mistyped secret must not delete all entries."""
        self.count(mismatches=1)
        self.warn_once(f"entries are {why}: they are not used; see {SECRET} and {KEYS}")

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
            self.drop_damaged(header.key, str(damage))
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


class DecryptedBlob:
    """An encrypted entry, read as the plain one that it was.

    Attributes:
        stored: the entry as it is stored.
    """

    def __init__(self, stored: Blob, opened: Opened) -> None:
        self.stored, self._opened = stored, opened
        self.header = opened.header

    def block(self, index: int, sizes: Sequence[int]) -> memoryview:
        return self._opened.block(index, self.stored.block(index, [size + OVERHEAD for size in sizes]))


class StoredLayers(LazyLayers):
    """The layers of an entry, each read and verified when it is indexed."""

    def __init__(self, store: ByteStore, header: Header, blob: Blob) -> None:
        super().__init__(tuple(block.shape for block in header.blocks), store.waits)
        self._store, self._header, self._blob = store, header, blob
        self.counted = False  # as a hit
        self._lost: EntryLostError | None = None

    def read(self, index: int) -> Layer:
        if self._lost is not None:  # a lost layer stays lost, and is counted once
            raise self._lost
        try:
            return self._store.layer(self._header, self._blob, index)
        except EntryLostError as lost:
            self._lost = lost
            if self.counted:
                self._store.count(hits=-1, misses=1)
            raise
