"""From chat messages to token ids: an ordinary conversation, in which cached chunks are found by their text.

The chat template is rendered with a mark in the place of each message's text. What is between the marks is the
template's own; the texts are tokenised apart from it, and in them the known chunks apart from the rest, so that a
chunk has the token ids that its KV were computed from. As everywhere, text from outside is never read as special
tokens.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from chunkcache.errors import PromptError
from chunkcache.kv import TokenIds
from chunkcache.prompt.builder import SEPARATOR, PromptBuilder
from chunkcache.prompt.known_texts import FoundText
from chunkcache.prompt.prompt import Prompt, PromptChunk, PromptIds

__all__ = ["Message", "MessageBuilder", "PromptChunk"]

logger = logging.getLogger("chunkcache")

Message = Mapping[str, Any]  # role, and content: a string, or a list of strings and passages

_MARK = "[[message {} stands here]]"
_MARKS = re.compile(r"\[\[message (\d+) stands here]]")
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)
_BLOCK = 16  # tokens; beginnings that differ in fewer are not worth an entry of their own each
_BEGINNINGS = 16  # of the last prompts


class _ChatIds(PromptIds):
    """Token ids of a conversation.

    Attributes:
        system: the system prompt that its first chunk was computed after.
        opening: how many tokens stood there before the assistant first spoke, if no chunk came before that.
    """

    def __init__(self, ids: Sequence[int], system: str | None) -> None:
        super().__init__(ids)
        self.system = system
        self.opening: int | None = None


class TextFinder(Protocol):
    """Finds known chunks in a text."""

    def find_text(self, content: str) -> Sequence[FoundText]:
        """Return the known texts in `content`, in order and without overlap."""


class MessageBuilder:
    """Builds prompts from messages.

    Args:
        prompts: builds the prompts of questions; knows the tokenizer.
        known: the texts that are looked for in messages.
        template: the tokenizer's chat template; None for none. Without one the texts stand below one another.
    """

    def __init__(self, prompts: PromptBuilder, known: TextFinder, template: Any) -> None:
        self._prompts = prompts
        self._known = known
        self._template = template
        self._beginnings = _Beginnings()
        self._warn_once = lru_cache(maxsize=1)(logger.warning)

    def build(self, messages: Sequence[Message]) -> Prompt:
        """Return the prompt of a conversation that the assistant is to go on with.

        A user message with passages reads as a question over chunks does in `PromptBuilder.build`; if there is no
        other but a system message, it is that prompt.

        Raises:
            PromptError: there are no messages, one has no role or other content than text and passages, there is
                nothing but white space in them, or the chat template refuses them.
        """
        turns = [_Turn.of(message, index) for index, message in enumerate(messages)]
        if not any(turn.text.strip() or turn.chunks for turn in turns):
            raise PromptError(f"{len(turns)} messages have no text; pass at least one with some")
        system = turns[0].text if turns[0].role == "system" and not turns[0].chunks else None
        *before, asked = turns
        if asked.chunks and asked.role == "user" and len(before) == (system is not None):
            try:
                return self._prompts.build(asked.text, asked.chunks, system)
            except PromptError:
                if system is None:
                    raise  # else the template may take no system message, and it is folded below
        ids = _ChatIds([] if self._template else self._prompts.leading_special_tokens(), system)
        for template, turn in self._rendered(turns):
            ids.add(self._prompts.encode(template, trusted=True))
            if turn is not None:
                if turn.role == "assistant" and ids.opening is None and not ids.spans:
                    ids.opening = len(ids.ids)
                self._add(ids, turn)
        return self._prompt(ids)

    def _prompt(self, ids: _ChatIds) -> Prompt:
        """Divide what stands before the first chunk into what is likely to stand there again, and the rest."""
        before = tuple(ids.ids[: ids.spans[0].start] if ids.spans else ids.ids)
        prefix = self._beginnings.common(before[: ids.opening])
        if not ids.spans:
            return ids.build(prefix if prefix < len(before) else 0)
        try:
            context = self._prompts.prefix(ids.system)
        except PromptError:  # the template takes no system message: chunks cannot have been computed after one
            context = self._prompts.prefix(None)
        return ids.build(prefix, context)

    def _add(self, ids: _ChatIds, turn: _Turn) -> None:
        if turn.chunks:
            if not turn.text.strip():
                raise PromptError(f"a message has {len(turn.chunks)} chunks and no question; pass text with them")
            frame, label = self._prompts.frame_texts()
            ids.add(self._prompts.encode(turn.before + frame))
            self._prompts.add_chunks(ids, turn.chunks)
            ids.add(self._prompts.encode(label + turn.text.strip()))
            return
        end = 0
        for known in self._known.find_text(turn.text):
            ids.add(self._prompts.encode(turn.text[end : known.start]))
            if not ids.spans:
                ids.system = known.system
            separated = turn.text.startswith(SEPARATOR, known.end)
            self._prompts.add_chunks(ids, [PromptChunk(known.text, joins_next=not separated)])
            end = known.end + (len(SEPARATOR) if separated else 0)
        ids.add(self._prompts.encode(turn.text[end:]))

    def _rendered(self, turns: Sequence[_Turn]) -> list[tuple[str, _Turn | None]]:
        """Return the template's own text and the turn behind it, in order; after the last there is none."""
        if not self._template:
            between = [("" if index == 0 else SEPARATOR, turn) for index, turn in enumerate(turns)]
            return [*between, ("", None)]
        try:
            rendered = self._render(turns)
        except PromptError:
            folded = _folded(turns)  # a template may want user and assistant in turn, and no system message
            if folded == turns:
                raise
            turns, rendered = folded, self._render(folded)
        whole = self._prompts.render([{"role": turn.role, "content": turn.text} for turn in turns])
        for changed in (turns, [t.stripped() for t in turns], [t.stripped().without_thoughts() for t in turns]):
            texts = [turn.text for turn in changed]
            if _MARKS.sub(lambda mark: texts[int(mark[1])], rendered) == whole:  # noqa: B023 - used at once
                break
        else:
            changed = turns
            self._warn_once("the chat template rewrites some messages; they are taken as they were given")
        parts = _MARKS.split(rendered)
        pairs = zip(parts[::2], [*map(int, parts[1::2]), None], strict=True)
        return [(text, None if index is None else changed[index]) for text, index in pairs]

    def _render(self, turns: Sequence[_Turn]) -> str:
        """Return what the template makes of marks in the place of the texts."""
        marked = [{"role": turn.role, "content": _MARK.format(index)} for index, turn in enumerate(turns)]
        rendered = str(self._prompts.render(marked))
        if [int(index) for index in _MARKS.findall(rendered)] != list(range(len(turns))):
            raise PromptError(
                f"the tokenizer's chat template does not keep these messages apart and in order "
                f"({', '.join(turn.role for turn in turns)}); leave out those it does not know"
            )
        return rendered


