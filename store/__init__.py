"""The store room: where chunk KV live between requests.

A tier is one file here, a subclass of `Tier`, and one line in `TIERS`.
"""

from __future__ import annotations

from chunkcache.store.base import EVERYTHING, Entry, EntryFilter, Store, StoreStats, Tier
from chunkcache.store.bytestore import ByteStore
from chunkcache.store.disk import DiskStore
from chunkcache.store.lmcache import LMCacheStore
from chunkcache.store.memory import DeviceStore, MemoryStore
from chunkcache.store.redis import RedisStore
from chunkcache.store.redis_servers import SCHEMES as REDIS_SCHEMES
from chunkcache.store.tiered import TieredStore
from chunkcache.store.url import Opener, parse_bytes
from chunkcache.store.url import open_store as _open_store

TIERS: dict[str, Opener] = {
    "device": DeviceStore,
    "memory": MemoryStore,
    "disk": DiskStore,
    **dict.fromkeys(REDIS_SCHEMES, RedisStore),
    "lmcache": LMCacheStore,
}


def open_store(text: str) -> Store:
    """Open the store that a text describes.

    Args:
        text: a URL such as `memory://?max_bytes=2GiB` or `disk:///var/cache/kv`; several tiers, nearest first, as in
            `tiered:memory://?max_bytes=2GiB|disk:///var/cache/kv`; or the path of a TOML file that describes one.

    Raises:
        StoreURLError: the scheme or an option is unknown, or a value is out of range.
    """
    return _open_store(text, TIERS, TieredStore)


__all__ = [
    "EVERYTHING",
    "TIERS",
    "ByteStore",
    "DeviceStore",
    "DiskStore",
    "Entry",
    "EntryFilter",
    "LMCacheStore",
    "MemoryStore",
    "RedisStore",
    "Store",
    "StoreStats",
    "Tier",
    "TieredStore",
    "open_store",
    "parse_bytes",
]
