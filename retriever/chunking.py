"""Documents to chunks of a bounded token count, whose borders stay where they are when text elsewhere is edited.

Tokens are those of the generation model's tokenizer, because what is bounded is the length of the chunk's KV. The
text of a special token counts as the text that it is in a prompt.
Each chunk is a slice of its document's text: nothing is added, and only white space between chunks is lost (a blank
that carries combining marks is a character, and may begin a chunk).

Text that is filled up greedily moves every later border when one sentence is edited, and then every later chunk
KV is stale. Here a border has a price, made of its rank (before a heading, between paragraphs, between
sentences, ...) and of a hash of the text on its two sides, and a document takes the cheapest borders that keep
the bound. Borders that are cheap before an edit are cheap behind it too, so after one or two chunks the old ones
are met again. See `chunkcache.retriever.sentences` for where a border may be.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import regex
import xxhash
from numpy.typing import NDArray

from chunkcache.errors import InputError
from chunkcache.retriever.documents import Document
from chunkcache.retriever.sentences import Count, Piece, Span, pieces
from chunkcache.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = regex.compile(r"(?<!\S)[^\s\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}]")  # where one may begin
_CLUSTER = regex.compile(r"\X")
# Characters on each side of a border that its hash sees: more would let more edits move it, fewer would make
# borders between often repeated phrases equal.
_SEEN = 32
_UNIT = 1 << 20  # prices are integers, so that sums of them are exact, and equal where the borders are
# Characters per token that no text of words reaches: a shorter one is tried as a single chunk first.
_DENSE = 16
_tokens: WeakKeyDictionary[PreTrainedTokenizerBase, Tokens] = WeakKeyDictionary()  # each with a copy of its tokenizer


@dataclass(frozen=True)
class Chunk:
    """A slice of a document.

    Attributes:
        document_id: the document's.
        index: its position among the chunks of the document, from 0.
        text: `document.text[start : start + len(text)]`.
        tokens: tokens of the text, special ones not counted.
        start: offset in characters.
        id: of the document's id and the text alone, so it stays when other parts of the document change; the
            second and later chunks of the same text have their number in it.
    """

    document_id: str
    index: int
    text: str
    tokens: int
    start: int = 0
    id: str = ""


def split(
    document: Document, tokenizer: PreTrainedTokenizerBase, *, size: int = 512, overlap: int = 0
) -> list[Chunk]:
    """Cut a document into chunks of at most `size` tokens, special tokens not counted.

    Each chunk but the first begins with up to `overlap` tokens of the text before it, in whole sentences where
    one fits, else in whole words. White space alone gives no chunks. Raises InputError when `size` is below 1,
    `overlap` is not in `[0, size)`, or one character of the text has more than `size - overlap` tokens.
    """
    if size < 1:
        raise InputError(f"chunk size {size} is not possible: give at least 1 token")
    if not 0 <= overlap < size:
        raise InputError(f"overlap {overlap} is not possible: give at least 0 and less than the size, {size}")
    text, count = document.text, _counter(tokenizer)
    own = size - overlap
    whole = text.strip()
    if not whole:
        return []
    if len(whole) <= _DENSE * own and count([whole])[0] <= own:
        spans = [(text.index(whole), text.index(whole) + len(whole))]
    else:
        parts = pieces(document, own, count)
        spans = _cheapest_spans(text, parts, own, count)
        if overlap:
            spans = _overlapping(text, spans, parts, count, size, overlap)
    texts = [text[start:end] for start, end in spans]
    return [
        Chunk(document.id, index, piece, tokens, start, name)
        for index, (piece, tokens, (start, _), name) in enumerate(
            zip(texts, count(texts), spans, _names(document.id, texts), strict=True)
        )
    ]


def _counter(tokenizer: PreTrainedTokenizerBase) -> Count:
    """Count the tokens of texts as prompts have them, all in one call of the tokenizer, and each text once.

    The text of a special token is text, as in every prompt over the chunks.
    """
    own = _tokens.get(tokenizer)
    if own is None or len(own.tokenizer) != len(tokenizer):  # tokens were added since
        own = _tokens[tokenizer] = Tokens(tokenizer)
    known: dict[str, int] = {}

    def count(texts: Sequence[str]) -> list[int]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, own.counts(new), strict=True))
        return [known[text] for text in texts]

    return count


def _cheapest_spans(text: str, parts: Sequence[Piece], size: int, count: Count) -> list[Span]:
    """Join pieces to chunks of at most `size` tokens, with the least sum of the prices of the borders."""
    prices = _prices(text, parts)
    # What a piece adds to a chunk is guessed: its own tokens, and those of the white space before it but for one
    # blank, which is part of the next word's first token. The counts of whole chunks decide.
    gaps = [text[before.end : part.start] for before, part in pairwise(parts)]
    blank = [0 if gap in ("", " ") else tokens for gap, tokens in zip(gaps, count(gaps), strict=True)]
    sums = np.cumsum([0, *(part.tokens + gap for part, gap in zip(parts, [0, *blank], strict=True))])
    starts = np.arange(len(parts))
    reach = np.maximum(np.searchsorted(sums, sums[:-1] + size, "right") - 1, starts + 1)
    while True:
        path = _cheapest(prices, reach)
        spans = [(parts[first].start, parts[end - 1].end) for first, end in path]
        longest = 0
        for (first, end), tokens in zip(path, count([text[a:b] for a, b in spans]), strict=True):
            if tokens > size:  # never a single piece: so each is made shorter, and this comes to an end
                near = slice(first, end)
                reach[near] = np.maximum(
                    starts[near] + (reach[near] - starts[near]) * size // tokens, starts[near] + 1
                )
                longest = max(longest, tokens)
        if longest <= size:
            return spans


def _prices(text: str, parts: Sequence[Piece]) -> NDArray[np.int64]:
    prices = [0]
    for before, part in pairwise(parts):
        left = text[max(before.start, before.end - _SEEN) : before.end]
        right = text[part.start : min(part.end, part.start + _SEEN)]
        share = xxhash.xxh3_64_intdigest(f"{left}\n{right}".encode("utf-8", "surrogatepass")) / 2**64
        # The square root makes the few lowest hashes stand out: measured, it fills chunks better at the same
        # number of chunks changed by an edit.
        prices.append(int(_UNIT * (part.rank + share**0.5)))
    return np.array([*prices, 0], dtype=np.int64)


def _cheapest(prices: NDArray[np.int64], reach: NDArray[np.int64]) -> list[Span]:
    """Return (first piece, piece after the last one) of each chunk; a chunk from `i` ends at `reach[i]` at most."""
    total = prices.copy()  # of the borders from here on; the end costs nothing
    ends = [0] * len(reach)
    for first in range(len(reach) - 1, -1, -1):
        furthest = int(reach[first])
        # Backwards, so that of equal prices the longest chunk is taken.
        ends[first] = furthest - int(np.argmin(total[furthest:first:-1]))
        total[first] += total[ends[first]]
    path, first = [], 0
    while first < len(ends):
        path.append((first, ends[first]))
        first = ends[first]
    return path


def _overlapping(
    text: str, spans: list[Span], parts: Sequence[Piece], count: Count, size: int, overlap: int
) -> list[Span]:
    sentences = [part.start for part in parts]
    longer = spans[:1]
    for (earliest, _), (start, end) in pairwise(spans):

        def short(earlier: int, start: int = start) -> bool:
            return count([text[earlier:start]])[0] <= overlap

        def fits(earlier: int, start: int = start, end: int = end) -> bool:
            return count([text[earlier:start]])[0] <= overlap and count([text[earlier:end]])[0] <= size

        # The pieces before it that have twice the overlap: what is longer need not be counted.
        last = bisect_left(sentences, start)
        nearest, tokens = last, 0
        while nearest and sentences[nearest - 1] >= earliest and tokens <= 2 * overlap:
            nearest -= 1
            tokens += parts[nearest].tokens
        whole = sentences[nearest:last]
        words = [word.start() for word in _WORD.finditer(text, whole[0], start)]
        clusters = [cluster.start() for cluster in _CLUSTER.finditer(text, whole[0], start)]
        for positions in (whole, words, clusters):
            # bisect only ever answers a position that it has tried, so the bound holds on any tokenizer.
            first = bisect_left(positions, True, key=short)
            if first < len(positions) and not fits(positions[first]):
                first = bisect_left(positions, True, first + 1, key=fits)
            if first < len(positions):
                start = positions[first]
                break
        longer.append((start, end))
    return longer


def _names(document: str, texts: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for text in texts:
        seen[text] += 1
        # With the length first, no other id and text make the same bytes.
        name = sha256(f"{len(document)} {document}{text}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
        names.append(name if seen[text] == 1 else f"{name}-{seen[text]}")
    return names
