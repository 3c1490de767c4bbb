"""The memory tier: chunk KV in this process's RAM, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.store.base import Store


class MemoryStore(Store):
    """Chunk KV in RAM within a byte budget, LRU eviction.

    An entry that a request is reading stays alive until the request lets go of it, also when it is evicted.

    Args:
        max_bytes: byte budget; None keeps everything.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        super().__init__(max_bytes)
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
                _, evicted = self._entries.popitem(last=False)
                self._held -= evicted.nbytes
                self._stats.evictions += 1
        layers = [layer.to("cpu") for layer in kv.layers]
        self._entries[key] = ChunkKV(kv.token_ids, kv.position, layers, kv.nbytes)
        self._held += kv.nbytes

    def _remove(self, key: ChunkKey) -> bool:
        kv = self._entries.pop(key, None)
        if kv is None:
            return False
        self._held -= kv.nbytes
        return True

    def _keys(self) -> Collection[ChunkKey]:
        return self._entries.keys()

    def _bytes(self) -> int:
        return self._held
