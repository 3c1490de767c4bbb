"""The format of an entry as bytes: a header, then one block per layer.

    magic and format version    8 bytes
    length of the description   4 bytes, little-endian
    seal                       32 bytes: SHA-256 of what follows; with a secret, HMAC-SHA-256
    description                JSON: key, token ids, position, shapes, how the layers are kept, size and
                               checksum of each block, context, origin
    blocks                     one per layer, in order, the numbers as they lie in memory

Checksums of blocks are XXH3, which finds what broke; with a secret they are SHA-256, so that the seal vouches for
every byte. Nothing here is executed or unpickled, and every field is validated before use. An encrypted entry is one
of these inside of another: see `encryption.py`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from chunkcache.kv import ChunkKey, ChunkKV, ContextAttention, Layer, Origin
from chunkcache.kv.quantised import GROUP, QuantisedLayer
from chunkcache.store.codec import Zstd
from chunkcache.store.records import Entry

MAGIC = b"CHUNKKV\x01"
ENCRYPTED = b"CHUNKKE\x01"  # of an encrypted entry
PREAMBLE = len(MAGIC) + 4 + 32  # bytes before the description
MAX_DESCRIPTION = 64 * 2**20
_MAX_LAYERS = 4096
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.uint8)}
_BITS = {"int8": 8, "int4": 4}


class DamagedError(ValueError):
    """Bytes that are not a valid entry; the message names no content."""


class ForeignSealError(DamagedError):
    """An entry that may be intact, but is sealed with another secret, or encrypted under another key, or not so."""


@dataclass(frozen=True)
class Block:
    """The block of one layer: its size, its checksum in hex, and the layer's shape.

    Attributes:
        kind: a dtype, or `int8` or `int4` for quantised.
        dtype: of the layer when it was put.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    checksum: str

    def tensors(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor in the block, in order."""
        if self.kind in _DTYPES:
            return [(_DTYPES[self.kind], self.shape)]
        _, heads, tokens, dim = self.shape
        groups = -(-tokens // GROUP)
        key, value = (torch.float16, (heads, groups, dim)), (torch.float16, (heads, tokens, 1))
        return [(torch.uint8, (2, heads, tokens, dim * _BITS[self.kind] // 8)), key, key, value, value]

    def plain_bytes(self) -> int:
        """Return the size of the block before compression."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.tensors())

    def layer(self, data: Any, compressed: bool, secret: bytes | None) -> Layer:
        """Return the layer in `data`, a writable buffer that becomes the layer's own unless it is compressed.

        Raises:
            DamagedError: the bytes are not those that were written.
        """
        view = memoryview(data).cast("B")
        if len(view) != self.nbytes:
            raise DamagedError(f"a block of {self.nbytes} bytes has {len(view)}")
        if _checksum(view, secret) != self.checksum:
            raise DamagedError("a block does not agree with its checksum")
        tensors = self.tensors()
        flat: Any = view
        if compressed:
            try:
                flat = Zstd().unpack(view, tensors[0][0].itemsize, self.plain_bytes())
            except ValueError as error:
                raise DamagedError(str(error)) from None
        parts, start = [], 0
        for dtype, shape in tensors:
            count = math.prod(shape)
            parts.append(torch.frombuffer(flat, dtype=dtype, count=count, offset=start).view(shape))
            start += count * dtype.itemsize
        if self.kind in _DTYPES:
            return parts[0]
        return QuantisedLayer(_BITS[self.kind], _DTYPES[self.dtype], *parts)


@dataclass(frozen=True)
class Header:
    """Everything about an entry but its KV."""

    key: ChunkKey
    token_ids: tuple[int, ...]
    position: int
    blocks: tuple[Block, ...]
    compressed: bool
    context: ContextAttention | None
    origin: Origin
    expires: float | None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Size of each block."""
        return tuple(block.nbytes for block in self.blocks)

    def entry(self) -> Entry:
        """Return the entry, as it is listed."""
        size, tokens = sum(self.sizes), len(self.token_ids)
        return Entry(**vars(self.origin), key=self.key, nbytes=size, tokens=tokens, expires=self.expires)

    @classmethod
    def parse(cls, data: bytes | memoryview, key: ChunkKey | None, secret: bytes | None) -> Header:
        """Parse and validate a whole header, sealed with `secret`, of the entry under `key`; None allows any key.

        Raises:
            ForeignSealError: it is sealed otherwise, or encrypted.
            DamagedError: it is no such header.
        """
        data = bytes(data)
        length = description_length(data[:PREAMBLE])
        if data.startswith(ENCRYPTED):
            raise ForeignSealError("encrypted, and this store has no keys")
        seal, description = data[PREAMBLE - 32 : PREAMBLE], data[PREAMBLE:]
        if len(description) != length:
            raise DamagedError(f"the header has {len(description)} bytes, not {length}")
        agrees = hmac.compare_digest(seal, _seal(description, secret))
        try:
            header = cls._of(json.loads(description))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise DamagedError(f"the header makes no sense ({type(error).__name__})") from None
        if not agrees:
            sealed = len(header.blocks[0].checksum) == len(_checksum(memoryview(b""), b"-"))
            if sealed or hmac.compare_digest(seal, _seal(description, None)):
                raise ForeignSealError("sealed with another secret than this store's, or with none")
            raise DamagedError("the header does not agree with its seal")
        if key is not None and header.key != key:
            raise DamagedError("the header is that of another entry")
        return header

    @classmethod
    def _of(cls, json_object: dict[str, Any]) -> Header:
        blocks = tuple(Block(b[0], b[1], tuple(b[2]), b[3], b[4]) for b in json_object["blocks"])
        compressed = json_object["compressed"]
        token_ids = np.asarray(json_object["token_ids"], dtype="<i8")
        if not 0 < len(blocks) <= _MAX_LAYERS or token_ids.ndim != 1 or not isinstance(compressed, bool):
            raise ValueError
        for block in blocks:
            _check(block, len(token_ids), compressed)
        position, digest = json_object["position"], json_object["key"]
        if type(position) is not int or not 0 <= position < 2**31 or len(bytes.fromhex(digest)) != 32:
            raise ValueError
        context = json_object["context"]
        o = json_object["origin"]
        documents, chunks = (tuple(map(str, o[name])) for name in ("documents", "chunks"))
        created, compute_s = (float(o[name]) for name in ("created", "compute_s"))
        origin = Origin(str(o["model"]), str(o["tenant"]), documents, chunks, created, compute_s)
        expires = json_object["expires"]
        return cls(
            ChunkKey(digest),
            tuple(token_ids.tolist()),
            position,
            blocks,
            compressed,
            None if context is None else _context(context, len(token_ids)),
            origin,
            None if expires is None else float(expires),
        )


def encode(
    key: ChunkKey, kv: ChunkKV, compress: bool, secret: bytes | None, expires: float | None
) -> tuple[bytes, list[memoryview]]:
    """Return the header and blocks of `kv`; the blocks of uncompressed tensors on the CPU are views of them."""
    blocks, data = [], []
    for layer in kv.layers:
        tensors = [layer] if isinstance(layer, Tensor) else list(layer.parts())
        flat = _flat(tensors)
        block = memoryview(Zstd().pack(flat, tensors[0].element_size()) if compress else flat.data)
        name = str(layer.dtype).removeprefix("torch.")
        kind = name if isinstance(layer, Tensor) else f"int{layer.bits}"
        blocks.append((kind, name, tuple(layer.shape), len(block), _checksum(block, secret)))
        data.append(block)
    description = json.dumps(
        {
            "key": key.digest,
            "token_ids": kv.token_ids,
            "position": kv.position,
            "compressed": compress,
            "blocks": blocks,
            "context": None if kv.context is None else _context_json(kv.context),
            "origin": asdict(kv.origin),
            "expires": expires,
        },
        separators=(",", ":"),
    ).encode()
    header = MAGIC + len(description).to_bytes(4, "little") + _seal(description, secret) + description
    return header, data


def description_length(preamble: bytes) -> int:
    """Return how many bytes of description follow the first `PREAMBLE` bytes of an entry.

    Raises:
        DamagedError: an entry of this format version does not start so.
    """
    if len(preamble) < PREAMBLE or preamble[:7] not in (MAGIC[:7], ENCRYPTED[:7]):
        raise DamagedError("it is no entry of a chunkcache store")
    if preamble[7] != MAGIC[7]:
        raise DamagedError(f"its format version is {preamble[7]}, not {MAGIC[7]}")
    length = int.from_bytes(preamble[8:12], "little")
    if length > MAX_DESCRIPTION:
        raise DamagedError(f"its header claims {length} bytes")
    return length


def _check(block: Block, tokens: int, compressed: bool) -> None:
    whole = [*block.shape, block.nbytes]
    if block.kind not in {**_DTYPES, **_BITS} or block.dtype not in _DTYPES or not isinstance(block.checksum, str):
        raise ValueError
    if any(type(number) is not int or not 0 <= number < 2**40 for number in whole) or len(block.shape) > 8:
        raise ValueError
    opaque = block.kind == "uint8" and len(block.shape) == 1
    if not opaque and (len(block.shape) != 4 or block.shape[0] != 2 or block.shape[2] != tokens):
        raise ValueError
    if block.kind == "int4" and block.shape[3] % 2:
        raise ValueError
    plain = block.plain_bytes()
    if plain >= 2**40 or (not compressed and plain != block.nbytes):
        raise ValueError


def _flat(tensors: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of the tensors one behind the other; a view where that is possible."""
    views = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in tensors]
    return views[0] if len(views) == 1 else np.concatenate(views)


