"""What clients send: OpenAI's requests, with what is added to them here. Unknown fields are refused, not ignored.

Fields that OpenAI's API has and that say nothing about the answer (`user`, `metadata`, ...) are taken and not used.
A field that is null is as if it were not there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from chunkcache.serve.fields import Bias, IndexName, Json, NonEmpty, Salt, Text
from chunkcache.serve.fields import Strict as _Strict
from chunkcache.serve.tool_fields import NamedTool, Tool, ToolCall


class Salted(_Strict):
    """What divides a tenant's chunks."""

    cache_salt: Salt | None = None
    prompt_cache_key: Salt | None = None

    def salts(self) -> list[str]:
        """Return the salts that are given."""
        return salts_of(self.cache_salt, self.prompt_cache_key)


def salts_of(*given: str | None) -> list[str]:
    """Return those of a `cache_salt` and a `prompt_cache_key` that are given."""
    return [salt for salt in given if salt is not None]


class _Asked(Salted):
    """What all requests for an answer have."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool = False
    reuse: Literal["exact", "fused", "off"] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None


class TextPart(_Strict):
    """A part of a message. One with `prompt_cache_breakpoint` is a chunk, whose KV are reused wherever it stands."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = None
    annotations: list[Any] | None = None


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _calls_as_who_may(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are those of the assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id stands with the role tool")
        return self


class ResponseMessage(_Strict):
    """A message of the input of a response."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class Document(_Strict):
    """A passage: as vLLM and chat templates write it (`title`, `text`), or Cohere (`id`, `data`)."""

    id: str | None = None
    title: Text | None = None
    text: Text | None = None
    data: Text | dict[str, Text] | None = None

    def passage(self) -> str:
        """Return its text as it stands in the prompt."""
        data = self.data if isinstance(self.data, dict) else {"text": self.data or ""}
        title, text = self.title or data.get("title", ""), self.text or data.get("text") or data.get("snippet", "")
        return f"{title}\n{text}".strip() if title else text


class StreamOptions(_Strict):
    """What a stream has besides its pieces."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JSONSchema(_Strict):
    """A schema that an answer follows, and what clients call it."""

    name: str
    schema_: Json = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """How the answer is to look: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema stands with the type json_schema, and only there")
        return self

    def to_follow(self) -> dict[str, Any] | None:
        """Return the schema that the answer follows, None for any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Sampling(_Asked):
    """How an answer is chosen, and over which KV."""

    max_tokens: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)] | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    def stops(self) -> list[str]:
        """Return the strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def length(self) -> int | None:
        """Return how many tokens an answer may have; None for the server's default."""
        return self.max_tokens

    def likeliest(self) -> int | None:
        """Return how many of the likeliest tokens are told with each, None for no probabilities."""
        return None


class Rag(_Strict):
    """An index of the server's, which is searched for what the user said last."""

    index: IndexName
    k: int = Field(5, ge=1, le=64)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    documents: list[Text | Document] | None = None
    rag: Rag | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Json | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def length(self) -> int | None:
        """Return how many tokens an answer may have; None for the server's default."""
        return self.max_completion_tokens or self.max_tokens

    def likeliest(self) -> int | None:
        """Return how many of the likeliest tokens are told with each, None for no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextFormat(_Strict):
    """How the text of a response is to look, as `ResponseFormat`, but in one level."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema stands with the type json_schema, and only there")
        return self


class TextOptions(_Strict):
    """The `text` of a response."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseRequest(_Asked):
    """POST /v1/responses, for text. Nothing is kept here: what went before stands in `input`."""

    input: Text | list[ResponseMessage] = Field(min_length=1)
    instructions: Text | None = None
    documents: list[Text | Document] | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None

    def as_chat(self) -> ChatRequest:
        """Return the chat that it stands for."""
        said = [ResponseMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [Message(role=each.role, content=each.content) for each in said]
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        how: ResponseFormat | None = None
        if self.text is not None and self.text.format is not None:
            given = self.text.format
            schema = {"name": given.name or "answer", "schema": given.schema_} if given.schema_ is not None else None
            how = ResponseFormat.model_validate({"type": given.type, "json_schema": schema})
        asked = {name: getattr(self, name) for name in ("documents", *_Asked.model_fields)}
        return ChatRequest.model_validate(
            {**asked, "messages": messages, "max_tokens": self.max_output_tokens, "response_format": how}
        )


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[int] | list[Text]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def likeliest(self) -> int | None:
        """Return how many of the likeliest tokens are told with each, None for no probabilities."""
        return self.logprobs


class ChunksRequest(Salted):
    """POST /v1/chunks: texts whose KV are computed ahead."""

    model: str | None = None
    texts: list[Text] = Field(min_length=1, max_length=4096)
    documents: list[str] | None = None
    system: Text | None = None
    lead: Literal["packaged", "neighbours"] = "packaged"
