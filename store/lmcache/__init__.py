"""The LMCache tier: chunk KV in LMCache's storage manager. Imported when `lmcache://` is opened."""

from __future__ import annotations

from chunkcache.store.lmcache.tier import LMCacheStore

__all__ = ["LMCacheStore"]
