"""Which Redis server keeps an entry: the only one, the master that Sentinels name, or a node of a Cluster.

redis-py makes the connections. Its Cluster client is not used: it asks all nodes in turn when one fails, and sleeps
between, where a request is to wait once at most.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, TryAgainError
from redis.retry import Retry
from redis.sentinel import Sentinel

from chunkcache.errors import StoreURLError
from chunkcache.store.breaker import Breaker
from chunkcache.store.redis_link import Link, linked
from chunkcache.store.url import redacted

T = TypeVar("T")
Address = tuple[str, int]
SCHEMES = ("redis", "rediss", "redis+unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
USERNAME, PASSWORD = "CHUNKCACHE_REDIS_USERNAME", "CHUNKCACHE_REDIS_PASSWORD"  # environment variables
SENTINEL_PASSWORD = "CHUNKCACHE_REDIS_SENTINEL_PASSWORD"
_FAULTS = (redis.ConnectionError, redis.TimeoutError, OSError)


class NodeError(redis.ConnectionError):
    """One node of a Cluster is in trouble; the others are not.

    Attributes:
        first: whether it was well until now.
    """

    def __init__(self, fault: Exception, first: bool) -> None:
        super().__init__(type(fault).__name__)
        self.first = first


class NotNowError(redis.ConnectionError):
    """The entry cannot be reached, and nothing was tried: its node failed a moment ago, or its slot is moving."""


class Server:
    """One server: `client` for small things, `link` for large ones."""

    def __init__(self, pool: redis.ConnectionPool, timeout: float) -> None:
        self._pool, self._timeout = pool, timeout
        self.client: Any = redis.Redis(connection_pool=pool)
        self.breaker = Breaker()

    def link(self) -> AbstractContextManager[Link]:
        """Lend a connection."""
        return linked(self._pool, self._timeout)

    def close(self) -> None:
        """Close all connections."""
        self._pool.disconnect()


class Servers(Protocol):
    """The servers of one store."""

    def run(self, name: bytes, operation: Callable[[Server], T]) -> T:
        """Return what `operation` returns on the server that keeps the value `name`."""

    def each(self, operation: Callable[[Server], T], on_fault: Callable[[Exception], None]) -> Iterator[T]:
        """Yield what `operation` returns on every server that keeps entries; `on_fault` is told of nodes left out."""

    def close(self) -> None:
        """Close all connections."""


class Single:
    """One server, or the master that Sentinels name."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def run(self, name: bytes, operation: Callable[[Server], T]) -> T:
        return operation(self._server)

    def each(self, operation: Callable[[Server], T], on_fault: Callable[[Exception], None]) -> Iterator[T]:
        yield operation(self._server)

    def close(self) -> None:
        self._server.close()


class Cluster:
    """The nodes of a Cluster, of which some may be down.

    A node that fails is left alone for a while, and so are its entries; those of the others stay in reach. After a
    failure, and where a node says that a slot has moved, another node is asked who keeps what.

    Args:
        seeds: nodes to ask first.
        connect: opens the connections to a node.
        patience: seconds to wait for another thread that is asking who keeps what.
    """

    def __init__(self, seeds: Sequence[Address], connect: Callable[[Address], Server], patience: float) -> None:
        self._connect, self._patience = connect, patience
        self._nodes = {address: connect(address) for address in seeds}
        self._slots: list[tuple[int, int, Address]] = []
        self._stale = True
        self._lock = threading.Lock()

    def run(self, name: bytes, operation: Callable[[Server], T]) -> T:
        for _ in range(2):
            try:
                return self._on(self._node(key_slot(name)), operation)
            except (AskError, TryAgainError):  # or MOVED, which is one of the first
                self._stale = True
        raise NotNowError("its slot is moving")

    def each(self, operation: Callable[[Server], T], on_fault: Callable[[Exception], None]) -> Iterator[T]:
        self._refresh()
        for address in {address for _, _, address in self._slots}:
            try:
                yield self._on(self._nodes[address], operation)
            except (NodeError, NotNowError) as fault:
                on_fault(fault)

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()

    def _on(self, node: Server, operation: Callable[[Server], T]) -> T:
        if not node.breaker.allows():
            raise NotNowError("its node failed a moment ago")
        try:
            result = operation(node)
        except (*_FAULTS, ClusterDownError) as fault:
            self._stale = True
            raise NodeError(fault, node.breaker.failed()) from fault
        node.breaker.succeeded()
        return result

    def _node(self, slot: int) -> Server:
        self._refresh()
        for first, last, address in self._slots:
            if first <= slot <= last:
                return self._nodes[address]
        self._stale = True
        raise NotNowError("no node has its slot")

    def _refresh(self) -> None:
        """Ask one node who keeps what, if that is not known."""
        if not self._stale:
            return
        if not self._lock.acquire(timeout=self._patience):
            raise NotNowError("another thread is asking who keeps what")
        try:
            if self._stale:
                self._ask()
        finally:
            self._lock.release()

    def _ask(self) -> None:
        nodes = sorted(self._nodes.items(), key=lambda item: item[1].breaker.is_open)
        found = next((item for item in nodes if item[1].breaker.allows()), None)
        if found is None:
            raise NotNowError("all nodes failed a moment ago")
        (host, _), node = found
        try:
            rows = node.client.execute_command("CLUSTER SLOTS")
        except _FAULTS:
            node.breaker.failed()
            raise
        node.breaker.succeeded()
        slots: list[tuple[int, int, Address]] = []
        for first, last, (name, port, *_), *_ in rows:
            named = name.decode() if isinstance(name, bytes) else name
            slots.append((first, last, (named or host, port)))  # a node that does not know its own name
        for _, _, address in slots:
            if address not in self._nodes:
                self._nodes = {**self._nodes, address: self._connect(address)}
        self._slots, self._stale = slots, False


