"""The tiers in this process's memory: RAM, and an accelerator's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Layer
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.budgeted import BudgetedTier
from chunkcache.store.lru import LRULedger
from chunkcache.store.records import Entry, has_expired

if TYPE_CHECKING:
    from chunkcache.store.ledger import Ledger


class MemoryStore(BudgetedTier):
    """Chunk KV in RAM within a budget; page-locked where there is a CUDA device to copy them to.

    An entry that a request is reading stays alive until the request lets go of it, also when it is evicted.

    Args:
        budget: what is kept.
        codec: `raw`, `bf16`, `fp16`, `int8` or `int4`; see `chunkcache.store.codec`.

    Attributes:
        on_evict: called with key and KV of an entry that was evicted.

    Raises:
        StoreURLError: there is no such codec.
    """

    def __init__(self, budget: Budget = UNBOUNDED, codec: str = "raw") -> None:
        super().__init__(budget, codec)
        self.on_evict: Callable[[ChunkKey, ChunkKV], None] | None = None
        self._ledger = _ledger_of(budget)
        self._lock = threading.RLock()
        self._held: dict[ChunkKey, tuple[ChunkKV, float | None]] = {}  # with the time when it expires
        self._evicted: list[tuple[ChunkKey, ChunkKV]] = []  # by the `_write` that holds the lock

    def __contains__(self, key: ChunkKey) -> bool:
        held = self._held.get(key)
        return held is not None and not has_expired(held[1])

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        kv, expires = self._held.get(key, (None, None))
        if has_expired(expires):
            self.count(expired=1)
            self._remove(key)
            return None
        return kv

    def _write(self, entry: Entry, kv: ChunkKV) -> bool:
        kept = self._codec(kv)
        kept = kept.of_layers(tuple(map(self._placed, kept.layers)))
        entry = replace(entry, nbytes=kept.nbytes)
        if not self.fits(entry.nbytes):
            return False
        with self._lock:
            admitted = self._make_room(entry)
            if admitted:
                self._held[entry.key] = (kept, entry.expires)
                self._ledger.add(entry)
            evicted, self._evicted = self._evicted, []
        if self.on_evict is not None:
            for key, old in evicted:
                self.on_evict(key, old)
        return admitted

    def _evict(self, key: ChunkKey) -> bool:
        self._evicted.append((key, self._held[key][0]))
        return super()._evict(key)

    def _remove(self, key: ChunkKey) -> bool:
        with self._lock:
            self._ledger.drop(key)
            return self._held.pop(key, None) is not None

    def _placed(self, layer: Layer) -> Layer:
        layer = layer.to("cpu")
        return layer.pin_memory() if torch.cuda.is_available() else layer


class DeviceStore(MemoryStore):
    """Chunk KV in the memory of an accelerator, where nothing is left to load.

    It has run on the CPU only; on CUDA and MPS it is untested.

    Args:
        budget: as in `MemoryStore`.
        codec: as in `MemoryStore`.
        device: `cuda`, `cuda:1`, `mps`; '' for the one of this machine. `cpu` is allowed, for tests.

    Raises:
        StoreURLError: there is no such device.
    """

    def __init__(self, budget: Budget = UNBOUNDED, codec: str = "raw", device: str = "") -> None:
        super().__init__(budget, codec)
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


def _ledger_of(budget: Budget) -> Ledger | LRULedger:
    if budget.evict == "lru" and budget.admit == "all":
        return LRULedger(budget)
    from chunkcache.store.ledger import Ledger  # not on the road of those who need only the order

    return Ledger(budget)
