"""The Redis servers of a store, over redis-py: one, the master that Sentinels name, or the nodes of a Cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from chunkcache.errors import StoreURLError
from chunkcache.store.breaker import Breaker
from chunkcache.store.redis_limit import ValueLimit
from chunkcache.store.redis_link import Link, linked
from chunkcache.store.redis_url import Address, RedisAddress
from chunkcache.store.url import redacted

T = TypeVar("T")
SENTINEL_PASSWORD = "CHUNKCACHE_REDIS_SENTINEL_PASSWORD"  # environment variable


class NodeError(redis.ConnectionError):
    """One node of a Cluster is in trouble; `first` says whether it was well until now."""

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
        self.limit = ValueLimit()

    def link(self) -> AbstractContextManager[Link]:
        """Lend a connection."""
        return linked(self._pool, self._timeout)

    def within_limit(self, nbytes: int, send: Callable[[Server], None]) -> bool:
        """Call `send`, once more if need be, unless the server takes no values of `nbytes`, its largest.

        Returns:
            False if the server does not take it.
        """
        for again in (False, True):
            if not self.limit.allows(nbytes):
                return False
            try:
                send(self)
            except (redis.RedisError, OSError) as fault:
                self.limit.blame(fault, nbytes, self.client, again)
            else:
                return True
        return False

    def close(self) -> None:
        """Close all connections."""
        self._pool.disconnect()


class Servers:
    """The servers of one store; here a single one, or the master that Sentinels name."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def run(self, name: bytes, operation: Callable[[Server], T]) -> T:
        """Return what `operation` returns on the server that keeps the value `name`."""
        return operation(self._server)

    def each(self, operation: Callable[[Server], T], on_fault: Callable[[Exception], None]) -> Iterator[T]:
        """Yield what `operation` returns on every server that keeps entries; call `on_fault` for nodes left out."""
        yield operation(self._server)

    def close(self) -> None:
        """Close all connections."""
        self._server.close()


@dataclass(frozen=True)
class Tls:
    """How TLS is spoken.

    Attributes:
        ca: file with the certificates that the server's is checked against, in PEM; '' for those of the system.
        cert: file with the client's certificate.
        key: file with its private key.
        verify: `yes`, or `no`, where anybody can pretend to be the server.

    Raises:
        StoreURLError: a file cannot be read, or `verify` is neither.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    verify: str = "yes"

    def __post_init__(self) -> None:
        if self.verify not in ("yes", "no"):
            raise StoreURLError(f"verify={self.verify!r} is neither 'yes' nor 'no'")
        for path in (self.ca, self.cert, self.key):
            if path and not os.access(path, os.R_OK):
                raise StoreURLError(f"{path!r} cannot be read; pass a file in PEM format")

    def options(self) -> dict[str, Any]:
        """Return the options as redis-py names them."""
        return {
            "ssl_ca_certs": self.ca or None,
            "ssl_certfile": self.cert or None,
            "ssl_keyfile": self.key or None,
            "ssl_cert_reqs": "required" if self.verify == "yes" else "none",
            "ssl_check_hostname": self.verify == "yes",
        }


NO_TLS = Tls()


def open_servers(url: str, timeout: float, tls: Tls) -> Servers:
    """Return the servers that a URL names; nothing is connected yet.

    Args:
        url: `redis://user:password@host:port/db`, `rediss://` for TLS; `redis+unix:///path/of/socket`;
            `redis+sentinel://host:port,host:port/service/db`; `redis+cluster://host:port,host:port`; and
            `rediss+sentinel://` and `rediss+cluster://`.
        timeout: seconds to wait for a connection, and for an answer.
        tls: where the scheme starts with `rediss`.

    Raises:
        StoreURLError: it is no such URL.
    """
    address = RedisAddress.of(url)
    if tls != NO_TLS and not address.secured:
        raise StoreURLError(
            f"ca, cert, key and verify are for TLS; write rediss instead of redis in {redacted(url)!r}"
        )
    common: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "health_check_interval": 0,
        "protocol": 2,
        "username": address.username,
        "password": address.password,
        **(tls.options() if address.secured else {}),
    }
    if address.kind == "sentinel":
        return Servers(Server(_sentinel_pool(address, common), timeout))

    def connect(node: Address) -> Server:
        connection = redis.SSLConnection if address.secured else redis.Connection
        host, port = node
        pool = redis.ConnectionPool(connection_class=connection, host=host, port=port, db=address.db, **common)
        return Server(pool, timeout)

    if address.kind == "cluster":
        from chunkcache.store.redis_cluster import Cluster

        return Cluster(address.hosts, connect, timeout)
    if address.kind == "unix":
        unix = redis.UnixDomainSocketConnection
        pool = redis.ConnectionPool(connection_class=unix, path=address.path, db=address.db, **common)
        return Servers(Server(pool, timeout))
    return Servers(connect(address.hosts[0]))


def _sentinel_pool(address: RedisAddress, common: dict[str, Any]) -> redis.ConnectionPool:
    """Return the connections to the master that Sentinels name."""
    from redis.sentinel import Sentinel

    if address.secured:
        common = {**common, "ssl": True}
    share = common["socket_timeout"] / len(address.hosts)  # the Sentinels are asked in turn
    password = os.environ.get(SENTINEL_PASSWORD) or None
    asking = {"socket_timeout": share, "socket_connect_timeout": share, "username": None, "password": password}
    new_sentinel: Any = Sentinel  # it has no annotations
    sentinel = new_sentinel(address.hosts, sentinel_kwargs={**common, **asking})
    pool: redis.ConnectionPool = sentinel.master_for(address.path, db=address.db, **common).connection_pool
    return pool
