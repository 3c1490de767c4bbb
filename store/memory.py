"""The tiers in this process's memory: RAM, and an accelerator's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Layer
from chunkcache.store.base import Entry, EntryFilter, StoreStats, Tier
from chunkcache.store.ledger import Ledger


class MemoryStore(Tier):
    """Chunk KV in RAM within a byte budget; page-locked where there is a CUDA device to copy them to.

    An entry that a request is reading stays alive until the request lets go of it, also when it is evicted.

    Args:
        max_bytes: byte budget; None keeps everything.
        evict: who goes first, `lru`, `lfu` or `cost`; see `Ledger`.
        admit: who is let in, `frequent` or `all`; see `Ledger`.
        tenant_bytes: byte quota of each tenant; None for none.
        codec: `raw`, `bf16`, `fp16`, `int8` or `int4`; see `chunkcache.store.codec`.
        ttl: seconds that an entry is kept after it was computed; None for ever.

    Attributes:
        on_evict: called with key and KV of an entry that had to go for room.

    Raises:
        StoreURLError: a value is none of these.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        evict: str = "lru",
        admit: str = "all",
        tenant_bytes: int | None = None,
        codec: str = "raw",
        ttl: float | None = None,
    ) -> None:
        super().__init__(max_bytes, codec, ttl)
        self.on_evict: Callable[[ChunkKey, ChunkKV], None] | None = None
        self._ledger = Ledger(max_bytes, evict, admit, tenant_bytes)
        self._lock = threading.RLock()
        self._held: dict[ChunkKey, tuple[ChunkKV, float | None]] = {}

    def credit(self, key: ChunkKey, worth: float) -> None:
        self._ledger.credit(key, worth)

    def pin(self, key: ChunkKey, pinned: bool = True) -> None:
        self._ledger.pin(key, pinned)

    def stats(self) -> StoreStats:
        entries, nbytes = self._ledger.totals()
        with self._stats_lock:
            return replace(self._stats, entries=entries, nbytes=nbytes)

    def __contains__(self, key: ChunkKey) -> bool:
        _, expires = self._held.get(key, (None, 0.0))
        return expires is None or expires > time.time()

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        kv, expires = self._held.get(key, (None, None))
        if kv is None:
            return None
        if expires is not None and expires < time.time():
            self.count(expired=1)
            self._remove(key)
            return None
        return kv

    def _note(self, key: ChunkKey, hit: bool) -> None:
        self._ledger.asked(key)
        if hit:
            self._ledger.use(key)

    def _write(self, key: ChunkKey, kv: ChunkKV) -> bool:
        kept = self._codec(kv)
        kept = kept.of_layers(tuple(map(self._placed, kept.layers)))
        expires = self._expiry(kv)
        entry = Entry.of(key, kept, expires)
        if not self.fits(entry.nbytes):
            return False
        gone: list[tuple[ChunkKey, ChunkKV]] = []
        with self._lock:
            for old in self._ledger.expired(time.time()):
                self.count(expired=self._remove(old))
            victims = self._ledger.victims(entry)
            if victims is None:
                return False
            for victim in victims:
                gone.append((victim, self._held[victim][0]))
                self._remove(victim)
            self._held[key] = (kept, expires)
            self._ledger.add(entry)
        self.count(evictions=len(gone))
        if self.on_evict is not None:
            for victim, evicted in gone:
                self.on_evict(victim, evicted)
        return True

    def _remove(self, key: ChunkKey) -> bool:
        with self._lock:
            self._ledger.drop(key)
            return self._held.pop(key, None) is not None

    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        return self._ledger.entries(where)

    def _placed(self, layer: Layer) -> Layer:
        layer = layer.to("cpu")
        return layer.pin_memory() if torch.cuda.is_available() else layer


class DeviceStore(MemoryStore):
    """Chunk KV in the memory of an accelerator, where nothing is left to load.

    It has run on the CPU only; on CUDA and MPS it is untested.

    Args:
        device: `cuda`, `cuda:1`, `mps`; '' for whichever there is. `cpu` is allowed, for tests.

    The others are those of `MemoryStore`.

    Raises:
        StoreURLError: there is no such device, or none at all.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        evict: str = "lru",
        admit: str = "all",
        tenant_bytes: int | None = None,
        codec: str = "raw",
        ttl: float | None = None,
        device: str = "",
    ) -> None:
        super().__init__(max_bytes, evict, admit, tenant_bytes, codec, ttl)
        if not device and torch.accelerator.is_available():
            device = str(torch.accelerator.current_accelerator())
        try:
            self._device = torch.empty(0, device=device or "meta").device
        except (RuntimeError, AssertionError) as error:
            raise StoreURLError(f"device={device!r} cannot be used ({error}); leave the device tier out") from None
        if self._device.type == "meta":
            raise StoreURLError("this machine has no accelerator for device://; leave the device tier out")

    def _placed(self, layer: Layer) -> Layer:
        return layer.to(self._device, non_blocking=True)
