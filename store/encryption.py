"""Encryption at rest: whole entries of `entry.py`, header and blocks, under AES-256-GCM.

An encrypted entry has the form of a plain one, a header and one block per layer:

    magic and format version    8 bytes
    length of what follows      4 bytes, little-endian, the next 32 bytes not counted
    id                         32 random bytes, drawn for each write
    id of the key               a byte that says its length, then ASCII
    check of the key            8 bytes, by which a wrong key is told from a changed byte
    encrypted header            of the plain entry, all of it
    encrypted blocks            one per layer, in order

Each encrypted part is a random nonce of 12 bytes, the ciphertext, and a tag of 16 bytes. Each entry has a key of its
own, derived by HMAC-SHA-256 from the key in the list and the id: so no number of entries wears a key out. A tag
vouches also for format version, entry key, id, and number of the part: no part can stand in for another, nor for the
same part of an earlier write.

A signature (`secret`) is within what is encrypted, and checked after the tag.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chunkcache.errors import StoreURLError, missing_extra
from chunkcache.kv import ChunkKey
from chunkcache.store.entry import ENCRYPTED, PREAMBLE, DamagedError, ForeignSealError, description_length

KEYS = "CHUNKCACHE_ENCRYPTION_KEYS"  # environment variable
OVERHEAD = 12 + 16  # bytes of nonce and tag of each encrypted part
MOST = 2**31 - 64  # bytes of one part; `cryptography` takes no more
_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_KEY_BYTES, _ENTRY_ID_BYTES, _CHECK_BYTES = 32, 32, 8
_FORM = "write id:base64-of-32-bytes for each key, with commas or line breaks between; see chunkcache store key"


def new_key(key_id: str) -> str:
    """Return a random key under an id, as a line for a list of keys.

    Raises:
        StoreURLError: the id has other characters than letters, digits, and any of _.- or is too long.
    """
    if not _ID.fullmatch(key_id):
        raise StoreURLError(f"{key_id!r} is no id of a key: take 1 to 32 letters, digits, and any of _.-")
    return f"{key_id}:{base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()}"


def parse_keys(text: str, where: str) -> dict[str, bytes]:
    """Return the keys that `text` lists, by id and in order.

    Args:
        text: `id:base64` of each key, with commas or white space between.
        where: what `text` was read from, for messages.

    Raises:
        StoreURLError: there is none, or one cannot be used. The message names the id and never the key.
    """
    keys: dict[str, bytes] = {}
    for number, line in enumerate(re.split(r"[\s,]+", text.strip(" \t\r\n,")), 1):
        key_id, _, encoded = line.partition(":")
        if not encoded or not _ID.fullmatch(key_id):  # it may be the key itself: it is not shown
            raise StoreURLError(f"key {number} of {where} has no id, or there is none: {_FORM}")
        if key_id in keys:
            raise StoreURLError(f"{where} has two keys of the id {key_id!r}: give each key an id of its own")
        try:
            key = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise StoreURLError(f"the key {key_id!r} of {where} is not base64: {_FORM}") from None
        if len(key) != _KEY_BYTES:
            raise StoreURLError(f"the key {key_id!r} of {where} has {len(key)} bytes, not {_KEY_BYTES}: {_FORM}")
        keys[key_id] = key
    return keys


def find_keyring(path: str | None) -> Keyring | None:
    """Return the keys in the file at `path`; without one those of CHUNKCACHE_ENCRYPTION_KEYS, None if it is not set.

    Raises:
        StoreURLError: the file cannot be read, or a key cannot be used.
        InputError: the package `cryptography` is not installed.
    """
    if path is None:
        text = os.environ.get(KEYS, "")
        return Keyring(parse_keys(text, KEYS)) if text else None
    try:
        text = Path(path).expanduser().read_text(encoding="ascii")
    except OSError as error:
        raise StoreURLError(f"encryption_key_file={path!r} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise StoreURLError(f"encryption_key_file={path!r} has other characters than ASCII: {_FORM}") from None
    return Keyring(parse_keys(text, path))


def is_encrypted(header: bytes) -> bool:
    """Return whether a header is that of an encrypted entry."""
    return header.startswith(ENCRYPTED)


class Keyring:
    """Encrypts entries under the first of its keys, and decrypts those under any of them.

    Args:
        keys: 32 bytes each, by id; one at least.

    Raises:
        InputError: the package `cryptography` is not installed.
    """

    def __init__(self, keys: dict[str, bytes]) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise missing_extra("encryption", "encryption of stored entries", error) from None
        self._aes = AESGCM
        self._keys = dict(keys)
        self._first = next(iter(keys))

    def encrypt(self, key: ChunkKey, header: bytes, blocks: Sequence[memoryview]) -> tuple[bytes, list[memoryview]]:
        """Return header and blocks of the entry under `key`, encrypted; each block grows by `OVERHEAD`."""
        entry_id = secrets.token_bytes(_ENTRY_ID_BYTES)
        parts = self._parts(key, entry_id, self._first)
        named = self._name(self._first) + parts.encrypt(0, header)
        encrypted = ENCRYPTED + len(named).to_bytes(4, "little") + entry_id + named
        return encrypted, [memoryview(parts.encrypt(number, block)) for number, block in enumerate(blocks, 1)]

    def open(self, key: ChunkKey, header: bytes) -> Opened:
        """Decrypt the header of the entry under `key`.

        Raises:
            ForeignSealError: it is not encrypted, or under a key that is not here.
            DamagedError: it is not what was written for this entry.
        """
        length = description_length(header[:PREAMBLE])
        if not is_encrypted(header):
            raise ForeignSealError("not encrypted, and this store has keys")
        entry_id, named = header[PREAMBLE - _ENTRY_ID_BYTES : PREAMBLE], header[PREAMBLE:]
        if len(named) != length:
            raise DamagedError(f"the header has {len(named)} bytes, not {length}")
        for key_id in self._keys:
            name = self._name(key_id)
            if named.startswith(name):
                parts = self._parts(key, entry_id, key_id)
                return Opened(parts, bytes(parts.decrypt(0, memoryview(named)[len(name) :])))
        raise ForeignSealError("encrypted under a key that this store does not have")

    def _name(self, key_id: str) -> bytes:
        """Return id and check of a key."""
        check = hmac.digest(self._keys[key_id], ENCRYPTED + b"check", "sha256")[:_CHECK_BYTES]
        return bytes([len(key_id)]) + key_id.encode() + check

    def _parts(self, key: ChunkKey, entry_id: bytes, key_id: str) -> _Parts:
        own = hmac.digest(self._keys[key_id], ENCRYPTED + b"entry" + entry_id, "sha256")
        return _Parts(self._aes(own), ENCRYPTED + bytes.fromhex(key.digest) + entry_id)


class Opened:
    """An encrypted entry whose header is decrypted.

    Attributes:
        header: that of the plain entry.
    """

    def __init__(self, parts: _Parts, header: bytes) -> None:
        self._parts, self.header = parts, header

    def block(self, index: int, data: Any) -> memoryview:
        """Return the plain block of a layer as a new writable buffer.

        Args:
            index: number of the layer.
            data: the encrypted block.

        Raises:
            DamagedError: it is not what was written for this layer of this entry.
        """
        return self._parts.decrypt(index + 1, memoryview(data).cast("B"))


class _Parts:
    """The parts of one entry: its header is number 0, and its layers follow."""

    def __init__(self, aes: Any, entry: bytes) -> None:
        self._aes, self._entry = aes, entry

    def encrypt(self, number: int, data: bytes | memoryview) -> bytes:
        nonce = secrets.token_bytes(12)
        return nonce + bytes(self._aes.encrypt(nonce, data, self._bound(number)))

    def decrypt(self, number: int, data: memoryview) -> memoryview:
        from cryptography.exceptions import InvalidTag

        if len(data) < OVERHEAD:
            raise DamagedError(f"an encrypted part of {len(data)} bytes is too short")
        buffer: memoryview = torch.empty(len(data) - OVERHEAD, dtype=torch.uint8).numpy().data
        try:
            buffer[:] = self._aes.decrypt(data[:12], data[12:], self._bound(number))
        except InvalidTag:
            raise DamagedError("it does not decrypt: it was changed, or is a part of something else") from None
        return buffer

    def _bound(self, number: int) -> bytes:
        return self._entry + number.to_bytes(4, "little")
