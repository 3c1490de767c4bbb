"""The store room: where chunk KV live between requests.

A tier is one file here, a subclass of `Store`, and one line in `TIERS`.
"""

from __future__ import annotations

from chunkcache.store.base import Store, StoreStats
from chunkcache.store.memory import MemoryStore
from chunkcache.store.url import open_store as _open_store
from chunkcache.store.url import parse_bytes

TIERS: dict[str, type[Store]] = {"memory": MemoryStore}


def open_store(url: str) -> Store:
    """Open the store that a URL such as `memory://?max_bytes=2GiB` describes.

    Raises:
        StoreURLError: the scheme or an option is unknown, or a value is out of range.
    """
    return _open_store(url, TIERS)


__all__ = ["TIERS", "MemoryStore", "Store", "StoreStats", "open_store", "parse_bytes"]
