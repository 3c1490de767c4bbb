"""A chunkcache store as a tier of LMCache: KV that an LMCache keeps, such as a vLLM server's, go into the store.

Tell LMCache of it as one more `--l2-adapter`:

    {"type": "native_plugin", "module_path": "chunkcache.store.lmcache_adapter", "class_name": "ChunkcacheConnector",
     "adapter_params": {"store": "disk:///var/cache/kv?max_bytes=200GiB&compress=zstd"}}

Every value of LMCache becomes an entry of one opaque layer, verified, within budget and evicted like any other.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, ChunkKV, Origin, hashed_label
from chunkcache.store import Store, open_store

Completion = tuple[int, bool, str, list[bool] | None]


class ChunkcacheConnector:
    """The connector that LMCache's `native_plugin` L2 adapter asks for (its documentation: "Native Connectors").

    Only `close` blocks: every batch gets a number, is worked on by a thread, and comes out of `drain_completions`
    when it is done, which the event file descriptor announces. Keys are LMCache's texts
    `model@rank@group@hash[@salt]`; of these the store gets hashes alone. The salt is the tenant, so that
    `store.purge(EntryFilter(tenant=hashed_label("tenant", salt)))` deletes what was kept under it.

    Args:
        store: URL of the store, as for `chunkcache.open_store`. LMCache writes it into its log.
        store_env: instead, name of the environment variable that holds the URL; for URLs with a password.
        threads: batches worked on at a time.

    Attributes:
        store: the store.

    Raises:
        StoreURLError: not exactly one of `store` and `store_env` is given, or there is no such store.
    """

    def __init__(self, store: str = "", store_env: str = "", threads: int = 4) -> None:
        if bool(store) == bool(store_env):
            raise StoreURLError('adapter_params takes either "store", a store URL, or "store_env"')
        if store_env and store_env not in os.environ:
            raise StoreURLError(f"the environment variable {store_env} is not set; set it to a store URL")
        self.store: Store = open_store(store or os.environ[store_env])
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="chunkcache-lmcache")
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._last = 0
        self._completed: list[Completion] = []

    def event_fd(self) -> int:
        """Return the file descriptor that can be read from when there are completions."""
        return self._fd

    def submit_batch_set(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        """Store `values`, buffers that stay as they are until this is completed, under `keys`."""
        return self._submit(lambda: [self._set(*pair) for pair in zip(keys, values, strict=True)], all_or_none=True)

    def submit_batch_get(self, keys: Sequence[str], values: Sequence[memoryview]) -> int:
        """Fill `values`, whole, with what is stored under `keys`."""
        return self._submit(lambda: [self._get(*pair) for pair in zip(keys, values, strict=True)])

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Find out which keys there are."""
        return self._submit(lambda: [_key(key) in self.store for key in keys])

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Delete what is stored under `keys`."""
        return self._submit(lambda: [self.store.delete(_key(key)) for key in keys])

    def drain_completions(self) -> list[Completion]:
        """Return number, success, error and the result for each key of every batch done since the last call."""
        with self._lock:
            completions, self._completed = self._completed, []
            if completions:
                os.eventfd_read(self._fd)
            return completions

    def close(self) -> None:
        """Finish what was submitted, and close the store."""
        self._threads.shutdown()
        self.store.close()
        os.close(self._fd)

    def _submit(self, work: Callable[[], list[bool]], all_or_none: bool = False) -> int:
        with self._lock:
            self._last += 1
            number = self._last

        def completed(future: Future[list[bool]]) -> None:
            error = future.exception()
            if error is not None:
                completion: Completion = (number, False, type(error).__name__, None)
            elif all_or_none and not all(future.result()):
                completion = (number, False, "the store refused some of it", None)
            else:
                completion = (number, True, "", future.result())
            with self._lock:
                self._completed.append(completion)
                os.eventfd_write(self._fd, 1)

        self._threads.submit(work).add_done_callback(completed)
        return number

    def _set(self, key: str, value: memoryview) -> bool:
        layer = torch.frombuffer(value.cast("B"), dtype=torch.uint8).clone()  # the buffer is LMCache's
        model, salt = key.split("@")[0], "".join(key.split("@")[4:])
        origin = Origin(hashed_label("lmcache", model), hashed_label("tenant", salt), created=time.time())
        return self.store.put(_key(key), ChunkKV.of((), 0, [layer], origin=origin))

    def _get(self, key: str, value: memoryview) -> bool:
        kv = self.store.get(_key(key), ())
        if kv is None:
            return False
        try:
            layer = kv.layers[0]
        except EntryLostError:
            return False
        view = value.cast("B")
        if not isinstance(layer, torch.Tensor) or layer.nbytes != len(view):
            return False  # LMCache now lays out this model's KV otherwise
        torch.frombuffer(view, dtype=torch.uint8).copy_(layer)
        return True


def _key(key: str) -> ChunkKey:
    return ChunkKey(hashlib.sha256(b"lmcache\0" + key.encode()).hexdigest())
