"""From chat messages to token ids: an ordinary conversation, in which cached chunks are found by their text.

The texts of the messages are looked through for known chunks, which get the token ids that their KV were computed
from; all between them is tokenised with the template's own text. As everywhere, text from outside is never read as
special tokens.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from chunkcache.errors import PromptError
from chunkcache.kv import TokenIds
from chunkcache.prompt.builder import ANSWER, CHUNKS, SEPARATOR, PromptBuilder
from chunkcache.prompt.known_texts import FoundText
from chunkcache.prompt.prompt import Prompt, PromptChunk, PromptIds, common, text_of
from chunkcache.prompt.template import MessagesRefusedError, Options, Rendered

__all__ = ["Message", "MessageBuilder", "PromptChunk", "Turn"]

Message = Mapping[str, Any]  # role, and content: a string, or a list of strings and passages

_FIELDS = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}  # that the template gets, by role
_BLOCK = 16  # tokens; beginnings that differ in fewer are not worth an entry of their own each
_BEGINNINGS = 16  # of the last prompts
_REWRITTEN = (
    "the tokenizer's chat template rewrites a message with passages, so that these have no place in it; set "
    "tokenizer.chat_template to one that does not, or to None for plain text"
)


class TextFinder(Protocol):
    """Finds known chunks in a text."""

    def find_text(self, content: str) -> Sequence[FoundText]:
        """Return the known texts in `content`, in order and without overlap."""


class MessageBuilder:
    """Builds prompts from messages.

    Args:
        prompts: builds the prompts of questions; knows the tokenizer and its template. Without a template the texts
            stand below one another.
        known: the texts that are looked for in messages.
    """

    def __init__(self, prompts: PromptBuilder, known: TextFinder) -> None:
        self.prompts = prompts
        self._known = known
        self._beginnings = _Beginnings()

    def build(self, messages: Sequence[Message], template_options: Options | None = None) -> Prompt:
        """Return the prompt of a conversation that the assistant is to go on with.

        A user message with passages reads as a question over chunks does in `PromptBuilder.build`; if there is no
        other but a system message, it is that prompt.

        Raises:
            PromptError: there are no messages, one has no role or other content than text and passages, there is
                nothing but white space in them, or the chat template refuses them.
        """
        turns = [Turn.of(message, index) for index, message in enumerate(messages)]
        if not any(turn.text.strip() or turn.chunks for turn in turns):
            raise PromptError(f"{len(turns)} messages have no text; pass at least one with some")
        return self.of_turns(turns, template_options)

    def raw(self, text: str) -> Prompt:
        """Return the prompt that is `text`, without a template.

        Raises:
            PromptError: there is nothing but white space in it.
        """
        if not text.strip():
            raise PromptError(f"the prompt is empty ({text!r}); pass the text to be continued")
        ids, found = self.prompts.start(raw=True), _Found(None)
        self._add(self.prompts, ids, Turn("user", text), found)
        ids.flush()
        return self._prompt(self.prompts, ids, found)

    def of_turns(self, turns: Sequence[Turn], template_options: Options | None = None) -> Prompt:
        """Return the prompt of turns; see `build`."""
        prompts = self.prompts.with_options(template_options)
        system = turns[0].text if turns[0].role == "system" and not turns[0].chunks else None
        *before, asked = turns
        if asked.is_framed and asked.role == "user" and len(before) == (system is not None):
            try:
                return prompts.build(asked.text, asked.chunks, system)
            except MessagesRefusedError:
                if system is None:
                    raise  # else the template may take no system message, and it is folded below
        ids = prompts.start()
        found = _Found(system)
        for own, turn in self._placed(prompts, turns):
            prompts.add_own(ids, own)
            if turn is not None:
                if turn.role == "assistant" and found.opening is None and not ids.spans:
                    found.opening = ids.mark()
                self._add(prompts, ids, turn, found)
        ids.flush()
        return self._prompt(prompts, ids, found)

    def _prompt(self, prompts: PromptBuilder, ids: PromptIds, found: _Found) -> Prompt:
        """Divide what stands before the first chunk into what is likely to stand there again, and the rest."""
        before = tuple(ids.ids[: ids.spans[0].start] if ids.spans else ids.ids)
        prefix = self._beginnings.common(before[: found.opening() if found.opening else None])
        if not ids.spans:
            return ids.build(prefix if prefix < len(before) else 0)
        try:
            context = prompts.prefix(found.system)
        except MessagesRefusedError:  # no system message is taken: chunks cannot have been computed after one
            context = prompts.prefix(None)
        return ids.build(prefix, context)

    def _add(self, prompts: PromptBuilder, ids: PromptIds, turn: Turn, found: _Found) -> None:
        if turn.token_ids:
            ids.add(turn.token_ids)
            return
        if turn.is_framed:
            if not turn.text.strip():
                raise PromptError(f"a message has {len(turn.chunks)} chunks and no question; pass text with them")
            frame, label = prompts.frame_texts()
            ids.text((turn.before + frame).lstrip() if turn.trimmed else turn.before + frame, False)
            prompts.add_chunks(ids, turn.chunks)
            ids.text(label + turn.text.strip(), False)
            return
        end = 0
        for known in self._chunks_in(turn, found.system):
            ids.text(turn.text[end : known.start], False)
            if not ids.spans:
                found.system = known.system
            separated = turn.text.startswith(SEPARATOR, known.end)
            prompts.add_chunks(ids, [PromptChunk(known.text, joins_next=not separated)])
            end = known.end + (len(SEPARATOR) if separated else 0)
        ids.text(turn.text[end:], False)

    def _chunks_in(self, turn: Turn, system: str | None) -> list[FoundText]:
        """Return the chunks in the text of a turn, in order: those that it says it has, and known ones between."""
        if not turn.inside:
            return list(self._known.find_text(turn.text))
        found: list[FoundText] = []
        end = 0
        for text in turn.inside:
            start = turn.text.find(text, end)
            if start < 0:
                raise PromptError(_REWRITTEN)
            between = self._known.find_text(turn.text[end:start])
            found += [replace(known, start=known.start + end) for known in between]
            found.append(FoundText(start, text, "", system))
            end = start + len(text)
        return found + [replace(known, start=known.start + end) for known in self._known.find_text(turn.text[end:])]

    def _placed(self, prompts: PromptBuilder, turns: Sequence[Turn]) -> list[tuple[str, Turn | None]]:
        """Return the template's own text and the turn behind it, in order; after the last there is none."""
        if not prompts.template:
            ends = [ANSWER if turn.is_framed else SEPARATOR for turn in turns]
            last = ANSWER if turns[-1].is_framed else ""
            return [*zip(["", *ends], turns, strict=False), (last, None)]
        frame = prompts.frame_texts()
        try:
            rendered, texts = _rendered(prompts, turns)
        except MessagesRefusedError:
            folded = _folded(turns)  # a template may want user and assistant in turn, and no system message
            if folded == turns:
                raise
            turns = folded
            rendered, texts = _rendered(prompts, turns)
        spoken = [turn for turn in turns if not turn.is_fixed]
        written = [turn.written(text, *frame) for turn, text in zip(spoken, texts, strict=True)]
        return [(own, None if index is None else written[index]) for own, index in rendered]


