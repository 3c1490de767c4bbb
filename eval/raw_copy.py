"""Plain copies of bytes over a tier's medium, with nothing else done to them: the floor of `eval.stores`."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

import redis
import torch

from chunkcache.store import DiskStore, RedisStore, Store
from chunkcache.store.redis_link import linked

_NAME = b"chunkcache-bench"
_TIMEOUT_S = 10.0


def raw_copy(url: str, store: Store, data: torch.Tensor) -> tuple[float, float]:
    """Return the seconds to write and to read `data` (bytes) over the medium of the last tier of `store`."""
    last = list(store.tiers().values())[-1]
    if isinstance(last, DiskStore):
        return _file(last.folder, data)
    if isinstance(last, RedisStore):
        return _redis(url.rpartition("|")[2], data)
    started = time.perf_counter()
    copied = data.clone()
    middle = time.perf_counter()
    copied.clone()
    return middle - started, time.perf_counter() - middle


def _file(folder: Path, data: torch.Tensor) -> tuple[float, float]:
    view = data.numpy().data
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        file.write(view)
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        file.seek(0)
        started = time.perf_counter()
        file.readinto(torch.empty_like(data).numpy().data)
        return written, time.perf_counter() - started


def _redis(url: str, data: torch.Tensor) -> tuple[float, float]:
    """SET and GET one value over a connection of its own."""
    pool = redis.ConnectionPool.from_url(url.partition("?")[0], protocol=2)
    with closing(pool), linked(pool, _TIMEOUT_S) as link:
        started = time.perf_counter()
        link.send([(b"SET", _NAME, data.numpy().data)])
        link.done()
        written = time.perf_counter() - started
        started = time.perf_counter()
        link.send([(b"GET", _NAME)])
        link.value(data.nbytes, data.nbytes)
        read = time.perf_counter() - started
        link.send([(b"DEL", _NAME)])
        link.done()
    return written, read