def _checksum(data: memoryview, secret: bytes | None) -> str:
    return xxhash.xxh3_128_hexdigest(data) if secret is None else hashlib.sha256(data).hexdigest()


def _seal(description: bytes, secret: bytes | None) -> bytes:
    if secret is None:
        return hashlib.sha256(description).digest()
    return hmac.digest(secret, MAGIC + description, "sha256")


def _context_json(context: ContextAttention) -> dict[str, Any]:
    outside = context.outside.detach().cpu().float().numpy().astype("<f4")
    return {**{f: getattr(context, f) for f in _CONTEXT}, "outside": base64.b64encode(outside.tobytes()).decode()}


_CONTEXT = ("chunks", "inter", "intra", "a", "b")


def _context(json_object: dict[str, Any], tokens: int) -> ContextAttention:
    outside = np.frombuffer(base64.b64decode(json_object["outside"], validate=True), dtype="<f4")
    chunks, inter = tuple(map(str, json_object["chunks"])), tuple(map(float, json_object["inter"]))
    if len(outside) != tokens or len(chunks) != len(inter):
        raise ValueError
    intra, a, b = (float(json_object[field]) for field in ("intra", "a", "b"))
    return ContextAttention(chunks, inter, intra, a, b, torch.from_numpy(outside.astype(np.float32)))
