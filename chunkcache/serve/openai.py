"""The bodies of OpenAI's answers: chat completions, completions, and their streams."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

from chunkcache.engine.detokenizer import UNFINISHED
from chunkcache.engine.sampling import Sampled
from chunkcache.serve.answers import Answers, Piece
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.tool_parser import CallParser, Read, delta, message

Decode = Callable[[int], str]
_REASONS = {"cancelled": "stop", "deadline": "length"}  # what OpenAI's clients know of


@dataclass(frozen=True)
class Shape:
    """What the answers to one request have in common.

    Attributes:
        model: the model's name.
        decode: text of one token.
        logprobs: whether probabilities are told.
        identity: of the answer.
        created: when, in seconds since the epoch.
        calls: makes what finds function calls in an answer; None where there are none.
    """

    model: str
    decode: Decode
    logprobs: bool
    identity: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    calls: Callable[[], CallParser] | None = None

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """Return the fields that every body begins with."""
        return {"id": f"{prefix}-{self.identity}", "object": kind, "created": self.created, "model": self.model}


class Form(ABC):
    """One kind of answer.

    Class attributes:
        operation: what it does, as OpenTelemetry's conventions for generative AI call it.
    """

    operation: ClassVar[str] = "chat"

    @abstractmethod
    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Sampled]], ends: Sequence[str]) -> dict[str, Any]:
        """Return the body of whole answers, without usage."""

    @abstractmethod
    def stream(self, answers: Answers, include_usage: bool) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream."""

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return usage under the names that it has in this kind of answer."""
        return usage


class _Pieces(Form):
    """An answer whose stream is of pieces, and ends with `[DONE]`."""

    @abstractmethod
    def opening(self, answers: int) -> list[dict[str, Any]]:
        """Return what stands first in a stream."""

    @abstractmethod
    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what a piece is in a stream."""

    @abstractmethod
    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a stream that says how much was used."""

    async def stream(self, answers: Answers, include_usage: bool) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a stream: pieces, usage where it is asked for, and `[DONE]`."""
        try:
            for part in self.opening(len(answers.choices)):
                yield data(part)
            async for piece in answers:
                for part in self.parts(piece):
                    yield data({**part, **answers.extra()} if piece.finish else part)
            if include_usage:
                yield data({**self.closing(answers.usage()), **answers.extra()})
        except Exception as error:  # noqa: BLE001 - the stream has begun, so it is told in it
            yield data(HTTPError.of(error).body())
        yield b"data: [DONE]\n\n"


class Chat(_Pieces):
    """Chat completions."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._whole = shape.head("chatcmpl", "chat.completion")
        self._part = shape.head("chatcmpl", "chat.completion.chunk")
        self._parsers: dict[int, CallParser] = {}

    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Sampled]], ends: Sequence[str]) -> dict[str, Any]:
        """Return the body of whole answers, without usage."""
        choices = [
            {
                "index": index,
                "message": self._message(index, text),
                "logprobs": self._logprobs(sampled),
                "finish_reason": self._finish(index, end),
            }
            for index, (text, sampled, end) in enumerate(zip(texts, tokens, ends, strict=True))
        ]
        return {**self._whole, "choices": choices}

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """Return what stands first in a stream: the role of each answer."""
        return [self._choice(index, {"role": "assistant", "content": ""}) for index in range(answers)]

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what a piece is in a stream: its text, and then its end."""
        deltas: list[dict[str, Any]] = [{"content": piece.text}] if piece.text or piece.tokens else []
        if self._shape.calls is not None:
            deltas = [delta(each) for each in self._read(piece.index, piece.text, piece.finish is not None)]
            if self._shape.logprobs and piece.tokens and not deltas:
                deltas = [{}]
        parts = [self._choice(piece.index, each) for each in deltas]
        if parts:
            parts[0]["choices"][0]["logprobs"] = self._logprobs(piece.tokens)
        if piece.finish is not None:
            parts.append(self._choice(piece.index, {}, self._finish(piece.index, piece.finish)))
        return parts

    def _read(self, index: int, text: str, over: bool) -> list[Read]:
        """Return the texts and parts of calls that some text of an answer brings."""
        assert self._shape.calls is not None
        parser = self._parsers.setdefault(index, self._shape.calls())
        return [*parser.push(text), *(parser.finish() if over else ())]

    def _message(self, index: int, text: str) -> dict[str, Any]:
        """Return the message of a whole answer."""
        if self._shape.calls is None:
            return {"role": "assistant", "content": text, "refusal": None}
        return message(self._read(index, text, over=True))

    def _finish(self, index: int, end: str) -> str:
        reason = _REASONS.get(end, end)
        calls = index in self._parsers and self._parsers[index].calls
        return "tool_calls" if calls and reason == "stop" else reason

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a stream that says how much was used."""
        return {**self._part, "choices": [], "usage": usage}

    def _choice(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._part, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Sampled]) -> dict[str, Any] | None:
        if not self._shape.logprobs:
            return None
        return {"content": [{**self._token(t.token_id, t.logprob), "top_logprobs": self._top(t)} for t in tokens]}

    def _top(self, sampled: Sampled) -> list[dict[str, Any]]:
        return [self._token(token_id, logprob) for token_id, logprob in sampled.top]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._shape.decode(token_id)
        whole = UNFINISHED not in text  # else it has some of the bytes of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


class Completion(_Pieces):
    """Completions of a text."""

    operation = "text_completion"

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._head = shape.head("cmpl", "text_completion")
        self._offsets: dict[int, int] = {}

    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Sampled]], ends: Sequence[str]) -> dict[str, Any]:
        """Return the body of whole answers, without usage."""
        choices = [
            self._choice(index, text, sampled, _REASONS.get(end, end))
            for index, (text, sampled, end) in enumerate(zip(texts, tokens, ends, strict=True))
        ]
        return {**self._head, "choices": choices}

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """Return what stands first in a stream: nothing."""
        return []

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what a piece is in a stream."""
        finish = None if piece.finish is None else _REASONS.get(piece.finish, piece.finish)
        return [{**self._head, "choices": [self._choice(piece.index, piece.text, piece.tokens, finish)]}]

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a stream that says how much was used."""
        return {**self._head, "choices": [], "usage": usage}

    def _choice(self, index: int, text: str, tokens: Sequence[Sampled], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Sampled]) -> dict[str, Any] | None:
        if not self._shape.logprobs:
            return None
        decode, offset = self._shape.decode, self._offsets.get(index, 0)
        texts, offsets = [decode(each.token_id) for each in tokens], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [{decode(token_id): value for token_id, value in each.top} for each in tokens],
            "text_offset": offsets,
        }


async def gathered(form: Form, answers: Answers) -> dict[str, Any]:
    """Return the body of a request that is not streamed."""
    texts = [""] * len(answers.choices)
    tokens: list[list[Sampled]] = [[] for _ in texts]
    ends = [""] * len(texts)
    async for piece in answers:
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.tokens
        ends[piece.index] = piece.finish or ends[piece.index]
    return {**form.whole(texts, tokens, ends), "usage": form.usage(answers.usage()), **answers.extra()}


def data(body: dict[str, Any]) -> bytes:
    """Return the data of a server-sent event: in ASCII, since some clients end a line at U+2028 or U+0085, too."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
