"""The tiers in this process's memory: RAM, and an accelerator's."""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.kv import device as devices
from chunkcache.kv.transfer import join, made, pin, place_of, to_device, to_host
from chunkcache.store.arena import Arena
from chunkcache.store.behind import WriteBehind
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.budgeted import BudgetedTier
from chunkcache.store.lru import LRULedger
from chunkcache.store.records import Entry, has_expired

if TYPE_CHECKING:
    from chunkcache.store.ledger import Ledger

_Held = tuple[ChunkKV, float | None]  # with the time when it expires
PUT_OFF_BYTES = 2**30  # KV that wait on an accelerator for `catch_up`; with more the tier does not wait for it


class MemoryStore(BudgetedTier):
    """Chunk KV in RAM within a budget.

    KV of a CUDA device go into page-locked memory. They stay on the device until `catch_up`, and are copied then in a
    thread; who asks for them meanwhile gets them there. Where no more memory can be locked they go into other memory,
    counted as `unpinned`. KV of the CPU are kept as they are.

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
        self._held: dict[ChunkKey, _Held] = {}
        self._evicted: list[tuple[ChunkKey, ChunkKV]] = []  # by the `_write` that holds the lock
        self._put_off: dict[ChunkKey, Entry] = {}  # what is held on a device still
        self._homing = threading.Lock()
        self._lossless = codec == "raw"
        self._arena: Arena | None = None
        self._copies = WriteBehind(1, 0)
        self._finalizer = weakref.finalize(self, self._copies.close)  # also when the process ends

    def __contains__(self, key: ChunkKey) -> bool:
        held = self._held.get(key)
        return held is not None and not has_expired(held[1])

    def catch_up(self) -> None:
        if self._put_off:
            self._copies.put(self._bring_home, wait=False)  # if there is no place, one is waiting already

    def flush(self) -> None:
        self._copies.flush()
        self._bring_home()

    def close(self) -> None:
        with self._lock:
            self._put_off.clear()
        self._finalizer()

    def copy_of(self, key: ChunkKey) -> ChunkKV | None:
        """Return the KV under `key` where this tier keeps them, just as they were put; None if there are no such."""
        self._bring_home()
        return self.peek(key) if self._lossless else None

    def _read(self, key: ChunkKey) -> ChunkKV | None:
        kv, expires = self._held.get(key, (None, None))
        if has_expired(expires):
            self.count(expired=1)
            self._remove(key)
            return None
        return None if kv is None else join(kv)

    def _write(self, entry: Entry, kv: ChunkKV) -> bool:
        kept = self._placed(kv)
        entry = replace(entry, nbytes=kept.nbytes)
        if not self.fits(entry.nbytes):
            return False
        with self._lock:
            admitted = self._make_room(entry)
            if admitted:
                self._held[entry.key] = (kept, entry.expires)
                self._ledger.add(entry)
                self._note_put_off(entry, kept)
            evicted, self._evicted = self._evicted, []
        if self.on_evict is not None:
            for key, old in evicted:
                self.on_evict(key, old)
        if sum(waiting.nbytes for waiting in list(self._put_off.values())) > PUT_OFF_BYTES:
            self.catch_up()
        return admitted

    def _evict(self, key: ChunkKey) -> bool:
        self._evicted.append((key, self._held[key][0]))
        return super()._evict(key)

    def _remove(self, key: ChunkKey) -> bool:
        with self._lock:
            self._ledger.drop(key)
            self._put_off.pop(key, None)
            return self._held.pop(key, None) is not None

    def _placed(self, kv: ChunkKV) -> ChunkKV:
        """Return KV as they are held at first: those of a device with streams as they are."""
        if kv.ready:
            return kv
        kept = self._codec(kv)
        return kept.of_layers(tuple(layer.to("cpu") for layer in kept.layers))

    def _note_put_off(self, entry: Entry, kept: ChunkKV) -> None:
        self._put_off.pop(entry.key, None)
        if kept.ready:
            self._put_off[entry.key] = entry

    def _bring_home(self) -> None:
        """Copy what is put off into the host's memory; what another thread is copying is waited for."""
        with self._homing:
            while True:
                with self._lock:
                    if not self._put_off:
                        return
                    key = next(iter(self._put_off))
                    entry, held = self._put_off.pop(key), self._held[key]
                kept = self._pinned(held[0])
                with self._lock:
                    if self._held.get(key) is held:  # it was neither removed nor replaced meanwhile
                        self._held[key] = (kept, held[1])
                        if kept.nbytes != entry.nbytes:
                            self._ledger.add(replace(entry, nbytes=kept.nbytes))

    def _coded(self, kv: ChunkKV) -> ChunkKV:
        """Return KV of a device as they are to be kept, and when they are made."""
        coded = self._codec(join(kv))
        return coded if coded is kv else replace(coded, ready=made(coded.layers))

    def _pinned(self, kv: ChunkKV) -> ChunkKV:
        coded = self._coded(kv)
        if self._arena is None:
            self._arena = Arena(self.budget.max_bytes or max(devices.free_ram() // 2, 1))
        pinned = pin(coded, self._arena.take)
        if pinned is None:
            self.count(unpinned=1)
            self.warn_once("no more memory can be page-locked: some chunk KV load more slowly; lower max_bytes")
        return to_host(coded) if pinned is None else pinned


class DeviceStore(MemoryStore):
    """Chunk KV in the memory of an accelerator, where nothing is left to load.

    It has run on the CPU and on a pretend device only; on CUDA and MPS it is untested.

    Args:
        budget: as in `MemoryStore`.
        codec: as in `MemoryStore`.
        device: `cuda`, `cuda:1`, `mps`; '' for the one of this machine, and where there are several like it, for
            that which the KV come from. `cpu` is allowed, for tests.

    Raises:
        StoreURLError: there is no such device.
    """

    def __init__(self, budget: Budget = UNBOUNDED, codec: str = "raw", device: str = "") -> None:
        super().__init__(budget, codec)
        self._anywhere = not device
        device = device or str(devices.accelerator() or "meta")
        try:
            self._device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise StoreURLError(f"device={device!r} cannot be used ({error}); leave the device tier out") from None
        if self._device.type == "meta":
            raise StoreURLError("this machine has no accelerator for device://; leave the device tier out")

    def _placed(self, kv: ChunkKV) -> ChunkKV:
        coded = self._coded(kv)
        there = isinstance(coded.layers, tuple) and all(self._is_there(place_of(layer)) for layer in coded.layers)
        return coded if there else to_device(coded, lambda _: self._device)

    def _is_there(self, place: torch.device) -> bool:
        return place == self._device or (self._anywhere and place.type == self._device.type)

    def _note_put_off(self, entry: Entry, kept: ChunkKV) -> None:
        """Nothing is: these KV are where they belong."""


def _ledger_of(budget: Budget) -> Ledger | LRULedger:
    if budget.evict == "lru" and budget.admit == "all":
        return LRULedger(budget)
    from chunkcache.store.ledger import Ledger  # not on the road of those who need only the order

    return Ledger(budget)
