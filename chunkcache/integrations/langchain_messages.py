"""LangChain's messages as `llm.chat` takes them: texts, and passages that are cached as chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage

from chunkcache.errors import InputError
from chunkcache.prompt.messages import PromptChunk

_ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}
_UNSAID = ("reasoning", "thinking", "tool_call", "tool_use", "invalid_tool_call")  # what a model did not say aloud


def document_block(document: Document) -> dict[str, Any]:
    """Return a content block of a user message that holds a Document, the text of which is cached as one chunk."""
    return {"type": "document", "document": document}


def as_chat(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Return LangChain's messages as `llm.chat` takes them; raises InputError for what is not text."""
    return [{"role": _role(message), "content": _content(message)} for message in messages]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    kind = message.type.removesuffix("MessageChunk").lower()
    if kind not in _ROLES:
        raise InputError(f"a message is of type {message.type!r}: use system, human, ai, tool, or a ChatMessage")
    return _ROLES[kind]


def _content(message: BaseMessage) -> str | list[str | PromptChunk]:
    if isinstance(message.content, str):
        return message.content
    unsaid = _UNSAID if isinstance(message, AIMessage) else ()
    parts = [_part(block) for block in message.content if isinstance(block, str) or block.get("type") not in unsaid]
    return [part for part in parts if not isinstance(part, PromptChunk) or part.text.strip()]


def _part(block: str | dict[Any, Any]) -> str | PromptChunk:
    """Return one content block as text, or as a text that is cached."""
    if isinstance(block, str):
        return block
    kind = block.get("type")
    if kind == "non_standard" and isinstance(block.get("value"), dict):  # so LangChain wraps what it does not know
        return _part(block["value"])
    if kind == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind == "text-plain" and isinstance(block.get("text"), str):
        return PromptChunk(block["text"])
    if kind == "document" and isinstance(block.get("document"), Document):
        return PromptChunk(block["document"].page_content)
    raise InputError(
        f"a content block of type {kind!r} with {sorted(map(str, block))} cannot be read: this model reads text; "
        "pass strings, blocks of type 'text' or 'text-plain' with a 'text', or document_block(document)"
    )
