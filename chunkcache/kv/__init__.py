"""The nouns that every room shares: a chunk's key, and its keys and values."""

from __future__ import annotations

from chunkcache.kv.chunk import (
    FORMAT_VERSION,
    ChunkKey,
    ChunkKV,
    ContextAttention,
    Layer,
    LazyLayers,
    Origin,
    chunk_name,
    hashed_label,
)

__all__ = [
    "FORMAT_VERSION",
    "ChunkKV",
    "ChunkKey",
    "ContextAttention",
    "Layer",
    "LazyLayers",
    "Origin",
    "chunk_name",
    "hashed_label",
]
