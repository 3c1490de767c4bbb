"""The persistent tiers of a store, which `warm`, `export` and `import` work on."""

from __future__ import annotations

from chunkcache.errors import InputError
from chunkcache.store import MemoryStore, Store, TieredStore, open_store


def open_persistent(url: str) -> Store:
    """Open the tiers of a store that outlast this process; those in its memory are left out.

    Raises:
        InputError: all of them are in its memory.
        StoreURLError: it is no store.
    """
    opened = open_store(url)
    tiers = [tier for tier in opened.tiers().values() if not isinstance(tier, MemoryStore)]
    if not tiers:
        raise InputError(
            f"the store {url!r} is gone when this ends: pass one that lasts, such as disk:///var/cache/kv"
        )
    return tiers[0] if len(tiers) == 1 else TieredStore(tiers)
