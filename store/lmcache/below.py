"""The L2 of LMCache, a folder or server below its RAM: answers to questions that LMCache itself cannot answer."""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey
from chunkcache.store.url import redacted

MODEL = "chunkcache"  # what LMCache is told the model is; it becomes a part of its file names and Redis keys
START = 16 * 1024  # bytes of the first object of an entry
FAULTS = (OSError, redis.RedisError)


class Below(Protocol):
    """A folder or server that LMCache writes to; methods raise one of `FAULTS` if it is missing or broken.

    Attributes:
        config: its configuration for LMCache.
        connects: whether LMCache has connections to it, which may break.
    """

    config: dict[str, Any]
    connects: bool

    def check(self) -> None:
        """Raise a fault if it is down."""

    def has(self, key: ChunkKey) -> bool:
        """Return whether the first object of an entry is there."""

    def keys(self) -> Iterator[ChunkKey]:
        """Yield the keys of all entries whose first object is there."""

    def sweep(self, key: ChunkKey) -> None:
        """Delete every object of an entry; slow, and for an entry whose header does not say which there are."""


def find_below(url: str, timeout: float) -> Below | None:
    """Return what `url` names, None if it is RAM alone; a server may take `timeout` seconds to answer.

    Raises:
        StoreURLError: it is no address of LMCache.
    """
    parts = urlsplit(url)
    if parts.scheme != "lmcache" or parts.query or parts.fragment:
        raise StoreURLError(f"{redacted(url)!r} is no address of LMCache; write for example lmcache:///var/cache/kv")
    if not parts.netloc:
        return Folder(Path(unquote(parts.path))) if parts.path else None
    try:
        host, port = parts.hostname, parts.port or 6379
    except ValueError as error:
        raise StoreURLError(
            f"{redacted(url)!r} is no address ({error}); write for example lmcache://host:6379"
        ) from None
    if not host or parts.path not in ("", "/"):
        raise StoreURLError(f"{redacted(url)!r} is no server; write for example lmcache://host:6379")
    return Server(host, port, unquote(parts.username or ""), unquote(parts.password or ""), timeout)


class Folder:
    """Files, written by LMCache's `fs_native` adapter."""

    connects = False
    _AFFIXES = f"{MODEL}@{START:#010x}@0@", ".data"  # of the names that LMCache gives to first objects

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config: dict[str, Any] = {"type": "fs_native", "base_path": str(path)}

    def check(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def has(self, key: ChunkKey) -> bool:
        return (self._path / key.digest.join(self._AFFIXES)).exists()

    def keys(self) -> Iterator[ChunkKey]:
        prefix, suffix = self._AFFIXES
        for path in self._path.glob(f"{prefix}*{suffix}"):
            yield ChunkKey(path.name.removeprefix(prefix).removesuffix(suffix))

    def sweep(self, key: ChunkKey) -> None:
        for path in self._path.glob(f"{MODEL}@*@{key.digest}*"):
            path.unlink(missing_ok=True)


class Server:
    """A Redis or Valkey server, written to by LMCache's `resp` adapter; asked over a connection of our own."""

    connects = True
    _PREFIX = f"{MODEL}@{START:08x}@0@"  # of the names that LMCache gives to first objects

    def __init__(self, host: str, port: int, user: str, password: str, timeout: float) -> None:
        user = user or os.environ.get("LMCACHE_RESP_USERNAME", "")
        password = password or os.environ.get("LMCACHE_RESP_PASSWORD", "")
        self.config: dict[str, Any] = {"type": "resp", "host": host, "port": port}
        self.config |= {"username": user, "password": password}
        self._client = redis.Redis(
            host,
            port,
            username=user or None,
            password=password or None,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )

    def check(self) -> None:
        self._client.ping()

    def has(self, key: ChunkKey) -> bool:
        return bool(self._client.exists(self._PREFIX + key.digest))

    def keys(self) -> Iterator[ChunkKey]:
        for name in self._client.scan_iter(match=f"{self._PREFIX}*", count=1000):
            yield ChunkKey(name.decode().removeprefix(self._PREFIX))

    def sweep(self, key: ChunkKey) -> None:
        for name in self._client.scan_iter(match=f"{MODEL}@*@{key.digest}*", count=1000):
            self._client.unlink(name)


class Unsaved:
    """Objects that LMCache has yet to write below; it calls the `on_l2_` methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: dict[Any, float] = {}

    def __len__(self) -> int:
        return len(self._since)

    def add(self, names: Iterable[Any]) -> None:
        """Record that they are to be written from now on."""
        with self._lock:
            self._since.update(dict.fromkeys(names, time.monotonic()))

    def drop(self, names: Iterable[Any]) -> None:
        """Forget them: they are written, or deleted."""
        with self._lock:
            for name in names:
                self._since.pop(name, None)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._since.clear()

    def age(self) -> float:
        """Return for how many seconds the oldest has been waiting."""
        with self._lock:
            return time.monotonic() - next(iter(self._since.values()), time.monotonic())

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.drop(keys)

    def on_l2_keys_accessed(self, keys: list[Any]) -> None: ...

    def on_l2_keys_deleted(self, keys: list[Any]) -> None: ...
