"""What every room shares: the key of a chunk, its keys and values, and its span in a prompt."""

from __future__ import annotations

from chunkcache.kv.chunk import (
    FORMAT_VERSION,
    ChunkKey,
    ChunkKV,
    ChunkRef,
    ContextAttention,
    Layer,
    LazyLayers,
    Origin,
    TokenIds,
    chunk_name,
    hashed_label,
)
from chunkcache.kv.span import Context, Span, in_a_row

__all__ = [
    "FORMAT_VERSION",
    "ChunkKV",
    "ChunkKey",
    "ChunkRef",
    "Context",
    "ContextAttention",
    "Layer",
    "LazyLayers",
    "Origin",
    "Span",
    "TokenIds",
    "chunk_name",
    "hashed_label",
    "in_a_row",
]