@dataclass
class _Found:
    """What is known of a conversation while it is put together.

    Attributes:
        system: the system prompt that its first chunk was computed after.
        opening: says how many tokens stood there before the assistant first spoke, if no chunk came before that.
    """

    system: str | None
    opening: Callable[[], int] | None = None


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: who speaks.
        text: what is said.
        chunks: the passages that stand before it.
        inside: the passages that stand in its text, each where it was given.
        before: what stands before these.
        framed: whether it reads as a question over passages even if there are none.
        trimmed: whether the template leaves out the space round it.
        token_ids: those that an answer was decoded as, where it stands in the prompt as it was.
        fields: what else the template gets of it: `tool_calls`, or what a tool's answer belongs to.
    """

    role: str
    text: str
    chunks: tuple[Any, ...] = ()
    inside: tuple[str, ...] = ()
    before: str = ""
    framed: bool = False
    trimmed: bool = False
    token_ids: TokenIds = ()
    fields: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, message: Message, index: int) -> Turn:
        """Return the turn of a message.

        Raises:
            PromptError: it is none.
        """
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"message {index} has no role; pass mappings with 'role' and 'content'")
        if not re.fullmatch(r"[\w-]+", message["role"]):  # templates write it between special tokens
            raise PromptError(f"message {index} has the role {message['role']!r}; pass one word, such as 'user'")
        fields = {name: message[name] for name in _FIELDS.get(message["role"], ()) if message.get(name)}
        content = message.get("content")
        if content is None and fields:
            content = ""
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, str | PromptChunk) for part in parts):
            kinds = type(content).__name__ if not isinstance(parts, Sequence) else [type(p).__name__ for p in parts]
            raise PromptError(
                f"the content of message {index} is {kinds}; pass text, or a list of texts and passages"
            )
        text = "\n".join(part for part in parts if isinstance(part, str))
        chunks = tuple(part for part in parts if isinstance(part, PromptChunk))
        if any(chunk.in_place for chunk in chunks):
            return cls(message["role"], _joined(parts), inside=tuple(text_of(each.text).strip() for each in chunks))
        if "tool_calls" in fields and chunks:
            raise PromptError(f"message {index} has tool_calls and passages; pass the passages in another")
        return cls(message["role"], text, chunks, fields=fields)

    @property
    def is_fixed(self) -> bool:
        """Whether the template writes it as it likes: it has tool calls, and no chunks are looked for in it."""
        return "tool_calls" in self.fields

    @property
    def is_framed(self) -> bool:
        """Whether it reads as a question over passages."""
        return self.framed or bool(self.chunks)

    def whole(self, frame: str, label: str) -> str:
        """Return the message as the template gets it, with a mark in the place of its passages."""
        return f"{self.before}{frame}{CHUNKS}{label}{self.text.strip()}" if self.is_framed else self.text

    def written(self, text: str, frame: str, label: str) -> Turn:
        """Return the turn as the template writes it.

        Args:
            text: what the template makes of `whole`.
            frame: what stands before passages.
            label: what stands behind them.

        Raises:
            PromptError: there are passages, and the template does not keep the text as it is.
        """
        given = self.whole(frame, label)
        if text == given:
            return self
        if not self.is_framed:
            return replace(self, text=text, token_ids=())
        if text != given.strip():
            raise PromptError(_REWRITTEN)
        return replace(self, trimmed=True)


def _rendered(prompts: PromptBuilder, turns: Sequence[Turn]) -> tuple[Rendered, list[str]]:
    """Return what `ChatTemplate.place` does of turns."""
    frame = prompts.frame_texts()
    heads = [{"role": t.role, **t.fields, **({"content": t.text} if t.is_fixed else {})} for t in turns]
    return prompts.template.place([(t.role, t.whole(*frame)) for t in turns if not t.is_fixed], heads)


def _joined(parts: Sequence[str | PromptChunk]) -> str:
    """Return the text of a message whose passages stand in it: an empty line behind each, as a chunk is stored."""
    pieces = [f"{part}\n" if isinstance(part, str) else f"{part.text.strip()}{SEPARATOR}" for part in parts]
    last = pieces[-1]
    return "".join([*pieces[:-1], last.removesuffix("\n") if isinstance(parts[-1], str) else last.rstrip()])


def _folded(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with system messages made part of what the user says next, and equal roles in a row joined."""
    folded: list[Turn] = []
    for turn in (replace(t, role="user") if t.role == "system" else t for t in turns):
        last = folded[-1] if folded else None
        if last is not None and last.role == turn.role and not (last.is_framed or last.fields or turn.fields):
            said = f"{last.text.strip()}{SEPARATOR}"
            folded[-1] = (
                replace(turn, before=said)
                if turn.is_framed
                else replace(turn, text=said + turn.text.strip(), inside=(*last.inside, *turn.inside))
            )
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
            shared = max((common(ids, seen) for seen in self._seen), default=0)
            if ids not in self._seen:
                self._seen.append(ids)
        return len(ids) if shared == len(ids) else shared - shared % _BLOCK
