"""The memory tier: chunk KV in this process's RAM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.store.base import Store


class MemoryStore(Store):
    """Chunk KV in RAM within a byte budget.

    An entry that a request is reading stays alive until the request lets go of it, also when it is evicted.

    Args:
        max_bytes: byte budget; None keeps everything.
        evict: `lru`, the least recently used goes first; or `worth`, the one with the least credit (`credit`), and
            the least recently used of equals.

    Raises:
        StoreURLError: `evict` is neither.
    """

    def __init__(self, max_bytes: int | None = None, evict: str = "lru") -> None:
        super().__init__(max_bytes)
        if evict not in ("lru", "worth"):
            raise StoreURLError(f"evict={evict!r} is neither 'lru' nor 'worth'")
        self._by_worth = evict == "worth"
        self._entries: OrderedDict[ChunkKey, ChunkKV] = OrderedDict()
        self._held = 0

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        kv = self._entries.get(key)
        if kv is not None:
            self._entries.move_to_end(key)
        return kv

    def _write(self, key: ChunkKey, kv: ChunkKV) -> None:
        self._remove(key)
        if self._stats.max_bytes is not None:
            while self._held + kv.nbytes > self._stats.max_bytes:
                self._remove(self._first_out())
                self._stats.evictions += 1
        layers = [layer.to("cpu") for layer in kv.layers]
        self._entries[key] = replace(kv, layers=layers)
        self._held += kv.nbytes

    def _remove(self, key: ChunkKey) -> bool:
        kv = self._entries.pop(key, None)
        if kv is None:
            return False
        self._held -= kv.nbytes
        self._worth.pop(key, None)
        return True

    def _first_out(self) -> ChunkKey:
        if self._by_worth:
            return min(self._entries, key=lambda key: self._worth.get(key, 0.0))
        return next(iter(self._entries))

    def _keys(self) -> Collection[ChunkKey]:
        return self._entries.keys()

    def _bytes(self) -> int:
        return self._held
