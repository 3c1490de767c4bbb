"""The outermost layer of the server: every request has a record and an id, and no error leaves without an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from chunkcache.errors import QueueFullError
from chunkcache.serve.errors import HTTPError, stream_error
from chunkcache.serve.record import Record, Recorder

PARTING_S = 1.0  # that the end of an answer which is cut short may take


class Seen:
    """ASGI middleware that records requests.

    What goes wrong inside is answered here, and logged once: neither starlette nor the server beneath sees it.

    Args:
        app: what answers.
        recorder: keeps the records. That of a request is in `request.state.record`.
        failed: called with the status of each answer that is made here.
    """

    def __init__(self, app: Any, recorder: Recorder, failed: Callable[[int], None]) -> None:
        self._app, self._recorder, self._failed = app, recorder, failed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        record = self._recorder.begin(scope["method"], headers)
        scope.setdefault("state", {})["record"] = record
        answer = _Answer(record, send)

        async def heard() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect" and not answer.complete:
                record.gone = True
            return message

        try:
            await self._app(scope, heard, answer.send)
        except asyncio.CancelledError:  # the server ends, and has waited long enough for this answer
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._end(scope, answer, QueueFullError(0, draining=True)), PARTING_S)
        except ClientDisconnect:
            record.gone = True
        except Exception as error:  # noqa: BLE001 - what nobody has foreseen is answered, too
            record.error = type(error).__name__
            await self._end(scope, answer, error)
        finally:
            record.route = getattr(scope.get("route"), "path", "")
            self._recorder.end(record)

    async def _end(self, scope: Any, answer: _Answer, error: Exception) -> None:
        """Answer with an error, as far as that can be: one that is half sent as JSON is left so."""
        told = HTTPError.of(error)
        if answer.complete or (answer.begun and not answer.streams):
            return
        self._failed(told.status)
        if answer.begun:
            await answer.send({"type": "http.response.body", "body": stream_error(told, scope["path"])})
        else:
            await JSONResponse(told.body(scope["path"]), told.status, told.headers)(scope, _nothing, answer.send)


class _Answer:
    """What was sent of an answer."""

    def __init__(self, record: Record, send: Any) -> None:
        self._record, self._send = record, send
        self.begun = self.streams = self.complete = False

    async def send(self, message: Any) -> None:
        """Send a part of it; the first has the request's id."""
        if message["type"] == "http.response.start":
            self.begun, self._record.status = True, message["status"]
            headers = list(message.get("headers", ()))
            self.streams = any(name == b"content-type" and b"event-stream" in value for name, value in headers)
            message = {**message, "headers": [*headers, (b"x-request-id", self._record.identity.encode())]}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
        await self._send(message)


async def _nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}
