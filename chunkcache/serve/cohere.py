"""Cohere's `/v2/chat`: its requests, answers, events and errors, with citations that are found word for word."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from chunkcache.engine.generation import end_ids
from chunkcache.engine.sampling import Sampled
from chunkcache.serve import schema
from chunkcache.serve.answers import Answers
from chunkcache.serve.app import AServer, Who
from chunkcache.serve.citations import cite
from chunkcache.serve.cohere_protocol import CohereRequest, passage
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.openai import Form, Shape
from chunkcache.serve.protocol import ChatRequest
from chunkcache.serve.service import Choice, Service
from chunkcache.serve.tenants import Tenant

router = APIRouter()
_REASONS = {"length": "MAX_TOKENS", "deadline": "TIMEOUT", "cancelled": "ERROR"}
_UNCITED = ("OFF", "DISABLED")


class CohereError(BaseModel):
    """An error in Cohere's shape."""

    message: str


_ANSWERED: dict[int | str, dict[str, Any]] = {
    status: {**told, "model": CohereError} if "model" in told else told for status, told in schema.ANSWERED.items()
}


@router.post("/v2/chat", responses=_ANSWERED)
async def chat(request: Request, asked: CohereRequest, tenant: Who, server: AServer) -> Response:
    """Answer a conversation, as Cohere's API does."""
    cohere = CohereChat(asked, server.service)
    return await server.answer(request, asked.as_chat(), tenant, cohere.prepare, cohere)


class CohereChat(Form):
    """The answer to one request.

    Args:
        asked: the request.
        service: answers it.
    """

    def __init__(self, asked: CohereRequest, service: Service) -> None:
        self._service = service
        self._sources = asked.sources()
        self._texts = [passage(source) for source in self._sources]  # what is cited of each
        said = [message.said() for message in asked.messages if message.role == "user"]
        self._question = said[-1] if said else ""
        self._cited = asked.citation_options is None or asked.citation_options.mode not in _UNCITED
        self._logprobs = asked.logprobs
        self._ends = end_ids(service.llm.model, {})
        self._identity = ""

    def prepare(self, asked: ChatRequest, tenant: Tenant) -> list[Choice]:
        """Return the answer that is asked for; what is found in an index is cited like the documents."""
        choices = self._service.chat(asked, tenant)
        found = choices[0].found
        if found is not None:
            for document, told in zip(found.documents, found.told, strict=True):
                self._sources.append({**told, "text": document.text})
                self._texts.append(document.text or "")  # its place and score are not of the document
        return choices

    def __call__(self, shape: Shape) -> CohereChat:
        """Take on the answer's name."""
        self._identity = shape.identity
        return self

    def whole(self, texts: Sequence[str], tokens: Sequence[Sequence[Sampled]], ends: Sequence[str]) -> dict[str, Any]:
        """Return the body of the whole answer, without usage."""
        message: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": texts[0]}]}
        citations = self._citations(texts[0])
        if citations:
            message["citations"] = citations
        reason = self._reason(ends[0], tokens[0])
        body: dict[str, Any] = {"id": self._identity, "finish_reason": reason, "message": message}
        if self._logprobs:
            body["logprobs"] = [self._logprob(sampled) for sampled in tokens[0]]
        return body

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return usage under Cohere's names, with what was reused beside them."""
        counts = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        details = usage["prompt_tokens_details"]
        return {
            "billed_units": counts,
            "tokens": counts,
            "cached_tokens": details["cached_tokens"],
            "chunkcache": details.get("chunkcache", []),
        }

    async def stream(self, answers: Answers, include_usage: bool) -> AsyncIterator[bytes]:
        """Yield the events of a stream: the text as it comes, then citations, then the end with usage."""
        text, tokens, end = "", list[Sampled](), ""
        yield _event("message-start", id=self._identity, delta={"message": {
            "role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": [],
        }})  # fmt: skip
        try:
            yield _event("content-start", index=0, delta={"message": {"content": {"type": "text", "text": ""}}})
            async for piece in answers:
                text, tokens, end = text + piece.text, [*tokens[-1:], *piece.tokens], piece.finish or end
                told = {"logprobs": self._logprob(*piece.tokens)} if self._logprobs and piece.tokens else {}
                if piece.text or told:
                    yield _event(
                        "content-delta", index=0, delta={"message": {"content": {"text": piece.text}}}, **told
                    )
            for place, citation in enumerate(self._citations(text)):
                yield _event("citation-start", index=place, delta={"message": {"citations": citation}})
                yield _event("citation-end", index=place)
            yield _event("content-end", index=0)
            delta = {"finish_reason": self._reason(end, tokens), "usage": self.usage(answers.usage())}
            yield _event("message-end", id=self._identity, delta=delta, **answers.extra())
        except Exception as error:  # noqa: BLE001 - the stream has begun, so it is told in it
            delta = {"finish_reason": "ERROR", "error": str(HTTPError.of(error))}
            yield _event("message-end", id=self._identity, delta=delta)

    def _reason(self, end: str, tokens: Sequence[Sampled]) -> str:
        if end == "stop":
            whole = bool(tokens) and tokens[-1].token_id in self._ends
            return "COMPLETE" if whole else "STOP_SEQUENCE"
        return _REASONS.get(end, "COMPLETE")

    def _citations(self, text: str) -> list[dict[str, Any]]:
        if not self._cited or not self._sources:
            return []
        return [
            {
                "start": found.start,
                "end": found.end,
                "text": text[found.start : found.end],
                "sources": [self._source(self._sources[place]) for place in found.sources],
                "content_index": 0,
                "type": "TEXT_CONTENT",
            }
            for found in cite(text, self._texts, self._question)
        ]

    @staticmethod
    def _source(source: dict[str, Any]) -> dict[str, Any]:
        return {"type": "document", "id": source["id"], "document": source}

    def _logprob(self, *sampled: Sampled) -> dict[str, Any]:
        ids = [each.token_id for each in sampled]
        text = "".join(map(self._service.token_text, ids))
        return {"text": text, "token_ids": ids, "logprobs": [each.logprob for each in sampled]}


def _event(kind: str, **body: Any) -> bytes:
    """Return a server-sent event, in ASCII, since some clients end a line at U+2028, too."""
    told = json.dumps({"type": kind, **body}, separators=(",", ":"))
    return f"event: {kind}\ndata: {told}\n\n".encode()
