"""OpenAI's Responses API, for text: its body and the events of its stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Any

from chunkcache.engine.sampling import Sampled
from chunkcache.serve.answers import Answers, Piece
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.openai import Form, Shape, data


class Response(Form):
    """One response with one message."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._message = f"msg_{shape.identity}"
        self._numbers = count()
        self._text, self._finish = "", ""

    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Sampled]], ends: Sequence[str]) -> dict[str, Any]:
        """Return the body, without usage."""
        [self._text], [self._finish] = texts, ends
        return self._body(self._status)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return usage under the names that it has here."""
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    async def stream(self, answers: Answers, include_usage: bool) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream."""
        place = {"item_id": self._message, "output_index": 0, "content_index": 0}
        try:
            yield self._event("response.created", response=self._body("in_progress"))
            yield self._event("response.in_progress", response=self._body("in_progress"))
            yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
            yield self._event("response.content_part.added", **place, part=self._part())
            async for piece in answers:
                self._take(piece)
                if piece.text:
                    yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
            yield self._event("response.output_text.done", **place, text=self._text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=self._part())
            yield self._event(
                "response.output_item.done", output_index=0, item=self._item(self._status, [self._part()])
            )
            ended = "response.completed" if self._status == "completed" else "response.incomplete"
            yield self._event(ended, response={**self._body(self._status), "usage": self.usage(answers.usage())})
        except Exception as error:  # noqa: BLE001 - the stream has begun, so it is told in it
            told = HTTPError.of(error).body()["error"]
            yield self._event("error", message=told["message"], code=told["code"], param=told["param"])

    @property
    def _status(self) -> str:
        return "completed" if self._finish == "stop" else "incomplete"

    def _take(self, piece: Piece) -> None:
        self._text += piece.text
        self._finish = piece.finish or self._finish

    def _body(self, status: str) -> dict[str, Any]:
        done = status != "in_progress"
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": f"resp_{self._shape.identity}", "object": "response", "created_at": self._shape.created,
            "model": self._shape.model, "status": status, "error": None, "incomplete_details": cut,
            "output": [self._item(status, [self._part()])] if done else [], "instructions": None, "metadata": {},
            "parallel_tool_calls": False, "temperature": None, "top_p": None, "tool_choice": "none", "tools": [],
            "usage": None,
        }  # fmt: skip

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._message, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": next(self._numbers), **fields}
        return f"event: {kind}\n".encode() + data(body)
