"""The two nouns every room shares: the key of a chunk and its keys and values.

A chunk KV is the keys and values of one fixed list of token ids, computed once in a known context.
Its keys are rotated for the positions it was computed at; whoever uses it elsewhere re-rotates them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ChunkKey:
    """Name of one chunk KV: a SHA-256 that reveals neither text nor token ids.

    Two chunk KV have the same key only if format, model fingerprint, tenant salt, the token ids before
    the chunk and the token ids of the chunk are all the same.
    """

    digest: str

    @classmethod
    def of(cls, fingerprint: str, context: Sequence[int], token_ids: Sequence[int], salt: str = "") -> ChunkKey:
        """Return the key of `token_ids` computed right after the token ids `context`."""
        sha = hashlib.sha256()
        fields = (
            str(FORMAT_VERSION).encode(),
            fingerprint.encode(),
            salt.encode(),
            np.asarray(context, dtype="<i8").tobytes(),
            np.asarray(token_ids, dtype="<i8").tobytes(),
        )
        for field in fields:
            sha.update(len(field).to_bytes(8, "little"))
            sha.update(field)
        return cls(sha.hexdigest())

    def __str__(self) -> str:
        return self.digest[:12]


def chunk_name(token_ids: Sequence[int]) -> str:
    """Return a short name that tells chunks apart by their token ids, and reveals none of them."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Context:
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


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """Keys and values of one chunk.

    Attributes:
        token_ids: the chunk's tokens; a hit in a store is used only if they agree.
        position: position that the first token's key is rotated for, the length of its context.
        layers: one `[2, kv_heads, tokens, head_dim]` block per layer, keys first. A tier may give any
            sequence that loads a layer when it is indexed, so that layers stream while the model computes.
        nbytes: size of all layers together.
        context: what it looked at, if that was recorded.
    """

    token_ids: tuple[int, ...]
    position: int
    layers: Sequence[torch.Tensor]
    nbytes: int
    context: Context | None = None

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        position: int,
        layers: Sequence[torch.Tensor],
        context: Context | None = None,
    ) -> ChunkKV:
        """Build a chunk KV from layers that are in memory."""
        nbytes = sum(layer.numel() * layer.element_size() for layer in layers)
        return cls(tuple(token_ids), position, tuple(layers), nbytes, context)

    def __len__(self) -> int:
        return len(self.token_ids)
