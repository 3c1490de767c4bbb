"""Export and import of entries as a tar file, whose members `<key>.ckv` have the format of `entry.py`.

No member is written to disk by its name or unpickled, and each is validated before use. At most one entry, of at
most `MAX_ENTRY` bytes, is in memory: members are read here, since `tarfile` reads header records of any size.

Where the store has encryption keys, members are encrypted like its entries. Plain members are taken in all the same:
so a store that was not encrypted gets into one that is.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from chunkcache.errors import EntryLostError, InputError
from chunkcache.kv import ChunkKey, ChunkKV, Layer
from chunkcache.store.base import Store, Tier
from chunkcache.store.bytestore import ByteStore, own_secret
from chunkcache.store.encryption import OVERHEAD, Keyring, Opened, find_keyring, is_encrypted
from chunkcache.store.entry import PREAMBLE, DamagedError, Header, description_length, encode
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter, has_expired

MAX_ENTRY = 4 * 2**30  # bytes; 8,000 tokens of a model of 70B parameters are 2.7 GB
_NAME = re.compile(r"([0-9a-f]{64})\.ckv")
_PIECE = 2**20


@dataclass
class Exported:
    """Counts of an export: entries written, their bytes, and entries that could not be read."""

    entries: int = 0
    nbytes: int = 0
    lost: int = 0


@dataclass
class Imported:
    """Counts of an import.

    Attributes:
        entries: entries stored, of `nbytes` bytes.
        damaged: entries that failed verification, are too large, or are of another secret or key.
        expired: entries past their time to live, not stored.
        refused: intact entries that the store did not take.
        other: members that are no entries.
        complete: whether the end of the file was reached.
    """

    entries: int = 0
    nbytes: int = 0
    damaged: int = 0
    expired: int = 0
    refused: int = 0
    other: int = 0
    complete: bool = False


def export_entries(
    store: Store, file: BinaryIO, where: EntryFilter = EVERYTHING, on_entry: Callable[[int, int], None] | None = None
) -> Exported:
    """Write the entries that `where` selects as an uncompressed tar file, sealed as their tier seals them.

    They are encrypted under the store's first key, if it has keys.

    Args:
        store: where they are read from, and verified; each comes from the nearest tier that has it intact.
        file: written from start to end, so a pipe will do.
        where: which ones.
        on_entry: called with (entries done, entries in all) after every one.
    """
    places: dict[ChunkKey, list[tuple[Tier, Entry]]] = {}
    for tier in _tiers(store):
        for entry in tier.entries(where):
            places.setdefault(entry.key, []).append((tier, entry))
    exported = Exported()
    keyring = _keyring(store)
    for count, held_in in enumerate(places.values(), 1):
        written = next(filter(None, (_write(file, tier, entry, keyring) for tier, entry in held_in)), 0)
        exported.entries += written > 0
        exported.nbytes += written
        exported.lost += written == 0
        if on_entry is not None:
            on_entry(count, len(places))
    file.write(tarfile.NUL * 2 * tarfile.BLOCKSIZE)
    return exported


def import_entries(store: Store, file: BinaryIO, on_entry: Callable[[Imported], None] | None = None) -> Imported:
    """Verify the entries of a tar file, and put them into `store` one after the other.

    A damaged entry is counted and left out. The store's own `ttl` counts from now on. Without a secret anybody can
    make entries that look intact: import only files that you trust.

    Args:
        store: where they go; its secret is the one that they must be sealed with, and its keys decrypt them.
        file: read from start to end, so a pipe will do.
        on_entry: called after every member with the counts so far.

    Raises:
        InputError: it is no uncompressed tar file.
    """
    imported = Imported()
    secret = next((tier.secret for tier in _tiers(store) if isinstance(tier, ByteStore)), own_secret())
    reader = _Reader(secret, _keyring(store))
    for member in _members(file, imported):
        name = _NAME.fullmatch(PurePosixPath(member.name).name)
        if name is None:
            imported.other += 1
        else:
            _take(store, member, ChunkKey(name[1]), reader, imported)
        if on_entry is not None:
            on_entry(imported)
    return imported


class _Member:
    """A member of a tar file that is read from start to end."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self._file, self.name, self.size = file, name, size
        self._left = size

    def read(self, size: int) -> bytearray:
        """Return the next `size` bytes, in a buffer of their own.

        Raises:
            DamagedError: there are fewer.
        """
        if size > self._left:
            raise DamagedError(f"the entry ends {size - self._left} bytes too early")
        data = bytearray(size)
        self._left -= size
        _fill(self._file, memoryview(data))
        return data

    def skip(self) -> None:
        """Skip the rest of it and its padding to a whole block."""
        left = self._left + -self.size % tarfile.BLOCKSIZE
        while left:
            piece = min(left, _PIECE)
            _fill(self._file, memoryview(bytearray(piece)))
            left -= piece


