"""What Cohere's clients send to `/v2/chat`, and the chat that it stands for.

Fields that say nothing about the answer here (`safety_mode`, `priority`, `strict_tools`) are taken and not used.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from chunkcache.serve.errors import HTTPError
from chunkcache.serve.fields import Json, NonEmpty, Strict, Text, is_json
from chunkcache.serve.protocol import ChatRequest, Rag, Salted

_TITLE, _TEXTS = "title", ("text", "snippet", "content")
_NO_TOP_K = 2**31 - 1  # what 0 means: no tokenizer has as many tokens


class CohereContent(Strict):
    """A part of a message."""

    type: Literal["text", "thinking"]
    text: Text | None = None
    thinking: Text | None = None


class CohereMessage(Strict):
    """A message; what an earlier answer brought with it is taken, and not used."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[CohereContent] | None = None
    citations: list[Any] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_plan: str | None = None

    def said(self) -> str:
        """Return its text."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        return "\n".join(part for part in parts if part)


class CohereDocument(Strict):
    """A document: `data` has its fields, of which all stand in the prompt."""

    id: Annotated[str, Field(max_length=512)] | None = None
    data: Annotated[
        Text | dict[str, Any], AfterValidator(lambda data: data if isinstance(data, str) else is_json(data))
    ]

    def fields(self) -> dict[str, Any]:
        """Return its fields."""
        return {"text": self.data} if isinstance(self.data, str) else self.data


class CitationOptions(Strict):
    """Whether an answer has citations; those of all modes that have some are the same."""

    mode: Annotated[str, AfterValidator(str.upper)] | None = None


class CohereFormat(Strict):
    """How the answer is to look."""

    type: Literal["text", "json_object"]
    json_schema: Json | None = None
    schema_: Json | None = Field(None, alias="schema")


class Thinking(Strict):
    """Whether the model thinks aloud first, which is not served."""

    type: str
    token_budget: int | None = None


class CohereRequest(Salted):
    """POST /v2/chat; `rag`, `reuse` and salts are this server's."""

    model: str
    messages: list[CohereMessage] = Field(min_length=1)
    documents: list[Text | CohereDocument] | None = None
    citation_options: CitationOptions | None = None
    response_format: CohereFormat | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop_sequences: Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    k: int | None = Field(None, ge=0, le=500)
    p: float | None = Field(None, gt=0, le=1)
    logprobs: bool = False
    stream: bool = False
    safety_mode: str | None = None
    priority: int | None = None
    strict_tools: bool | None = None
    tools: list[Any] | None = None
    tool_choice: str | None = None
    thinking: Thinking | None = None
    rag: Rag | None = None
    reuse: Literal["exact", "fused", "off"] | None = None

    def sources(self) -> list[dict[str, Any]]:
        """Return the documents as citations show them: with an id, `doc:0` and so on where they have none."""
        sources = []
        for place, document in enumerate(self.documents or ()):
            given = {"text": document} if isinstance(document, str) else document.fields()
            name = None if isinstance(document, str) else document.id
            sources.append({**given, "id": name or f"doc:{place}"})
        return sources

    def as_chat(self) -> ChatRequest:
        """Return the chat that it stands for.

        Raises:
            HTTPError: it asks for what is not served.
        """
        if self.tools:
            raise HTTPError(400, "tools are not served at /v2/chat; ask /v1/chat/completions")
        if self.thinking is not None and self.thinking.type != "disabled":
            raise HTTPError(400, "thinking is not served here; leave it out")
        asked = {name: getattr(self, name) for name in _SAME}
        asked["messages"] = [{"role": each.role, "content": each.said()} for each in self.messages]
        asked["documents"] = [{"id": each["id"], "text": passage(each)} for each in self.sources()]
        asked["stop"], asked["top_p"] = self.stop_sequences, self.p
        asked["top_k"] = _NO_TOP_K if self.k == 0 else self.k
        asked["response_format"] = self._format()
        try:
            return ChatRequest.model_validate(asked)
        except ValidationError as error:
            raise HTTPError(400, str(error.errors()[0]["msg"])) from None

    def _format(self) -> dict[str, Any] | None:
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema or self.response_format.schema_
        if schema is None:
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


_SAME = (
    "model", "max_tokens", "temperature", "seed", "frequency_penalty", "presence_penalty", "logprobs", "stream",
    "rag", "reuse", "cache_salt", "prompt_cache_key",
)  # fmt: skip


def passage(source: dict[str, Any]) -> str:
    """Return a document as it stands in a prompt: its title, its text, then its other fields by name."""
    texts = [source[name] for name in (_TITLE, *_TEXTS) if name in source]
    others = [f"{name}: {_shown(value)}" for name, value in source.items() if name not in (_TITLE, *_TEXTS, "id")]
    return "\n".join([*(_shown(text) for text in texts), *others]).strip()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
