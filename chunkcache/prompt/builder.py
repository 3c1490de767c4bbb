"""From texts to token ids: where the system prompt, the chunks and the question stand in a prompt.

A chat template is rendered once with marks in the places of chunks and question, and cut at the marks. Each
span is tokenised on its own, chunks one by one, so a chunk's token ids never depend on what stands beside it,
and full prefill of the joined ids is the same prompt. Text from outside is never read as special tokens: a
document that contains an end-of-turn mark cannot end the turn.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from chunkcache.errors import PromptError
from chunkcache.kv import ChunkKV

INSTRUCTION = "Answer the question from the passages below."
SEPARATOR = "\n\n"
_LEAD_IN = Path(__file__).with_name("lead_in.txt")
_CHUNKS = "[[the passages stand here]]"
_QUESTION = "[[the question stands here]]"
_ANSWER = "[[the answer stands here]]"
_SYSTEM = "[[the system prompt stands here]]"
_LABEL = "Question: "
_KEPT = 1024  # chunks whose token ids are kept, since those that are asked for come again


@dataclass(frozen=True)
class PromptChunk:
    """A retrieved text that is cached as one chunk, of which a part may be left out of the prompt.

    Attributes:
        text: the whole chunk.
        skip_chars: characters of it that are left out of the prompt, when they have been said before. A slow
            tokenizer, which does not say where its tokens are, leaves nothing out.
        joins_next: whether the next one goes on where this one ends, so that nothing stands between them.
    """

    text: str
    skip_chars: int = 0
    joins_next: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt in its three parts: prefix, chunks, question.

    Attributes:
        prefix: what stands before the chunks, and is likely to stand there again.
        chunks: each chunk, as it is stored.
        question: all that stands behind them.
        head: KV of the first tokens of the prefix, if they are those of a conversation that goes on.
        behind: what the chunks were computed behind, if it is not the prefix.
        gaps: what stands right before each chunk; () if nothing does.
        parts: first and last + 1 index of what stands in the prompt of each chunk; () for the whole of each.
    """

    prefix: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    question: tuple[int, ...]
    head: ChunkKV | None = None
    behind: tuple[int, ...] | None = None
    gaps: tuple[tuple[int, ...], ...] = ()
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def opening(self) -> tuple[int, ...]:
        """What the chunks were computed behind, a lead-in apart."""
        return self.prefix if self.behind is None else self.behind

    @cached_property
    def placed(self) -> tuple[Placed, ...]:
        """Where each chunk stands."""
        placed, end = [], len(self.prefix)
        for index, chunk in enumerate(self.chunks):
            first, last = self.parts[index] if self.parts else (0, len(chunk))
            gap = self.gaps[index] if self.gaps else ()
            placed.append(Placed(chunk, first, last, gap, end + len(gap)))
            end = placed[-1].end
        return tuple(placed)

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids in order."""
        between = (token for each in self.placed for token in (*each.gap, *each.standing))
        return (*self.prefix, *between, *self.question)


@dataclass(frozen=True)
class Placed:
    """A chunk of a prompt: tokens `first` to `last` of it stand at position `start`, behind `gap`."""

    chunk: tuple[int, ...]
    first: int
    last: int
    gap: tuple[int, ...]
    start: int

    @property
    def standing(self) -> tuple[int, ...]:
        """The token ids of it that stand in the prompt."""
        return self.chunk[self.first : self.last]

    @property
    def end(self) -> int:
        """Position right after the last of them."""
        return self.start + self.last - self.first


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
        tokenizer: its chat template is used when it has one, plain text otherwise.
        instruction: stands before the chunks in every prompt, part of the prefix.
        lead_in: stands before a chunk while it is computed ahead, for policies that want it; no part of any prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, instruction: str = INSTRUCTION, lead_in: str | None = None
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # reading special tokens or not is a switch inside it
        self._instruction = instruction
        self._lead_in = _LEAD_IN.read_text(encoding="utf-8") if lead_in is None else lead_in
        self._lock = threading.Lock()
        self._frame = lru_cache(maxsize=64)(self._render_frame)
        self._between = lru_cache(maxsize=64)(self._render_between)
        self._stripped_chunk = lru_cache(maxsize=_KEPT)(lambda text: self.encode(text + SEPARATOR))

    def build(self, question: str, chunks: Sequence[str | PromptChunk], system: str | None = None) -> Prompt:
        """Return the prompt for `question` over `chunks`.

        Raises:
            PromptError: question or a chunk is empty or not one string, or the template cannot be split.
        """
        if not isinstance(question, str):
            raise PromptError(
                f"the question is a {type(question).__name__}; chunkcache serves one sequence at a time: "
                "pass one string, and call again for the next"
            )
        if not question.strip():
            raise PromptError(f"the question is empty ({question!r}); pass the text to be answered")
        if isinstance(chunks, str):
            raise PromptError(f"chunks is one string of {len(chunks)} characters; pass a list of texts")
        prefix, label, tail = self._frame(system)
        asked = (*self.encode(label + question.strip()), *tail)
        if not any(isinstance(chunk, PromptChunk) for chunk in chunks):
            return Prompt(prefix, tuple(map(self.chunk, chunks)), asked)  # type: ignore[arg-type]
        passages = [chunk if isinstance(chunk, PromptChunk) else PromptChunk(chunk) for chunk in chunks]
        ids, parts, gaps = zip(*map(self.part, passages), strict=True)
        gaps = ((), *gaps)  # what is over of one passage stands before the next
        return Prompt(prefix, ids, (*gaps[-1], *asked), gaps=gaps[:-1], parts=parts)

    def frame_texts(self) -> tuple[str, str]:
        """Return what stands before the chunks in a message, and between them and the question."""
        return f"{self._instruction}{SEPARATOR}", _LABEL

    def part(self, passage: PromptChunk) -> tuple[tuple[int, ...], tuple[int, int], tuple[int, ...]]:
        """Return the ids of a passage's chunk, which of them stand in the prompt, and what stands right behind them.

        Behind them is only what is tokenised differently for want of a separator.
        """
        ids, text = self.chunk(passage.text), passage.text.strip()
        begin = passage.skip_chars - (len(passage.text) - len(passage.text.lstrip()))
        first, last = 0, len(ids)
        over: tuple[int, ...] = ()
        if passage.joins_next:
            alone = self.encode(text)
            last = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False)))
            over = alone[last:]
        if begin > 0 and self._tokenizer.is_fast:
            with self._lock:
                spans = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                                        return_offsets_mapping=True).offset_mapping  # fmt: skip
            first = next((index for index, (start, _) in enumerate(spans) if start >= begin), last)
        return ids, (min(first, last), last), over

    def prefix(self, system: str | None = None) -> tuple[int, ...]:
        """Return the token ids that stand before the first chunk."""
        return self._frame(system)[0]

    def between_turns(self, system: str | None, said: tuple[int, ...]) -> tuple[int, ...]:
        """Return what stands between the end of an answer and the chunks of the next turn.

        Args:
            system: the system prompt.
            said: the conversation so far; if the answer ends with an end-of-turn token, that is not repeated.

        Raises:
            PromptError: the chat template has no place for a second question.
        """
        ids = self._between(system)
        return ids[1:] if said[-1:] == ids[:1] else ids

    def lead_in(self, tokens: int) -> tuple[int, ...]:
        """Return the last `tokens` token ids of the lead-in, or all if it has no more."""
        return self._lead_in_ids[-tokens:] if tokens else ()

    @cached_property
    def _lead_in_ids(self) -> tuple[int, ...]:
        return self.chunk(self._lead_in) if self._lead_in.strip() else ()

    def chunk(self, text: str) -> tuple[int, ...]:
        """Return the token ids of one chunk, its separator included.

        Raises:
            PromptError: the text is empty or not a string.
        """
        if not isinstance(text, str) or not text.strip():
            kind = "empty" if isinstance(text, str) else f"a {type(text).__name__}"
            raise PromptError(f"a chunk is {kind}; every chunk must be a string with text in it")
        return self._stripped_chunk(text.strip())

    def encode(self, text: str, trusted: bool = False) -> tuple[int, ...]:
        """Return the ids of `text`; only in the template's own text are special tokens what they look like."""
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not trusted).input_ids
        return tuple(ids)

    def _render_frame(self, system: str | None) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
        """Return the ids before the chunks, the text between chunks and question, the ids after the question."""
        tokenizer = self._tokenizer
        body = f"{self._instruction}{SEPARATOR}{_CHUNKS}{_LABEL}{_QUESTION}"
        if tokenizer.chat_template:
            asked = {"role": "user", "content": body}
            rendered: Any = self._with_system(system, asked) if system else self.render([asked])
            start: tuple[int, ...] = ()
        else:
            rendered = f"{_SYSTEM}{SEPARATOR}{body}\nAnswer:" if system else f"{body}\nAnswer:"
            start = self.leading_special_tokens()
        before, chunks_mark, rest = rendered.partition(_CHUNKS)
        label, question_mark, after = rest.partition(_QUESTION)
        if not (chunks_mark and question_mark) or _CHUNKS in rest or _QUESTION in after:
            raise PromptError(
                "the tokenizer's chat template does not keep the user's message in one piece, so chunks have no "
                "place in it; set tokenizer.chat_template to one that does, or to None for plain text"
            )
        opening, _, rest = before.partition(_SYSTEM)
        prefix = (*start, *self.encode(opening, trusted=True))
        if system:
            prefix += (*self.encode(self._trimmed(system)), *self.encode(rest, trusted=True))
        return prefix, label, self.encode(after, trusted=True)

    def _with_system(self, system: str, asked: dict[str, str]) -> str:
        """Return what the template makes of a user message and a mark in the place of the system prompt."""
        rendered = str(self.render([{"role": "system", "content": _SYSTEM}, asked]))
        if _SYSTEM not in rendered.partition(_CHUNKS)[0]:
            raise PromptError(
                "the tokenizer's chat template leaves out the system prompt, or puts it behind the question; "
                "leave out system=, or put its text into instruction="
            )
        return rendered

    def _trimmed(self, system: str) -> str:
        """Return a system prompt as the template writes it, with the space round it or without."""
        if not self._tokenizer.chat_template:
            return system
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _CHUNKS}]
        return system if system in self.render(messages) else system.strip()

    def _render_between(self, system: str | None) -> tuple[int, ...]:
        body = f"{self._instruction}{SEPARATOR}{_CHUNKS}"
        if not self._tokenizer.chat_template:
            return self.encode(f"{SEPARATOR}{body}".partition(_CHUNKS)[0], trusted=True)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": body},
        ]
        rendered: Any = self.render(messages)
        _, answer_mark, rest = rendered.partition(_ANSWER)
        between, chunks_mark, _ = rest.partition(_CHUNKS)
        if not (answer_mark and chunks_mark):
            raise PromptError(
                "the tokenizer's chat template keeps no place for a second question; ask it in a new conversation"
            )
        return self.encode(between, trusted=True)

    def render(self, messages: list[dict[str, str]]) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise PromptError(
                f"the tokenizer's chat template refuses these messages ({error}); "
                "leave out system=, or put its text into instruction="
            ) from error

    def leading_special_tokens(self) -> tuple[int, ...]:
        """Return what the tokenizer puts before any plain text, such as BOS."""
        first, *_ = self.encode("x")
        ids = tuple(self._tokenizer("x").input_ids)
        return ids[: ids.index(first)] if first in ids else ()