def _members(file: BinaryIO, imported: Imported) -> Iterator[_Member]:
    """Yield the regular members of a tar file, and skip others; at its end set `imported.complete`."""
    first = True
    try:
        while True:
            block = bytearray(tarfile.BLOCKSIZE)
            _fill(file, memoryview(block))
            if not any(block):
                imported.complete = True
                return
            info = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.HeaderError
            first = False
            member = _Member(file, info.name, info.size)
            if info.isreg():
                yield member
            member.skip()
    except (EOFError, tarfile.HeaderError):
        if first:
            raise InputError(
                "this is no tar file, or a compressed one: pass what chunkcache store export wrote, decompressed"
            ) from None


def _take(store: Store, member: _Member, key: ChunkKey, reader: _Reader, imported: Imported) -> None:
    """Verify one entry and put it into the store."""
    try:
        header, layers = reader.read(member, key)
    except (DamagedError, EOFError):
        imported.damaged += 1
        return
    if has_expired(header.expires):
        imported.expired += 1
        return
    stored = store.put(key, ChunkKV.of(header.token_ids, header.position, layers, header.context, header.origin))
    store.flush()  # or entries would wait in memory for a slow tier
    imported.entries += stored
    imported.nbytes += member.size * stored
    imported.refused += not stored


class _Reader:
    """Reads entries from members, and verifies them by a secret and with keys, None for none."""

    def __init__(self, secret: bytes | None, keyring: Keyring | None) -> None:
        self._secret, self._keyring = secret, keyring

    def read(self, member: _Member, key: ChunkKey) -> tuple[Header, list[Layer]]:
        """Return header and layers of an entry.

        Raises:
            DamagedError: it is not an entry of this key.
            EOFError: the file ends before it does.
        """
        preamble = bytes(member.read(PREAMBLE))
        stored = preamble + member.read(description_length(preamble))
        opened: Opened | None = None
        if self._keyring is not None and is_encrypted(stored):
            opened = self._keyring.open(key, stored)
        header = Header.parse(stored if opened is None else opened.header, key, self._secret)
        sizes = [size + OVERHEAD * (opened is not None) for size in header.sizes]
        if len(stored) + sum(sizes) != member.size:
            raise DamagedError(f"{member.size} bytes are not the size that the header says")
        plain = sum(block.plain_bytes() for block in header.blocks)  # a compressed block may claim anything
        if member.size > MAX_ENTRY or plain > MAX_ENTRY:
            raise DamagedError(f"an entry of {max(member.size, plain)} bytes is too large")
        layers = []
        for index, (block, size) in enumerate(zip(header.blocks, sizes, strict=True)):
            data: Any = member.read(size)
            data = data if opened is None else opened.block(index, data)
            layers.append(block.layer(data, header.compressed, self._secret))
        return header, layers


def _write(file: BinaryIO, tier: Tier, entry: Entry, keyring: Keyring | None) -> int:
    """Write one entry as a member; return its bytes, 0 if it cannot be read."""
    kv = tier.peek(entry.key)
    if kv is None:
        return 0
    try:
        kv = kv.loaded()
    except EntryLostError:
        return 0  # counted by the tier
    secret = tier.secret if isinstance(tier, ByteStore) else own_secret()
    header, blocks = encode(entry.key, kv, False, secret, entry.expires)
    if keyring is not None:
        header, blocks = keyring.encrypt(entry.key, header, blocks)
    info = tarfile.TarInfo(f"{entry.key.digest}.ckv")
    info.size = len(header) + sum(map(len, blocks))
    info.mode, info.mtime = 0o600, int(entry.created)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    file.write(header)
    for block in blocks:
        file.write(block)
    file.write(tarfile.NUL * (-info.size % tarfile.BLOCKSIZE))
    return info.size


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    """Read exactly as much as the buffer holds; raises EOFError if the file ends before."""
    while buffer:
        data = file.read(min(len(buffer), _PIECE))
        if not data:
            raise EOFError
        buffer[: len(data)] = data
        buffer = buffer[len(data) :]


def _keyring(store: Store) -> Keyring | None:
    """Return the keys of the nearest tier that has some, or those of the environment."""
    tiers = [tier for tier in _tiers(store) if isinstance(tier, ByteStore)]
    return next((tier.keyring for tier in tiers if tier.keyring is not None), None) or find_keyring(None)


def _tiers(store: Store) -> list[Tier]:
    return [tier for tier in store.tiers().values() if isinstance(tier, Tier)]
