"""The servers behind a router: which there are, which of them answer, and how much each has to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import httpx

logger = logging.getLogger("chunkcache")

WATCH_S = 1.0  # between two looks at a replica
PATIENCE_S = 5.0  # for a replica to take a connection, or to say that it is up
KEEP_S = 2.0  # that an idle connection is kept: less than the replica keeps it, which would close it under a request


@dataclass(eq=False)
class Replica:
    """One server.

    Attributes:
        url: where it listens.
        up: whether it answered when it was last asked.
        load: requests under way there, of this router.
        open: whether it let somebody in without a key, where that was tried.
    """

    url: str
    up: bool = False
    load: int = 0
    open: bool = False


class Replicas:
    """Replicas, each looked at once a second.

    Args:
        urls: such as `http://10.0.0.5:8000`.
        keyed: whether replicas that ask for no key are left out: they would let in all that the router lets in.
    """

    def __init__(self, urls: Iterable[str], keyed: bool) -> None:
        self._keyed = keyed
        self._by_url: dict[str, Replica] = {}
        self._client: httpx.AsyncClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self.set(urls)

    def set(self, urls: Iterable[str]) -> None:
        """Have these from now on; what is under way at others goes on to its end."""
        self._by_url = {url: self._by_url.get(url) or Replica(url) for url in (u.rstrip("/") for u in urls)}

    def __iter__(self) -> Iterator[Replica]:
        return iter(tuple(self._by_url.values()))

    def __getitem__(self, url: str) -> Replica:
        return self._by_url[url]

    def __len__(self) -> int:
        return len(self._by_url)

    @property
    def client(self) -> httpx.AsyncClient:
        """What asks them."""
        if self._client is None:
            raise RuntimeError("start() comes first")
        return self._client

    async def start(self) -> None:
        """Look at all of them, and go on doing so."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_S)
        timeout = httpx.Timeout(None, connect=PATIENCE_S)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
        await self.look()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Let go of all connections."""
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        await self.client.aclose()

    async def look(self) -> None:
        """Ask each once whether it is up."""
        await asyncio.gather(*map(self._look_at, self))

    def note(self, replica: Replica, up: bool) -> None:
        """Take note that a replica answers, or does not."""
        if up != replica.up:
            logger.warning("the replica %s is %s", replica.url, "up" if up else "gone")
        replica.up = up

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await self.look()

    async def _look_at(self, replica: Replica) -> None:
        path, wanted = ("/v1/models", 401) if self._keyed else ("/health", 200)
        try:
            response = await self.client.get(f"{replica.url}{path}", timeout=PATIENCE_S)
            up = response.status_code == wanted
            if self._keyed and response.status_code == 200 and not replica.open:
                logger.warning("%s asks for no key and is left out; start it with keys", replica.url)
            replica.open = response.status_code == 200
        except httpx.HTTPError:
            up = False
        self.note(replica, up)
