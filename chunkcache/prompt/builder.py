"""From texts to token ids: where the system prompt, the chunks and the question stand in a prompt.

What stands between two chunks is tokenised as one text, and chunks one by one, so that a chunk's token ids never
depend on what stands beside it; full prefill of the joined ids is the same prompt. See `chunkcache.tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkcache.errors import PromptError
from chunkcache.kv import TokenIds
from chunkcache.prompt.prompt import Prompt, PromptChunk, PromptIds, text_of
from chunkcache.prompt.template import ChatTemplate, Options
from chunkcache.tokens import Piece, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Answer the question from the passages below."
SEPARATOR = "\n\n"
_LEAD_IN = Path(__file__).with_name("lead_in.txt")
CHUNKS = "[[the passages stand here]]"  # a mark
ANSWER = "\nAnswer:"  # where there is no template
_LABEL = "Question: "
_KEPT = 1024  # chunks whose token ids are kept, since those that are asked for come again


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
        tokenizer: its chat template is used when it has one, plain text otherwise. A template that is set later is
            used from then on.
        instruction: stands before the chunks in every prompt, part of the prefix.
        lead_in: stands before a chunk while it is computed ahead, for policies that want it; no part of any prompt.
        template_options: keywords for the chat template, such as `enable_thinking`.

    Attributes:
        template: the chat template.

    Raises:
        PromptError: an option is not served, or the tokenizer has several templates and none is chosen.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str = INSTRUCTION,
        lead_in: str | None = None,
        template_options: Options | None = None,
    ) -> None:
        self._tokens = Tokens(tokenizer)
        self.template = ChatTemplate(tokenizer, self._tokens, template_options)
        self._instruction = instruction
        self._lead_in = _LEAD_IN.read_text(encoding="utf-8") if lead_in is None else lead_in
        self._stripped_chunk = lru_cache(maxsize=_KEPT)(lambda text: self._tokens.text(text + SEPARATOR, True))

    def with_options(self, template_options: Options | None) -> PromptBuilder:
        """Return the builder with more options for the template, which come before those that it has."""
        if not template_options:
            return self
        other = copy.copy(self)
        other.template = self.template.with_options(template_options)
        return other

    def build(self, question: str, chunks: Sequence[Any], system: str | None = None) -> Prompt:
        """Return the prompt for `question` over `chunks`, each of them as in `text_of`.

        Raises:
            PromptError: question or a chunk is empty or not one string, or the template cannot be split.
        """
        self.check(question, chunks)
        ids = self.start()
        prefix = 0
        for piece in self._frame(system, question.strip()):
            if piece is None:
                ids.flush()
                prefix = len(ids.ids)
                self.add_chunks(ids, chunks)
            else:
                ids.text(*piece)
        return ids.build(prefix)

    @staticmethod
    def check(question: object, chunks: object) -> None:
        """Refuse what is not one question over a list of chunks.

        Raises:
            PromptError: it is none.
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

    def start(self, raw: bool = False) -> PromptIds:
        """Return a prompt that has only what every prompt begins with; `raw` where no template writes it."""
        return PromptIds(self._tokens.leading() if raw or not self.template else (), self._tokens.run)

    def add_own(self, prompt: PromptIds, text: str) -> None:
        """Append a text of the template's own."""
        for piece in self._tokens.pieces(text):
            prompt.text(*piece)

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
            alone = self._tokens.text(text, continues=True)
            stop = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, alone, strict=False)))
            rest = alone[stop:]
        if skipped > 0 and self._tokens.tokenizer.is_fast:
            offsets = self._tokens.with_offsets(text)
            first = next((index for index, (start, _) in enumerate(offsets) if start >= skipped), stop)
        return ids, min(first, stop), stop, rest

    def prefix(self, system: str | None = None) -> TokenIds:
        """Return the token ids that stand before the first chunk."""
        ids = self.start()
        for piece in self._frame(system, "x"):
            if piece is None:
                break
            ids.text(*piece)
        ids.flush()
        return tuple(ids.ids)

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

    def encode(self, text: str) -> TokenIds:
        """Return the ids of a text from outside, in which nothing is a special token."""
        return self._tokens.text(text)

    def text_of(self, token_ids: Sequence[int]) -> str | None:
        """Return the text of an answer as it stands behind its prompt; None where BOS, EOS or the like is in it."""
        if set(token_ids) & set(self._tokens.tokenizer.all_special_ids):
            return None
        return self._tokens.decode(token_ids)

    def without_end(self, token_ids: Sequence[int], ends: Collection[int] = ()) -> TokenIds:
        """Return an answer without the tokens at its end that end it: EOS and the like, and `ends`."""
        ends = {*self._tokens.tokenizer.all_special_ids, *ends}
        end = len(token_ids)
        while end and token_ids[end - 1] in ends:
            end -= 1
        return tuple(token_ids[:end])

    def _frame(self, system: str | None, question: str) -> Iterator[Piece | None]:
        """Yield the pieces of a prompt of one question; None for the place of the chunks."""
        frame, label = self.frame_texts()
        if not self.template:
            yield f"{system}{SEPARATOR}" if system else "", False
            yield frame, False
            yield None
            yield f"{label}{question}{ANSWER}", False
            return
        messages = [("system", system)] if system else []
        body = f"{frame}{CHUNKS}{label}{question}"
        rendered, texts = self.template.place([*messages, ("user", body)])
        asked = len(messages)
        before, _, after = texts[asked].partition(CHUNKS)
        if frame.strip() not in before or after != f"{label}{question}":
            raise PromptError(
                "the tokenizer's chat template does not keep the user's message in one piece, so chunks have no "
                "place in it; set tokenizer.chat_template to one that does, or to None for plain text"
            )
        for own, index in rendered:
            yield from self._tokens.pieces(own)
            if index == asked:
                yield before, False
                yield None
                yield after, False
            elif index is not None:
                yield texts[index], False
