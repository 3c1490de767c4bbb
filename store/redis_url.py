"""The URLs of Redis servers: one server, a Unix socket, Sentinels or a Cluster."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from chunkcache.errors import StoreURLError
from chunkcache.store.url import redacted

Address = tuple[str, int]
SCHEMES = ("redis", "rediss", "redis+unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
USERNAME, PASSWORD = "CHUNKCACHE_REDIS_USERNAME", "CHUNKCACHE_REDIS_PASSWORD"  # environment variables


@dataclass(frozen=True, repr=False)
class RedisAddress:
    """The servers that a URL names; the user name and password may come from the environment."""

    scheme: str
    username: str | None
    password: str | None
    hosts: tuple[Address, ...] = ()
    path: str = ""  # of a socket; of Sentinels, the name of the service
    db: int = 0

    @property
    def kind(self) -> str:
        """`unix`, `sentinel` or `cluster`; '' for a single server."""
        return self.scheme.partition("+")[2]

    @property
    def secured(self) -> bool:
        """Whether TLS is spoken."""
        return self.scheme.startswith("rediss")

    @classmethod
    def of(cls, url: str) -> RedisAddress:
        """Parse a URL; raises StoreURLError if it names no server."""
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
        address = cls(
            scheme,
            unquote(username) or os.environ.get(USERNAME) or None,
            unquote(password) or os.environ.get(PASSWORD) or None,
        )
        if scheme not in SCHEMES or parts.query or parts.fragment:
            raise wrong
        if kind == "unix":
            if netloc or len(parts.path) < 2:
                raise wrong
            return replace(address, path=unquote(parts.path))
        hosts = tuple(_host(text, 26379 if kind == "sentinel" else 6379, wrong) for text in netloc.split(","))
        path = parts.path.strip("/").split("/")
        service = unquote(path.pop(0)) if kind == "sentinel" else ""
        db = path.pop(0) if path else ""
        several = kind in ("sentinel", "cluster")
        if path or not re.fullmatch(r"[0-9]{0,5}", db) or (kind == "cluster" and db):
            raise wrong
        if (kind == "sentinel" and not service) or (len(hosts) > 1 and not several):
            raise wrong
        return replace(address, hosts=hosts, path=service, db=int(db or 0))


def _host(text: str, port: int, wrong: StoreURLError) -> Address:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/@]+))?(?::([0-9]{1,5}))?", text)
    if match is None or int(match[3] or port) > 65535:
        raise wrong
    return match[1] or match[2] or "localhost", int(match[3] or port)
