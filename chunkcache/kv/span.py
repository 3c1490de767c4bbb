"""A run of prompt tokens that is a chunk, or part of one: built with the prompt, filled with KV by the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from chunkcache.kv.chunk import ChunkKV, TokenIds


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a prompt, which are tokens of one chunk.

    Attributes:
        start: position of the first of them in the prompt.
        stop: position right after the last.
        chunk_ids: token ids of the whole chunk, as it is stored.
        offset: index in `chunk_ids` of the first token that stands in the prompt.
        kv: stored KV of `chunk_ids`, once they have been found or computed; None where the prefill computes the span.
        exact: whether `kv` were computed after the very tokens that stand before them here, so that nothing has to
            be recomputed.
    """

    start: int
    stop: int
    chunk_ids: TokenIds = field(repr=False)
    offset: int = 0
    kv: ChunkKV | None = None
    exact: bool = False

    @property
    def token_ids(self) -> TokenIds:
        """The token ids that stand in the prompt."""
        return self.chunk_ids[self.offset : self.offset + len(self)]

    @property
    def delta(self) -> int:
        """By how many positions stored keys are rotated on."""
        return 0 if self.kv is None else self.start - (self.kv.position + self.offset)

    def __len__(self) -> int:
        return self.stop - self.start


Context = ChunkKV | Sequence[ChunkKV | Span] | None  # what a chunk is computed behind


def in_a_row(context: Context) -> list[Span]:
    """Return spans that stand one behind another from position 0 on: of whole chunks, or of as much as a span has."""
    spans: list[Span] = []
    end = 0
    for part in (context,) if isinstance(context, ChunkKV) else context or ():
        span = part if isinstance(part, Span) else Span(0, len(part), part.token_ids, kv=part)
        spans.append(replace(span, start=end, stop=end + len(span)))
        end += len(span)
    return spans
