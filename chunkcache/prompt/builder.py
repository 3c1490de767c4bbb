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
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from chunkcache.errors import PromptError
from chunkcache.kv import TokenIds
from chunkcache.prompt.prompt import Prompt, PromptChunk, PromptIds, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Answer the question from the passages below."
SEPARATOR = "\n\n"
_LEAD_IN = Path(__file__).with_name("lead_in.txt")
_CHUNKS = "[[the passages stand here]]"
_QUESTION = "[[the question stands here]]"
_ANSWER = "[[the answer stands here]]"
_SYSTEM = "[[the system prompt stands here]]"
_LABEL = "Question: "
_KEPT = 1024  # chunks whose token ids are kept, since those that are asked for come again


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

    def build(self, question: str, chunks: Sequence[Any], system: str | None = None) -> Prompt:
        """Return the prompt for `question` over `chunks`, each of them as in `text_of`.

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
        prompt = PromptIds(prefix)
        self.add_chunks(prompt, chunks)
        prompt.add((*self.encode(label + question.strip()), *tail))
        return prompt.build(len(prefix))

    def add_chunks(self, prompt: PromptIds, chunks: Sequence[Any]) -> None:
        """Append chunks; behind one that joins the next stands only what is tokenised differently in a whole."""
        for chunk in chunks:
            if isinstance(chunk, PromptChunk):
                ids, first, stop, rest = self._part(chunk)
                prompt.add_chunk(ids, first, stop)
                prompt.add(rest)
            else:
                prompt.add_chunk(self.chunk(chunk))

    def frame_texts(self) -> tuple[str, str]:
        """Return what stands before the chunks in a message, and between them and the question."""
        return f"{self._instruction}{SEPARATOR}", _LABEL

    def _part(self, chunk: PromptChunk) -> tuple[TokenIds, int, int, TokenIds]:
        """Return the ids of a chunk, the first and one past the last in the prompt, and what follows them there."""
        ids, text = self.chunk(chunk.text), chunk.text.strip()
        skipped = chunk.skip_chars - (len(chunk.text) - len(chunk.text.lstrip()))
        first, stop = 0, len(ids)
        rest: TokenIds = ()
        if chunk.joins_next:
            alone = self.encode(text)
            stop = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False)))
            rest = alone[stop:]
        if skipped > 0 and self._tokenizer.is_fast:
            with self._lock:
                offsets = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True,
                                          return_offsets_mapping=True).offset_mapping  # fmt: skip
            first = next((index for index, (start, _) in enumerate(offsets) if start >= skipped), stop)
        return ids, min(first, stop), stop, rest

    def prefix(self, system: str | None = None) -> TokenIds:
        """Return the token ids that stand before the first chunk."""
        return self._frame(system)[0]

    def between_turns(self, system: str | None, said: TokenIds) -> TokenIds:
        """Return what stands between the end of an answer and the chunks of the next turn.

        Args:
            system: the system prompt.
            said: the conversation so far; if the answer ends with an end-of-turn token, that is not repeated.

        Raises:
            PromptError: the chat template has no place for a second question.
        """
        ids = self._between(system)
        return ids[1:] if said[-1:] == ids[:1] else ids

    @cached_property
    def lead_in(self) -> TokenIds:
        """The token ids of the lead-in."""
        return self.chunk(self._lead_in) if self._lead_in.strip() else ()

    def chunk(self, text: Any) -> TokenIds:
        """Return the token ids of one chunk, its separator included; `text` as in `text_of`.

        Raises:
            PromptError: the text is empty or not a string.
        """
        return self._stripped_chunk(text_of(text).strip())

    def encode(self, text: str, trusted: bool = False) -> TokenIds:
        """Return the ids of `text`; only in the template's own text are special tokens what they look like."""
        with self._lock:
            ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not trusted).input_ids
        return tuple(ids)

    def _render_frame(self, system: str | None) -> tuple[TokenIds, str, TokenIds]:
        """Return the ids before the chunks, the text between chunks and question, the ids after the question."""
        tokenizer = self._tokenizer
        body = f"{self._instruction}{SEPARATOR}{_CHUNKS}{_LABEL}{_QUESTION}"
        if tokenizer.chat_template:
            asked = {"role": "user", "content": body}
            rendered: Any = self._with_system(system, asked) if system else self.render([asked])
            start: TokenIds = ()
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

    def _render_between(self, system: str | None) -> TokenIds:
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
        """Return what the chat template makes of messages.

        Raises:
            PromptError: it refuses them.
        """
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise PromptError(
                f"the tokenizer's chat template refuses these messages ({error}); "
                "leave out system=, or put its text into instruction="
            ) from error

    def leading_special_tokens(self) -> TokenIds:
        """Return what the tokenizer puts before any plain text, such as BOS."""
        first, *_ = self.encode("x")
        ids = tuple(self._tokenizer("x").input_ids)
        return ids[: ids.index(first)] if first in ids else ()
