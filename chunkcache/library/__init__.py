"""Token ids to chunk KV: out of the store, or computed by the model and then stored."""

from __future__ import annotations

from chunkcache.library.library import ChunkLibrary, Progress

__all__ = ["ChunkLibrary", "Progress"]
