"""What goes wrong, in the shapes that OpenAI's and Cohere's clients read."""

from __future__ import annotations

import json
from typing import Any

from chunkcache.engine.faults import log_fault
from chunkcache.errors import ChunkCacheError, ContextLengthError, InputError, QueueFullError

RETRY_S = 1  # seconds after which one who was refused may ask again


class HTTPError(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        message: what was wrong, and the way out.
        code: OpenAI's code for it.
        param: the field that was wrong.
        retry: whether asking again later may help.

    Attributes:
        status: as given.
        retry: as given.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry
        self._code, self._param = code, param

    @classmethod
    def of(cls, error: BaseException) -> HTTPError:
        """Return how an error is told. One that the client cannot mend is logged, and told without its text."""
        if isinstance(error, HTTPError):
            return error
        if isinstance(error, QueueFullError):
            status, code = (503, "server_is_shutting_down") if error.draining else (429, "rate_limit_exceeded")
            return cls(status, str(error), code, retry=True)
        if isinstance(error, ContextLengthError):
            return cls(400, str(error), "context_length_exceeded", "messages")
        if isinstance(error, InputError):
            return cls(400, str(error))
        log_fault("a request failed", error)
        told = str(error) if isinstance(error, ChunkCacheError) else "the server failed; its log says why"
        return cls(500, told)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {"Retry-After": str(RETRY_S)} if self.retry else {}

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the body of the answer, in the shape of OpenAI's or, at its paths, of Cohere's API."""
        if path.startswith("/v2/"):
            return {"message": str(self)}
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self._param, "code": self._code}}


def stream_error(error: HTTPError, path: str) -> bytes:
    """Return the events that end a stream which has begun: as Cohere's end at its paths, else as OpenAI's."""
    body = error.body(path)
    if path.startswith("/v2/"):
        ended = {"type": "message-end", "delta": {"finish_reason": "ERROR", "error": body["message"]}}
        return f"event: message-end\ndata: {json.dumps(ended, separators=(',', ':'))}\n\n".encode()
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\ndata: [DONE]\n\n".encode()
