"""From the messages and documents of a request to what `CachedLLM.chat` takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from chunkcache.prompt import PromptChunk
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.protocol import Document, Message, TextPart
from chunkcache.serve.tool_fields import ToolCall


def messages_of(messages: Sequence[Message], documents: Sequence[str | Document] = ()) -> list[dict[str, Any]]:
    """Return messages as `CachedLLM.chat` takes them, the documents with the last that the user said.

    Raises:
        HTTPError: there are documents, and the user said nothing.
    """
    turns = [_turn(message) for message in messages]
    if documents:
        asked = next((turn for turn in reversed(turns) if turn["role"] == "user"), None)
        if asked is None:
            raise HTTPError(
                400, "documents stand with what the user asks; pass a message of the user", param="messages"
            )
        said = [asked["content"]] if isinstance(asked["content"], str) else asked["content"]
        asked["content"] = [*(PromptChunk(passage_of(each)) for each in documents), *said]
    return turns


def passage_of(document: str | Document) -> str:
    """Return the text of a document as it stands in a prompt."""
    return document if isinstance(document, str) else document.passage()


def name_of(document: str | Document) -> str | None:
    """Return what a client calls a document."""
    return None if isinstance(document, str) else document.id or document.title


def _turn(message: Message) -> dict[str, Any]:
    content: str | list[str | PromptChunk] = ""
    if isinstance(message.content, str):
        content = message.content
    elif message.content is not None:
        content = _parts(message.content)
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.role == "tool":
        turn.update(tool_call_id=message.tool_call_id, name=message.name)
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    """Return a call as chat templates expect it: with arguments that are read."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise HTTPError(400, "the arguments of a tool call are no JSON object", param="messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _parts(parts: Sequence[TextPart]) -> list[str | PromptChunk]:
    """Return parts with those that are chunks as such; they stay in their place where text stands before one."""
    texts = [index for index, part in enumerate(parts) if part.prompt_cache_breakpoint is None and part.text.strip()]
    return [
        part.text
        if part.prompt_cache_breakpoint is None
        else PromptChunk(part.text, in_place=bool(texts) and texts[0] < index)
        for index, part in enumerate(parts)
    ]
