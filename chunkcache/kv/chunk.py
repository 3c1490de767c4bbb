"""The key of a chunk, and its keys and values.

A chunk KV is the keys and values of one fixed list of token ids, computed once after known other tokens.
Its keys are rotated for the positions it was computed at; whoever uses it elsewhere re-rotates them.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
import torch

from chunkcache.kv.device import Ready
from chunkcache.kv.quantised import QuantisedLayer

FORMAT_VERSION = 1

Layer = torch.Tensor | QuantisedLayer
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class ChunkKey:
    """Name of one chunk KV: a SHA-256 that reveals neither text nor token ids.

    Two chunk KV have the same key only if format, model fingerprint, tenant, the token ids before
    the chunk and the token ids of the chunk are all the same.
    """

    digest: str

    @classmethod
    def of(cls, fingerprint: str, context: Sequence[int], token_ids: Sequence[int], tenant: str = "") -> ChunkKey:
        """Return the key of `token_ids` computed right after the token ids `context`."""
        sha = hashlib.sha256()
        parts = (
            str(FORMAT_VERSION).encode(),
            fingerprint.encode(),
            tenant.encode(),
            np.asarray(context, dtype="<i8").tobytes(),
            np.asarray(token_ids, dtype="<i8").tobytes(),
        )
        for part in parts:
            sha.update(len(part).to_bytes(8, "little"))
            sha.update(part)
        return cls(sha.hexdigest())

    def __str__(self) -> str:
        return self.digest[:12]


@dataclass(frozen=True)
class ChunkRef:
    """A chunk after the tokens it is computed behind: what a library is asked for. Made by `ChunkLibrary.ref`.

    Attributes:
        key: name of its KV in a store; refs with the same key are equal.
        token_ids: of the chunk.
        context_ids: the token ids that its KV are computed after.
        near: whether its KV are computed after its nearest chunks, too, which `context_ids` does not say.
    """

    key: ChunkKey
    token_ids: TokenIds = field(compare=False, repr=False)
    context_ids: TokenIds = field(compare=False, repr=False)
    near: bool = field(default=False, compare=False)

    def is_exact_after(self, token_ids: TokenIds) -> bool:
        """Return whether its KV are what a full prefill computes of the chunk right after `token_ids`."""
        return not self.near and self.context_ids == token_ids


def chunk_name(token_ids: Sequence[int]) -> str:
    """Return a short name that tells chunks apart by their token ids, and reveals none of them."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ContextAttention:
    """What the tokens of a chunk looked at when it was computed behind other chunks (Cache-Craft's metadata).

    Attention is a mean over heads and layers.

    Attributes:
        chunks: names of the chunks before it, in order.
        inter: attention to each of these, summed over all pairs of tokens.
        intra: attention within the chunk, each token's to itself left out, summed over pairs.
        a: inter per token pair, summed over the chunks.
        b: intra per squared length.
        outside: `[tokens]` what each token gave to all chunks before; to the prefix, but for its first token, if
            there were none. (Nearly all tokens look at the first token, whatever they mean.)
    """

    chunks: tuple[str, ...]
    inter: tuple[float, ...]
    intra: float
    a: float
    b: float
    outside: torch.Tensor


class LazyLayers(Sequence[Layer]):
    """Layers of a chunk KV that are read when they are indexed; a subclass says how.

    Attributes:
        shapes: shape of each layer.
        waits: whether reading waits for others more than it copies, and is better done in a thread.
        in_memory: whether they are in memory already, and none can be lost.
    """

    in_memory = False

    def __init__(self, shapes: tuple[tuple[int, ...], ...], waits: bool) -> None:
        self.shapes, self.waits = shapes, waits

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self.read(range(len(self))[index])

    @abstractmethod
    def read(self, index: int) -> Layer:
        """Return layer `index`.

        Raises:
            EntryLostError: it is damaged or gone.
        """


def hashed_label(kind: str, name: str) -> str:
    """Return a hash that stands for the name of a tenant or document; '' stands for none."""
    return hashlib.sha256(f"{kind}\0{name}".encode()).hexdigest()[:32] if name else ""


@dataclass(frozen=True)
class Origin:
    """Where a chunk KV comes from: what it is deleted by, and what it would cost to have it again.

    Attributes:
        model: fingerprint of the model that computed it.
        tenant: `hashed_label("tenant", tenant)` of whoever it belongs to.
        documents: `hashed_label("document", id)` of each document that it is known to have been computed from.
        chunks: `chunk_name` of each chunk that it was computed from: its own, and those that stood before it.
        created: when it was computed, in seconds since the epoch.
        compute_s: seconds that this took.
    """

    model: str = ""
    tenant: str = ""
    documents: tuple[str, ...] = ()
    chunks: tuple[str, ...] = ()
    created: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class ChunkKV:
    """Keys and values of one chunk.

    Attributes:
        token_ids: the chunk's tokens; a hit in a store is used only if they agree.
        position: position that the first token's key is rotated for, the length of its context.
        layers: one `[2, kv_heads, tokens, head_dim]` block per layer, keys first, as a tensor or quantised. A tier
            may give any sequence that loads a layer when it is indexed, so that layers stream while the model
            computes; indexing then raises `EntryLostError` where the layer is damaged or has gone.
        nbytes: size of all layers together.
        context: what it looked at, if that was recorded.
        origin: where it comes from.
        ready: when its layers are made, if streams of an accelerator make them; see `chunkcache.kv.transfer`.
        source: the kind of tier that it was read from, such as `memory`; '' where it was computed.
    """

    token_ids: tuple[int, ...]
    position: int
    layers: Sequence[Layer]
    nbytes: int
    context: ContextAttention | None = None
    origin: Origin = Origin()
    ready: tuple[Ready, ...] = ()
    source: str = ""

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        position: int,
        layers: Sequence[Layer],
        context: ContextAttention | None = None,
        origin: Origin = Origin(),
    ) -> ChunkKV:
        """Build a chunk KV from layers that are in memory."""
        return cls(tuple(token_ids), position, tuple(layers), sum(layer.nbytes for layer in layers), context, origin)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each layer; layers are not loaded for it."""
        if isinstance(self.layers, LazyLayers):
            return self.layers.shapes
        return tuple(tuple(layer.shape) for layer in self.layers)

    def loaded(self) -> ChunkKV:
        """Return the same chunk KV with all layers in memory.

        Raises:
            EntryLostError: one of them is damaged or gone.
        """
        if isinstance(self.layers, tuple) or (isinstance(self.layers, LazyLayers) and self.layers.in_memory):
            return self
        return self.of_layers(tuple(self.layers))

    def of_layers(self, layers: Sequence[Layer]) -> ChunkKV:
        """Return the same chunk KV with other layers, which are in memory and made."""
        return replace(self, layers=layers, nbytes=sum(layer.nbytes for layer in layers), ready=())

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        """Say nothing of the text: token ids in a traceback would be the text."""
        return f"<ChunkKV of {len(self)} tokens at position {self.position}, {len(self.layers)} layers>"
