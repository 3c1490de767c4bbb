"""What a request passes before its body is read: whether it has a key, and how large it may be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from chunkcache.serve.errors import HTTPError
from chunkcache.serve.tenants import Tenants

Scope = MutableMapping[str, Any]
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")  # their routes ask for the key themselves, where one is wanted


class _Options(Protocol):
    @property
    def tenants(self) -> Tenants: ...


class _Server(Protocol):
    @property
    def options(self) -> _Options: ...

    def told(self, error: HTTPError, path: str = "") -> JSONResponse: ...


class Guarded:
    """Refuses requests without a key before a byte of their body is read.

    Args:
        app: what answers the others.
        server: knows the keys, and counts what is refused.
    """

    def __init__(self, app: Any, server: _Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["method"] not in _WITHOUT_BODY:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            try:
                self._server.options.tenants.find(given)
            except HTTPError as error:
                await self._server.told(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Bounded:
    """Refuses requests whose body is too large, whatever they say of its length.

    Args:
        app: what answers the others.
        most: bytes that a body may have.
    """

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Pass a request on, and stop reading it where it is too large."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def bounded() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, f"the request is larger than {self._most} bytes; send less")
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            error = HTTPError(413, f"the request is larger than {self._most} bytes; send less")
            await JSONResponse(error.body(scope["path"]), error.status)(scope, receive, send)
            return
        await self._app(scope, bounded, send)
