"""Documents to chunks of a bounded token count, cut between paragraphs where possible, then sentences.

Tokens are those of the generation model's tokenizer, because what is bounded is the length of the chunk's KV.
Each chunk is a slice of its document's text: nothing is added, and only white space between chunks is lost.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

from semchunk import chunkerify  # type: ignore[attr-defined]

from chunkcache.errors import InputError
from chunkcache.retriever.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Chunk:
    """A slice of a document: the `index`-th one, and how many tokens its text has."""

    document_id: str
    index: int
    text: str
    tokens: int


def split(
    document: Document, tokenizer: PreTrainedTokenizerBase, *, size: int = 512, overlap: int = 0
) -> list[Chunk]:
    """Cut a document into chunks of at most `size` tokens, special tokens not counted.

    Each chunk but the first begins with up to `overlap` tokens of the text before it, in whole words where
    one fits. White space alone gives no chunks. Raises InputError when `size` is below 1, `overlap` is not
    in `[0, size)`, or one character of the text has more than `size - overlap` tokens.
    """
    if size < 1:
        raise InputError(f"chunk size {size} is not possible: give at least 1 token")
    if not 0 <= overlap < size:
        raise InputError(f"overlap {overlap} is not possible: give at least 0 and less than the size, {size}")
    text = document.text

    @cache
    def count(piece: str) -> int:
        # verbose=False: a long piece is counted, never run, so the warning about the model's length is noise.
        return len(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)

    # semchunk never cuts within a character, and recurses without end where one alone is over the bound.
    widest = max(sorted(set(text)), key=count, default="")
    if count(widest) > size - overlap:
        raise InputError(
            f"the character {widest!r} in {document.id!r} has {count(widest)} tokens, more than the size "
            f"less the overlap, {size - overlap}: give a larger size or a smaller overlap"
        )

    # The overlap is added here, because semchunk's own does not count the space between the pieces it joins;
    # memoize=False, because semchunk's memo lives as long as the process.
    answer = chunkerify(count, size - overlap, memoize=False)(text, offsets=True)
    spans = cast("list[tuple[int, int]]", answer[1])
    chunks: list[Chunk] = []
    for index, (start, end) in enumerate(spans):
        if index and overlap:
            start = _extend(text, spans[index - 1][0], start, end, count, size, overlap)
        piece = text[start:end]
        chunks.append(Chunk(document.id, index, piece, count(piece)))
    return chunks


def _extend(
    text: str, earliest: int, start: int, end: int, count: Callable[[str], int], size: int, overlap: int
) -> int:
    def fits(earlier: int) -> bool:
        return count(text[earlier:start]) <= overlap and count(text[earlier:end]) <= size

    words = [word.start() for word in _WORD.finditer(text, earliest, start)]
    positions: Sequence[int]
    for positions in (words, range(earliest, start)):
        # bisect only ever answers a position that it has tried, so the bound holds on any tokenizer.
        first = bisect_left(positions, True, key=fits)
        if first < len(positions):
            return positions[first]
    return start