@dataclass(frozen=True)
class _Turn:
    """One message: its text, the passages that stand before it, and what stands before these."""

    role: str
    text: str
    chunks: tuple[PromptChunk, ...] = ()
    before: str = ""

    @classmethod
    def of(cls, message: Message, index: int) -> _Turn:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"message {index} has no role; pass mappings with 'role' and 'content'")
        if not re.fullmatch(r"[\w-]+", message["role"]):  # templates write it between special tokens
            raise PromptError(f"message {index} has the role {message['role']!r}; pass one word, such as 'user'")
        content = message.get("content")
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, str | PromptChunk) for part in parts):
            kinds = type(content).__name__ if not isinstance(parts, Sequence) else [type(p).__name__ for p in parts]
            raise PromptError(
                f"the content of message {index} is {kinds}; pass text, or a list of texts and passages"
            )
        text = "\n".join(part for part in parts if isinstance(part, str))
        return cls(message["role"], text, tuple(part for part in parts if isinstance(part, PromptChunk)))

    def stripped(self) -> _Turn:
        return replace(self, text=self.text.strip())

    def without_thoughts(self) -> _Turn:
        """Return it as templates of reasoning models render what the assistant said before."""
        return replace(self, text=_THOUGHTS.sub("", self.text)) if self.role == "assistant" else self


def _folded(turns: Sequence[_Turn]) -> list[_Turn]:
    """Return the turns with system messages made part of what the user says next, and equal roles in a row joined."""
    folded: list[_Turn] = []
    for turn in (replace(t, role="user") if t.role == "system" else t for t in turns):
        last = folded[-1] if folded else None
        if last is not None and last.role == turn.role and not last.chunks:
            said = f"{last.text.strip()}{SEPARATOR}"
            folded[-1] = replace(turn, before=said) if turn.chunks else replace(turn, text=said + turn.text.strip())
        else:
            folded.append(turn)
    return folded


class _Beginnings:
    """How the last prompts began: what several have in common is worth being stored, and nothing else is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: deque[TokenIds] = deque(maxlen=_BEGINNINGS)

    def common(self, ids: TokenIds) -> int:
        """Return how many of the first tokens another prompt began with, in whole blocks or all of them."""
        with self._lock:
            common = max((_agreeing(ids, seen) for seen in self._seen), default=0)
            if ids not in self._seen:
                self._seen.append(ids)
        return len(ids) if common == len(ids) else common - common % _BLOCK


def _agreeing(ids: TokenIds, others: TokenIds) -> int:
    for count, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return count
    return min(len(ids), len(others))
