"""The store room: keeps chunk KV between requests, in memory, on disk and on servers.

A tier is one file here, a subclass of `Tier`, and one line in `TIERS`. What needs a server is imported when it is
first opened or named.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

from chunkcache.store.base import Store, Tier
from chunkcache.store.budget import Budget, parse_bytes
from chunkcache.store.bytestore import ByteStore, Encoding
from chunkcache.store.defaults import default_store
from chunkcache.store.disk import DiskStore
from chunkcache.store.memory import DeviceStore, MemoryStore
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter, StoreStats
from chunkcache.store.redis_url import SCHEMES as REDIS_SCHEMES
from chunkcache.store.tiered import TieredStore
from chunkcache.store.url import open_store as _open_store

if TYPE_CHECKING:
    from chunkcache.store.lmcache import LMCacheStore
    from chunkcache.store.redis import RedisStore

_LATER = {"LMCacheStore": "chunkcache.store.lmcache:LMCacheStore", "RedisStore": "chunkcache.store.redis:RedisStore"}
TIERS = {  # where the class of each URL scheme is
    "device": "chunkcache.store.memory:DeviceStore",
    "memory": "chunkcache.store.memory:MemoryStore",
    "disk": "chunkcache.store.disk:DiskStore",
    **dict.fromkeys(REDIS_SCHEMES, _LATER["RedisStore"]),
    "lmcache": _LATER["LMCacheStore"],
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


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return pkgutil.resolve_name(_LATER[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "EVERYTHING",
    "TIERS",
    "Budget",
    "ByteStore",
    "DeviceStore",
    "DiskStore",
    "Encoding",
    "Entry",
    "EntryFilter",
    "LMCacheStore",
    "MemoryStore",
    "RedisStore",
    "Store",
    "StoreStats",
    "Tier",
    "TieredStore",
    "default_store",
    "open_store",
    "parse_bytes",
]