@dataclass(frozen=True)
class Tls:
    """How TLS is spoken: files in PEM, '' for none, and whether the server has to prove who it is."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    verify: bool = True

    def options(self) -> dict[str, Any]:
        """Return them as redis-py calls them."""
        return {
            "ssl_ca_certs": self.ca or None,
            "ssl_certfile": self.cert or None,
            "ssl_keyfile": self.key or None,
            "ssl_cert_reqs": "required" if self.verify else "none",
            "ssl_check_hostname": self.verify,
        }


def open_servers(url: str, timeout: float, tls: Tls) -> Servers:
    """Return the servers that a URL names; nothing is connected yet.

    Args:
        url: `redis://user:password@host:port/db`, `rediss://` for TLS; `redis+unix:///path/of/socket`;
            `redis+sentinel://host:port,host:port/service/db`; `redis+cluster://host:port,host:port`; and
            `rediss+sentinel://` and `rediss+cluster://`.
        timeout: seconds to wait for a connection, and for an answer.
        tls: where the scheme starts with `rediss`.

    Raises:
        StoreURLError: it is no such URL, or a file of `tls` cannot be read.
    """
    where = _Where.of(url)
    secured = where.scheme.startswith("rediss")
    if tls != Tls() and not secured:
        raise StoreURLError(
            f"ca, cert, key and verify are for TLS; write rediss instead of redis in {redacted(url)!r}"
        )
    for path in (tls.ca, tls.cert, tls.key):
        if path and not os.access(path, os.R_OK):
            raise StoreURLError(f"{path!r} cannot be read; pass a file in PEM format")
    common: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "protocol": 2,
        "username": where.username,
        "password": where.password,
    }
    kind = where.scheme.partition("+")[2]
    if kind == "unix":
        pool = redis.ConnectionPool(
            connection_class=redis.UnixDomainSocketConnection, path=where.path, db=where.db, **common
        )
        return Single(Server(pool, timeout))
    if secured:
        common.update(tls.options())
    if kind == "sentinel":
        share = timeout / len(where.hosts)  # they are asked in turn
        asking = {
            **common,
            "socket_timeout": share,
            "socket_connect_timeout": share,
            "username": None,
            "password": os.environ.get(SENTINEL_PASSWORD) or None,
        }
        new_sentinel: Any = Sentinel  # it has no annotations
        sentinel = new_sentinel(where.hosts, sentinel_kwargs=_client_options(asking, secured))
        master = sentinel.master_for(where.path, db=where.db, **_client_options(common, secured))
        return Single(Server(master.connection_pool, timeout))

    def connect(address: Address) -> Server:
        host, port = address
        connection = redis.SSLConnection if secured else redis.Connection
        pool = redis.ConnectionPool(connection_class=connection, host=host, port=port, db=where.db, **common)
        return Server(pool, timeout)

    if kind == "cluster":
        return Cluster(where.hosts, connect, timeout)
    return Single(connect(where.hosts[0]))


def _client_options(options: dict[str, Any], secured: bool) -> dict[str, Any]:
    return {**options, "ssl": True} if secured else options


@dataclass(frozen=True, repr=False)
class _Where:
    """What a URL says, and the environment where it is silent."""

    scheme: str
    username: str | None
    password: str | None
    hosts: tuple[Address, ...] = ()
    path: str = ""  # of a socket; of Sentinels, the name of the service
    db: int = 0

    @classmethod
    def of(cls, url: str) -> _Where:
        parts = urlsplit(url)
        scheme, kind = parts.scheme, parts.scheme.partition("+")[2]
        example = {
            "unix": f"{scheme}:///run/valkey/valkey.sock",
            "sentinel": f"{scheme}://host:26379,host:26379/service",
            "cluster": f"{scheme}://host:6379,host:6379",
        }.get(kind, f"{scheme}://host:6379/0")
        wrong = StoreURLError(f"{redacted(url)!r} names no server; write for example {example}")
        credentials, _, netloc = parts.netloc.rpartition("@")
        username, _, password = credentials.partition(":")
        found = cls(
            scheme,
            unquote(username) or os.environ.get(USERNAME) or None,
            unquote(password) or os.environ.get(PASSWORD) or None,
        )
        if scheme not in SCHEMES or parts.query or parts.fragment:
            raise wrong
        if kind == "unix":
            if netloc or len(parts.path) < 2:
                raise wrong
            return replace(found, path=unquote(parts.path))
        hosts = tuple(_host(text, 26379 if kind == "sentinel" else 6379, wrong) for text in netloc.split(","))
        path = parts.path.strip("/").split("/")
        service = unquote(path.pop(0)) if kind == "sentinel" else ""
        db = path.pop(0) if path else ""
        several = kind in ("sentinel", "cluster")
        if path or not re.fullmatch(r"[0-9]{0,5}", db) or (kind == "cluster" and db):
            raise wrong
        if (kind == "sentinel" and not service) or (len(hosts) > 1 and not several):
            raise wrong
        return replace(found, hosts=hosts, path=service, db=int(db or 0))


def _host(text: str, port: int, wrong: StoreURLError) -> Address:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/@]+))?(?::([0-9]{1,5}))?", text)
    if match is None or int(match[3] or port) > 65535:
        raise wrong
    return match[1] or match[2] or "localhost", int(match[3] or port)
