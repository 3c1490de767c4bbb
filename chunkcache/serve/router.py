"""A router in front of several `chunkcache serve`: an ASGI application that passes each request to one of them.

A request goes where most of its chunks belong (`placement`), over HTTP, and its answer comes back event by event.
What changes chunks goes to all. The router keeps nothing of a request, and knows no keys: replicas do.

A replica that dies is left out until it answers again. What it had under way is asked of another one, once, if no
text of the answer has been passed on yet; else the answer ends with an error, in the shape of its API.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from chunkcache.serve.errors import HTTPError, stream_error
from chunkcache.serve.placement import ranked, weights_of
from chunkcache.serve.replicas import Replica, Replicas

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v2/chat")
TRIES = 2
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
        keyed: as in `Replicas`.

    Attributes:
        replicas: the servers.
    """

    def __init__(self, urls: Iterable[str] = (), body_bytes: int = 8 * 2**20, keyed: bool = False) -> None:
        self._body_bytes = body_bytes
        self.replicas = Replicas(urls, keyed)
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("chunkcache_router_requests", "Answers passed on, by replica and status.",
                                 ("replica", "status"), registry=registry)  # fmt: skip
        self._lost = Counter("chunkcache_router_lost", "Requests whose replica went away, by what became of them.",
                             ("outcome",), registry=registry)  # fmt: skip
        self._up = Gauge(
            "chunkcache_router_replica_up", "Whether a replica answers.", ("replica",), registry=registry
        )
        self._load = Gauge("chunkcache_router_running", "Requests at a replica.", ("replica",), registry=registry)

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
                await self.replicas.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.replicas.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(receive)
        if body is None:
            message = f"the request is larger than {self._body_bytes} bytes; send less"
            await _tell(send, HTTPError(413, message), scope["path"])
            return
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).partition(b"?")[0].decode("latin-1")
        if not path.startswith("/"):  # such as `@elsewhere`, which would end the URL of a replica in another host
            await _tell(send, HTTPError(400, "the path of a request begins with /"))
            return
        target = f"{path}?{query}" if query else path
        try:
            hidden = _is_dashboard(target)
        except httpx.InvalidURL:
            await _tell(send, HTTPError(400, "the path or query of the request is no valid one, or too long"), path)
            return
        if hidden:
            await _tell(send, HTTPError(404, "a dashboard is at the port of its server, not at the router's"))
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _OF_ONE_HOP]
        call = _Call(scope["method"], target, headers, body)
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
            told = {"status": "ok" if up else "no replica is up", "replicas": len(self.replicas), "up": up}
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
        return [self.replicas[url] for url in ranked(weights, loads)]

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
        await _tell(send, _unserved(), call.path)

    async def _exchange(self, call: _Call, replica: Replica, send: Send) -> None:
        """Pass a request to a replica, and its answer back."""
        begun = False
        try:
            async with self.replicas.client.stream(
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
            self.replicas.note(replica, False)
            if not begun:
                raise _LostError from error
            self._lost.labels("cut short").inc()
            lost = HTTPError(502, "the replica that answered went away; ask again", "replica_lost")
            await _send(send, stream_error(lost, call.path), last=True)

    async def _change(self, call: _Call, send: Send) -> None:
        """Pass a request to all replicas, one after the other; tell what the last says, or the first that refuses it.

        The first computes what all of them then find in the store that they share.
        """
        answers: list[tuple[int, Headers, bytes]] = []
        for replica in self._best(call):
            try:
                response = await self.replicas.client.request(
                    call.method, f"{replica.url}{call.path}", headers=call.headers, content=call.body
                )
            except httpx.TransportError:
                self.replicas.note(replica, False)
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
                response = await self.replicas.client.get(f"{replica.url}{asked.path}", headers=asked.headers)
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


def _is_dashboard(target: str) -> bool:
    """Return whether the path of a request, as it would be sent on, is one of a dashboard.

    Without keys a dashboard is for those who open it under a loopback name, and what a replica sees is the name by
    which the router asks for it.
    """
    sent = "/" + posixpath.normpath(httpx.URL(f"http://replica{target}").path).lstrip("/")
    return sent == "/" or sent.startswith("/dashboard")


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


async def _tell(send: Send, error: HTTPError, path: str = "") -> None:
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await _respond(send, error.status, [*_JSON, *headers], json.dumps(error.body(path)).encode())
