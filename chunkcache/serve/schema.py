"""What the server says of itself as OpenAPI: the answers that each route may give, errors among them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


_ERRORS = {
    400: "The request is wrong, or cannot be served; the message says what to change.",
    401: "The key is none that is known.",
    403: "The key is not one that may do this; or, without keys, a page of another site asks.",
    404: "There is no such model.",
    413: "The request is too large.",
    429: "Too many requests are under way; ask again.",
    499: "The client went away.",
    500: "The server failed.",
    503: "The server is shutting down; ask again.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
_ANSWER = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _EVENT}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return errors as `responses=` of a route."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": ErrorBody, "description": _ERRORS[status]}
        if status in (429, 503):
            found[status]["headers"] = _RETRY
    return found


READ = errors(401, 500)
NAMED = errors(401, 404, 500)
POSTED = errors(400, 401, 413, 429, 500, 503)
ANSWERED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with `stream` its events.", "content": _ANSWER},
    **errors(*_ERRORS),
}
TEXT: dict[int | str, dict[str, Any]] = {
    200: {"description": "Metrics for Prometheus.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **READ,
}


def openapi(app: FastAPI, keys: bool) -> dict[str, Any]:
    """Return the OpenAPI of an app.

    Args:
        app: the app.
        keys: whether it asks for a key.
    """
    told: dict[str, Any] = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = told["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in told["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
            if keys and path != "/health":
                operation["security"] = [{"key": []}]
    return told
