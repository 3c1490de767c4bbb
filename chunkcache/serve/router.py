"""A router in front of several `chunkcache serve`: an ASGI application that passes each request to one of them.

A request goes where most of its chunks belong (`placement`), over HTTP, and its answer comes back event by event.
What changes chunks goes to all. The router keeps nothing of a request, and knows no keys: replicas do.

A replica that dies is left out until it answers again. What it had under way is asked of another one, once, if no
text of the answer has been passed on yet; else the answer ends with an error, in OpenAI's shape.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from chunkcache.serve.errors import HTTPError
from chunkcache.serve.openai import data
from chunkcache.serve.placement import ranked, weights_of

logger = logging.getLogger("chunkcache")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v2/chat")
TRIES = 2
WATCH_S = 1.0  # between two looks at a replica
PATIENCE_S = 5.0  # for a replica to take a connection, or to say that it is up
KEEP_S = 2.0  # that an idle connection is kept: less than the replica keeps it, which would close it under a request
_OPENING = re.compile(  # an event that comes before the first text of an answer
    rb'"delta":\{"role"|"type":\s?"(response\.(created|in_progress|output_item\.added|content_part\.added)'
    rb'|message-start|content-start)"'
)
_ENDING = b"server_is_shutting_down"
_OF_ONE_HOP = {  # headers that each server on the way writes itself
    b"connection", b"date", b"server", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
    b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length",
}  # fmt: skip


class _LostError(Exception):
    """A replica went away before any of its answer was passed on."""


@dataclass(eq=False)
class Replica:
    """One server.

    Attributes:
        url: where it listens.
        up: whether it answered when it was last asked.
        load: requests under way there, of this router.
    """

    url: str
    up: bool = False
    load: int = 0


@dataclass(frozen=True)
class _Call:
    """A request as it came."""

    method: str
    path: str
    headers: Headers
    body: bytes = field(repr=False)

    @property
    def is_answer(self) -> bool:
        return self.path.partition("?")[0] in ANSWERS

    @property
    def is_change(self) -> bool:
        return self.method not in ("GET", "HEAD", "OPTIONS") and not self.is_answer

    @property
    def who(self) -> str:
        return dict(self.headers).get(b"authorization", b"").decode("latin-1")


class Router:
    """The application.

    Args:
        urls: of the replicas, such as `http://10.0.0.5:8000`.
        body_bytes: the largest request.
        keyed: whether replicas that ask for no key are left out: they would let in all that the router lets in.
    """

    def __init__(self, urls: Iterable[str] = (), body_bytes: int = 8 * 2**20, keyed: bool = False) -> None:
        self._body_bytes, self._keyed = body_bytes, keyed
        self._replicas: dict[str, Replica] = {}
        self._client: httpx.AsyncClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("chunkcache_router_requests", "Answers passed on, by replica and status.",
                                 ("replica", "status"), registry=registry)  # fmt: skip
        self._lost = Counter("chunkcache_router_lost", "Requests whose replica went away, by what became of them.",
                             ("outcome",), registry=registry)  # fmt: skip
        self._up = Gauge(
            "chunkcache_router_replica_up", "Whether a replica answers.", ("replica",), registry=registry
        )
        self._load = Gauge("chunkcache_router_running", "Requests at a replica.", ("replica",), registry=registry)
        self.set_replicas(urls)

    def set_replicas(self, urls: Iterable[str]) -> None:
        """Have these replicas from now on; what is under way at others goes on to its end."""
        self._replicas = {url: self._replicas.get(url) or Replica(url) for url in (u.rstrip("/") for u in urls)}

    @property
    def replicas(self) -> Sequence[Replica]:
        """The replicas."""
        return tuple(self._replicas.values())

    async def start(self) -> None:
        """Look at all replicas, and go on doing so."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEP_S)
            timeout = httpx.Timeout(None, connect=PATIENCE_S)
            self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
            await self.look()
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Let go of all connections."""
        if self._watching is not None and self._client is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
            await self._client.aclose()
            self._client = self._watching = None

    async def look(self) -> None:
        """Ask each replica once whether it is up."""
        await asyncio.gather(*map(self._look_at, self.replicas))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            await self.look()

    async def _look_at(self, replica: Replica) -> None:
        path, wanted = ("/v1/models", 401) if self._keyed else ("/health", 200)
        try:
            response = await self._http.get(f"{replica.url}{path}", timeout=PATIENCE_S)
            up = response.status_code == wanted
            if self._keyed and response.status_code == 200 and not replica.up:
                logger.warning("%s asks for no key and is left out; start it with keys", replica.url)
        except httpx.HTTPError:
            up = False
        self._note(replica, up)

    def _note(self, replica: Replica, up: bool) -> None:
        if up != replica.up:
            logger.warning("the replica %s is %s", replica.url, "up" if up else "gone")
        replica.up = up

    @property
    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            raise RuntimeError("start() comes first")
        return self._client

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(receive)
        if body is None:
            message = f"the request is larger than {self._body_bytes} bytes; send less"
            await _tell(send, HTTPError(413, message))
            return
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).partition(b"?")[0].decode("latin-1")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _OF_ONE_HOP]
        call = _Call(scope["method"], f"{path}?{query}" if query else path, headers, body)
        answering = asyncio.create_task(self._answer(call, send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:  # a client that has gone away ends the request to the replica, too
            for task in (answering, leaving):
                task.cancel()
            await asyncio.wait((answering, leaving))
        if not answering.cancelled():
            answering.result()

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body of a request, None if it is too large."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False) and message["type"] != "http.disconnect"
            if len(body) > self._body_bytes:
                return None
        return bytes(body)

    async def _answer(self, call: _Call, send: Send) -> None:
        if call.path == "/health":
            up = sum(replica.up for replica in self.replicas)
            told = {"status": "ok" if up else "no replica is up", "replicas": len(self._replicas), "up": up}
            await _respond(send, 200 if up else 503, _JSON, json.dumps(told).encode())
        elif call.path == "/metrics":
            await self._tell_metrics(call, send)
        elif call.is_change:
            await self._change(call, send)
        else:
            await self._pass(call, send)

    def _best(self, call: _Call, without: Iterable[Replica] = ()) -> list[Replica]:
        loads = {r.url: r.load for r in self.replicas if r.up and r not in without}
        weights = weights_of(call.body, call.who) if call.is_answer else {}
        return [self._replicas[url] for url in ranked(weights, loads)]

    async def _pass(self, call: _Call, send: Send) -> None:
        tried: list[Replica] = []
        while len(tried) < TRIES and (best := self._best(call, tried)):
            tried.append(best[0])
            best[0].load += 1
            try:
                await self._exchange(call, best[0], send)
                return
            except _LostError:
                again = len(tried) < TRIES and bool(self._best(call, tried))
                self._lost.labels("asked again" if again else "refused").inc()
            finally:
                best[0].load -= 1
        await _tell(send, _unserved())

    async def _exchange(self, call: _Call, replica: Replica, send: Send) -> None:
        """Pass a request to a replica, and its answer back."""
        begun = False
        try:
            async with self._http.stream(
                call.method, f"{replica.url}{call.path}", headers=call.headers, content=call.body
            ) as response:
                status, headers = response.status_code, _headers(response)
                streams = response.headers.get("content-type", "").startswith("text/event-stream")
                if not streams:
                    body = b"".join([piece async for piece in response.aiter_raw()])
                    if status == 503 and _ENDING in body:
                        raise _LostError
                    begun = True
                    await _respond(send, status, headers, body)
                else:
                    held = b""
                    async with aclosing(_events(response.aiter_raw())) as events:
                        async for event in events:
                            held += event
                            if not begun:
                                if _ENDING in event:
                                    raise _LostError
                                if _OPENING.search(event):
                                    continue
                                begun = True
                                await _begin(send, status, headers)
                            await _send(send, held)
                            held = b""
                    if not begun:
                        await _begin(send, status, headers)
                    await _send(send, held, last=True)
                self._requests.labels(replica.url, str(status)).inc()
        except httpx.TransportError as error:
            self._note(replica, False)
            if not begun:
                raise _LostError from error
            self._lost.labels("cut short").inc()
            lost = HTTPError(502, "the replica that answered went away; ask again", "replica_lost")
            await _send(send, data(lost.body()) + b"data: [DONE]\n\n", last=True)

    async def _change(self, call: _Call, send: Send) -> None:
        """Pass a request to all replicas, one after the other; tell what the last says, or the first that refuses it.

        The first computes what all of them then find in the store that they share.
        """
        answers: list[tuple[int, Headers, bytes]] = []
        for replica in self._best(call):
            try:
                response = await self._http.request(
                    call.method, f"{replica.url}{call.path}", headers=call.headers, content=call.body
                )
            except httpx.TransportError:
                self._note(replica, False)
                continue
            self._requests.labels(replica.url, str(response.status_code)).inc()
            headers = [pair for pair in _headers(response) if pair[0] != b"content-encoding"]
            answers.append((response.status_code, headers, response.content))
            if response.status_code >= 400:
                break
        if answers:
            await _respond(send, *answers[-1])
        else:
            await _tell(send, _unserved())

    async def _tell_metrics(self, call: _Call, send: Send) -> None:
        """Answer with what was counted, if a replica knows the key of the request."""
        asked = _Call("GET", "/v1/models", call.headers, b"")
        for replica in self._best(asked):
            with suppress(httpx.TransportError):
                response = await self._http.get(f"{replica.url}{asked.path}", headers=asked.headers)
                if response.status_code != 200:
                    await _respond(send, response.status_code, _JSON, response.content)
                    return
                for each in self.replicas:
                    self._up.labels(each.url).set(each.up)
                    self._load.labels(each.url).set(each.load)
                plain = [(b"content-type", b"text/plain; version=0.0.4")]
                await _respond(send, 200, plain, generate_latest(self._registry))
                return
        await _tell(send, _unserved())


_JSON: Headers = [(b"content-type", b"application/json")]


def _unserved() -> HTTPError:
    return HTTPError(503, "no replica is there to answer; ask again", "no_replica", retry=True)


def _headers(response: httpx.Response) -> Headers:
    return [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _OF_ONE_HOP]


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events, each whole."""
    rest = b""
    async for piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
    if rest:
        yield rest


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _begin(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send(send: Send, body: bytes, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await _begin(send, status, [*headers, (b"content-length", str(len(body)).encode())])
    await _send(send, body, last=True)


async def _tell(send: Send, error: HTTPError) -> None:
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await _respond(send, error.status, [*_JSON, *headers], json.dumps(error.body()).encode())
