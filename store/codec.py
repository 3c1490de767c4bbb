"""Codecs: how many bits a tier keeps of each number, and lossless compression of the bytes on top.

A codec turns a layer into the form that is kept. Reading leaves it in that form; it is converted or dequantised in
the pass that re-rotates the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKV, Layer
from chunkcache.kv.quantised import QuantisedLayer, dense

Bytes = NDArray[np.uint8]


def _raw(layer: Layer) -> Layer:
    return layer


def _cast(dtype: torch.dtype, layer: Layer) -> Layer:
    """Convert a layer of a wider dtype to `dtype`."""
    if isinstance(layer, torch.Tensor) and layer.is_floating_point() and layer.element_size() > dtype.itemsize:
        return layer.to(dtype)
    return layer


def _quantise(bits: int, layer: Layer) -> Layer:
    if isinstance(layer, QuantisedLayer):
        return layer if layer.bits <= bits else QuantisedLayer.of(dense(layer), bits)
    return QuantisedLayer.of(layer, bits) if layer.is_floating_point() and layer.shape[-1] % 2 == 0 else layer


CODECS: dict[str, Callable[[Layer], Layer]] = {
    "raw": _raw,
    "bf16": partial(_cast, torch.bfloat16),
    "fp16": partial(_cast, torch.float16),
    "int8": partial(_quantise, 8),
    "int4": partial(_quantise, 4),
}


def find_codec(name: str) -> Callable[[ChunkKV], ChunkKV]:
    """Return the function that brings the layers of a chunk KV into the form `name`.

    KV that start at position 0 are a prefix: others are computed behind it, and are exact only if it is. So a prefix
    is never quantised.

    Raises:
        StoreURLError: there is no such codec.
    """
    if name not in CODECS:
        raise StoreURLError(f"codec={name!r} is none of {', '.join(CODECS)}")
    if name == "raw":
        return lambda kv: kv
    return lambda kv: kv if kv.position == 0 else kv.of_layers(tuple(map(CODECS[name], kv.layers)))


class Zstd:
    """Zstandard over byte planes: the first bytes of all numbers, then the second ones, and so on.

    Neighbouring numbers have like exponents and unlike mantissas, which compress only when kept apart.
    """

    LEVEL = 1

    def pack(self, data: Bytes, itemsize: int) -> bytes:
        """Compress `data`, whose numbers are of `itemsize` bytes."""
        planes = np.ascontiguousarray(data.reshape(-1, itemsize).T) if itemsize > 1 else data
        return zstandard.ZstdCompressor(level=self.LEVEL).compress(planes.tobytes())

    def unpack(self, data: memoryview, itemsize: int, nbytes: int) -> Bytes:
        """Return the `nbytes` bytes that `data` was compressed from.

        Raises:
            ValueError: it does not decompress to exactly so many bytes.
        """
        try:
            if zstandard.frame_content_size(data) != nbytes:  # before anything is allocated for it
                raise ValueError(f"the block does not say that it is {nbytes} bytes")
            plain = np.frombuffer(bytearray(zstandard.ZstdDecompressor().decompress(data)), np.uint8)
        except zstandard.ZstdError as error:
            raise ValueError(f"the block does not decompress: {error}") from None
        if len(plain) != nbytes:
            raise ValueError(f"the block decompresses to {len(plain)} bytes, not {nbytes}")
        return np.ascontiguousarray(plain.reshape(itemsize, -1).T).reshape(-1) if itemsize > 1 else plain
