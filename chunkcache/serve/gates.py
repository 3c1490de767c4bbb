"""What a request passes before its body is read: whether it has a key, where it comes from, and its size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from chunkcache.serve.errors import HTTPError
from chunkcache.serve.loopback import LOOPBACK
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
    """Refuses requests without a key before a byte of their body is read; without keys, those of foreign pages.

    Args:
        app: what answers the others.
        server: knows the keys, and counts what is refused.
    """

    def __init__(self, app: Any, server: _Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["method"] not in _WITHOUT_BODY:
            given = dict(scope["headers"])
            tenants = self._server.options.tenants
            try:
                tenants.find(given.get(b"authorization", b"").decode("latin-1"))
                if not tenants:
                    _check_site(given)
            except HTTPError as error:
                await self._server.told(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _check_site(headers: Mapping[bytes, bytes]) -> None:
    """Refuse what a browser sends for a page of another site: it may send forms and text to any address.

    Browsers say in `Sec-Fetch-Site` (Fetch Metadata, W3C) and in `Origin` (RFC 6454) where a request comes from, and
    pages cannot change either. A page that has taken over a name of this machine has that name as its origin.

    Raises:
        HTTPError: a page of another site sends it.
    """
    site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin")
    if site not in (b"none", b"same-origin") or not (origin is None or _is_loopback(origin.decode("latin-1"))):
        message = "a page of another site may ask nothing of a server without API keys; set one to let it in"
        raise HTTPError(403, message, "cross_site_request")


def _is_loopback(origin: str) -> bool:
    try:
        return urlsplit(origin).hostname in LOOPBACK
    except ValueError:  # no URL
        return False


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
