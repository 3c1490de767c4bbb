"""The outermost layer: an answer that has begun and goes wrong ends as its API ends streams."""

from __future__ import annotations

import asyncio
import json

from chunkcache.errors import InputError
from chunkcache.serve.record import Recorder
from chunkcache.serve.seen import Seen


def answered(path):
    """Return the body of a stream that goes wrong after its first event, and the statuses that were counted."""
    sent, failed = [], []

    async def app(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise InputError("it went wrong")

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(Seen(app, Recorder([]), failed.append)(scope, receive, send))
    assert not sent[-1].get("more_body", False)
    return b"".join(message.get("body", b"") for message in sent).decode(), failed


def test_a_stream_of_openais_ends_with_the_error_and_done():
    text, failed = answered("/v1/chat/completions")
    first, error, done = text.split("\n\n")[:-1]
    assert (first, done) == ("data: {}", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "it went wrong"
    assert failed == [400]


def test_a_stream_of_coheres_ends_with_its_last_event():
    text, failed = answered("/v2/chat")
    _, last = text.split("\n\n")[:-1]
    kind, told = last.split("\n")
    assert kind == "event: message-end"
    assert json.loads(told.removeprefix("data: ")) == {
        "type": "message-end",
        "delta": {"finish_reason": "ERROR", "error": "it went wrong"},
    }
    assert failed == [400]
