"""A prompt as token ids, with the spans of its chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chunkcache.errors import PromptError
from chunkcache.kv import ChunkKV, Span, TokenIds
from chunkcache.tokens import Piece


@dataclass(frozen=True)
class PromptChunk:
    """A text that is stored as one chunk, of which a part may be left out of the prompt.

    Attributes:
        text: the whole chunk.
        skip_chars: characters at its beginning that are left out, because the prompt has them already. A slow
            tokenizer, which does not say where its tokens are, leaves nothing out.
        joins_next: whether the next chunk goes on where this one ends, so that nothing stands between them.
        in_place: whether the passages of its message stay among its texts, as they are given; else they come first.
    """

    text: str
    skip_chars: int = 0
    joins_next: bool = False
    in_place: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt: prefix, chunks, question.

    Attributes:
        token_ids: all of them, in order.
        prefix_tokens: how many of the first stand before the chunks, and are likely to stand there again.
        spans: the chunks.
        context_ids: what the chunks were computed after, a lead-in apart; the prefix, but in a conversation.
        head: KV of the first tokens of the prefix, if they are those of a conversation that goes on.
    """

    token_ids: TokenIds = field(repr=False)
    prefix_tokens: int
    spans: tuple[Span, ...] = ()
    context_ids: TokenIds = field(default=(), repr=False)
    head: ChunkKV | None = None

    @property
    def prefix(self) -> TokenIds:
        """What stands before the chunks and what separates them from it."""
        return self.token_ids[: self.prefix_tokens]

    @property
    def chunks(self) -> tuple[TokenIds, ...]:
        """Token ids of each chunk, as it is stored."""
        return tuple(span.chunk_ids for span in self.spans)

    @property
    def end(self) -> int:
        """Position right after the last chunk; of a prompt without chunks, after the prefix."""
        return self.spans[-1].stop if self.spans else self.prefix_tokens

    @property
    def question(self) -> TokenIds:
        """All that stands behind the chunks."""
        return self.token_ids[self.end :]

    def with_question(self, question: TokenIds) -> Prompt:
        """Return the prompt with something else behind its chunks."""
        return replace(self, token_ids=(*self.token_ids[: self.end], *question))

    def behind(self, head: ChunkKV) -> Prompt:
        """Return the prompt with the KV of its first tokens, which take the place of the prefix."""
        spans = tuple(span for span in self.spans if span.start >= len(head))
        return replace(self, prefix_tokens=len(head), spans=spans, head=head)


class PromptIds:
    """Token ids of a prompt as it is put together from its beginning on; `build` makes the `Prompt`.

    Args:
        ids: the first token ids.
        run: tokenises what stands between two chunks; see `Tokens.run`. None where no texts are appended.
    """

    def __init__(
        self, ids: Sequence[int] = (), run: Callable[[tuple[Piece, ...], bool], TokenIds] | None = None
    ) -> None:
        self._run = run
        self._pieces: list[Piece] = []
        self._continues = False
        self.ids = list(ids)
        self.spans: list[Span] = []

    def text(self, text: str, trusted: bool) -> None:
        """Append a text that is no chunk; `trusted` if it is the template's own."""
        if text:
            self._pieces.append((text, trusted))

    def flush(self) -> None:
        """Tokenise the texts that were appended since the last chunk."""
        if self._pieces and self._run is not None:
            self.ids += self._run(tuple(self._pieces), self._continues)
            self._pieces.clear()
            self._continues = True

    def mark(self) -> Callable[[], int]:
        """Return a function that says, once the prompt is built, how many of its tokens are of what stands here."""
        start, pieces, continues = len(self.ids), tuple(self._pieces), self._continues

        def tokens() -> int:
            alone = self._run(pieces, continues) if pieces and self._run is not None else ()
            return start + common(alone, self.ids[start:])

        return tokens

    def add(self, ids: Sequence[int]) -> None:
        """Append token ids that are no chunk."""
        self.flush()
        self.ids += ids
        self._continues = True

    def add_chunk(self, ids: TokenIds, first: int = 0, stop: int | None = None) -> None:
        """Append a chunk, of which tokens `first` to `stop` stand in the prompt."""
        self.flush()
        self._continues = True
        stop = len(ids) if stop is None else stop
        start = len(self.ids)
        self.ids += ids[first:stop]
        self.spans.append(Span(start, len(self.ids), ids, first))

    def build(self, prefix_tokens: int, context_ids: TokenIds | None = None) -> Prompt:
        """Return the prompt; `context_ids` are the prefix if they are not given."""
        self.flush()
        ids = tuple(self.ids)
        return Prompt(
            ids, prefix_tokens, tuple(self.spans), ids[:prefix_tokens] if context_ids is None else context_ids
        )


def common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two sequences begin alike with."""
    for count, (one, other) in enumerate(zip(ids, others, strict=False)):
        if one != other:
            return count
    return min(len(ids), len(others))


def text_of(chunk: Any) -> str:
    """Return the text of a chunk: a string, a `PromptChunk`, or a document with `.page_content` or `.text`.

    Raises:
        PromptError: it is something else, or there is nothing in it.
    """
    text = chunk
    for name in ("page_content", "text"):
        if not isinstance(text, str):
            text = getattr(chunk, name, text)
    if not isinstance(text, str):
        raise PromptError(
            f"a chunk is a {type(chunk).__name__}; every chunk must be a string with text in it, or a document with "
            "page_content or text"
        )
    if not text.strip():
        raise PromptError("a chunk is empty; every chunk must be a string with text in it")
    return text
