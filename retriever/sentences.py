"""Where a chunk may begin: text in pieces that are sentences, or parts of sentences that are too long.

Where a piece begins depends on its paragraph alone, so an edit moves no piece of another one. No piece begins inside
a grapheme cluster (what a reader takes for one character), but for a cluster that alone is longer than a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import regex

from chunkcache.errors import InputError, missing_extra
from chunkcache.retriever.documents import Document

Count = Callable[[Sequence[str]], list[int]]
Span = tuple[int, int]

# How bad it is to begin a chunk there, on a scale where the hash of the text around it is worth up to 1. Measured:
# the level of these sets how full chunks are against how many an edit changes, their distance how many borders
# fall between paragraphs.
HEADING, PARAGRAPH, SENTENCE, LINE, CLAUSE, WORD, CHARACTER = -0.1, 0.0, 0.25, 0.4, 0.6, 0.8, 1.0
BELOW_HEADING = 2.0  # a heading at the end of a chunk is of no use to either

# sentencex takes time with the square of a paragraph's length where the text has no spaces: 7 s for 100,000
# characters of Chinese.
_LONG = 4000
_LANGUAGE = "en"  # its rules for English end sentences of other languages and scripts too

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n|\n(?=#{1,6}[ \t])")
_HEADING = re.compile(r"#{1,6}[ \t][^\n]*\n?")
_LINE = re.compile(r"\n")

# What ends a sentence wherever it stands: the marks that Unicode names, but for those of Latin, which end
# abbreviations and numbers too, and those that are commas; and some that Unicode does not name: Tibetan, Thai, Khmer,
# Sinhala, Hebrew, Mongolian.
_MARK = r"[[\p{Sentence_Terminal}།-༒༔๚๛៚෴׃᠅]--[.!?․﹒．၊꧈᭞]]"
# Two word dividers stand for an Ethiopic full stop, and marks of Latin for the Greek and Armenian ones.
_WRITTEN = r"፡፡|(?<=\p{Ethiopic})::|(?<=\p{Greek})[;\u037e](?=\s)|(?<=\p{Armenian}):(?=\s)"
_CLOSING = r"""[\p{M}\u200d]*[\p{Pe}\p{Pf}]*(?:["'](?!\S))*"""
_MARKED_END = regex.compile(
    rf"(?:{_MARK}|{_WRITTEN})(?:\p{{Sentence_Terminal}}|[^\S\n]*{_MARK})*{_CLOSING}", regex.V1
)
# Where sentencex ends a sentence and none does: behind commas, inside numbers, before marks that end it later.
_NO_END = regex.compile(rf"(?<=[၊꧈᭞]\s*)|(?<=\d．)(?=\d)|[^\S\n]*{_MARK}", regex.V1)
_SURE_END = regex.compile(r"(?<=[\p{L}\p{M}]{4}[.!?])\s+(?=[^\W\d_a-z])")
_ANY_END = regex.compile(r"(?<=[.!?])\s+")
_CLAUSE = regex.compile(
    r"(?<=[,;:)\]–—،])\s+|(?<=[[\p{Terminal_Punctuation}--\p{Sentence_Terminal}--[,;:،]]၊꧈᭞՝])", regex.V1
)
_SPACE = regex.compile(r"\s+|(?<=[\u200b་])")  # the latter divide words of scripts without spaces

_CLUSTER = regex.compile(r"\X")
_JOINED = regex.compile(r"[^\S\n]*(?:[\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}]|(?<=\u200d)\S)")
_STAND_INS = (0xF0000, 0x10FFFE)  # private characters, from the first to one past the last


class Piece(NamedTuple):
    """Text from `start` to `end`, no white space around it, its count of tokens, and the rank of its beginning."""

    start: int
    end: int
    tokens: int
    rank: float


def pieces(document: Document, size: int, count: Count) -> list[Piece]:
    """Cut a document into pieces of at most `size` tokens, as `count` counts them, with white space between.

    A sentence of more than `size` tokens is cut between lines, clauses or words, a word between its grapheme
    clusters, and a cluster of more than `size` tokens between its characters. Raises InputError when one of these has
    more than `size` tokens.
    """
    text = document.text
    ranked = list(_sentences(text))
    found: list[Piece] = []
    for (start, end, rank), tokens in zip(ranked, count([text[a:b] for a, b, _ in ranked]), strict=True):
        if tokens <= size:
            found.append(Piece(start, end, tokens, rank))
        else:
            found += _parts(document, (start, end), rank, size, count)
    return found


def _sentences(text: str) -> Iterator[tuple[int, int, float]]:
    below_heading = False
    for start, end in _cut(text, (0, len(text)), _PARAGRAPH):
        rank = PARAGRAPH
        if heading := _HEADING.match(text, start, end):
            line, rest = _trim(text, start, heading.end()), _trim(text, heading.end(), end)
            yield *line, HEADING
            below_heading = True
            if rest[0] == rest[1]:
                continue
            start, end = rest
        for part in _cut(text, (start, end), _MARKED_END):
            for block in _blocks(text, part):
                for sentence in _segment(text, block):
                    yield *sentence, BELOW_HEADING if below_heading else rank
                    below_heading, rank = False, SENTENCE


def _blocks(text: str, span: Span) -> list[Span]:
    """Cut a long paragraph where sentences surely end, or else probably do."""
    blocks = [span]
    for pattern in (_SURE_END, _LINE, _ANY_END):
        blocks = [
            part
            for block in blocks
            for part in (_cut(text, block, pattern) if block[1] - block[0] > _LONG else [block])
        ]
    return blocks


def _segment(text: str, span: Span) -> list[Span]:
    start, end = span
    if end - start > _LONG:
        return [span]
    try:
        from sentencex import get_sentence_boundaries  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra("retriever", "cutting text between sentences", error) from error
    found = get_sentence_boundaries(_LANGUAGE, text[start:end])
    # Only where sentences begin is taken, so that nothing is lost where it leaves out what is between two.
    begins = [start + sentence["start_index"] for sentence in found]
    return _between(text, span, [begin for begin in begins if not _NO_END.match(text, begin)])


def _parts(document: Document, span: Span, rank: float, size: int, count: Count) -> list[Piece]:
    """Cut a sentence that is too long into parts of less than a chunk, which leaves a choice of borders."""
    text = document.text
    parts = [Piece(*span, size + 1, rank)]
    for pattern, inner, most in ((_LINE, LINE, size // 8), (_CLAUSE, CLAUSE, size // 8), (_SPACE, WORD, size // 2)):
        spans = [
            (*part, before.rank if part[0] == before.start else inner)
            for before in parts
            for part in (_cut(text, (before.start, before.end), pattern) if before.tokens > most else [before[:2]])
        ]
        counts = count([text[start:end] for start, end, _ in spans])
        parts = [Piece(start, end, n, r) for (start, end, r), n in zip(spans, counts, strict=True)]
    return [
        small
        for part in parts
        for small in (_characters(document, part, size, count) if part.tokens > size else [part])
    ]


def _characters(document: Document, word: Piece, size: int, count: Count) -> list[Piece]:
    text = document.text[word.start : word.end]
    # semchunk never cuts within a character, and recurses without end where one alone is over the bound.
    letters = sorted(set(text))
    widest, tokens = max(zip(letters, count(letters), strict=True), key=lambda pair: pair[1])
    if tokens > size:
        raise InputError(
            f"the character {widest!r} in {document.id!r} has {tokens} tokens, more than the size less the "
            f"overlap, {size}: give a larger size or a smaller overlap"
        )
    try:
        from semchunk import chunkerify  # type: ignore[attr-defined]
    except ImportError as error:
        raise missing_extra("retriever", "cutting words into chunks", error) from error
    # So that it does not cut within a cluster either, one character stands for each that fits.
    clusters = _CLUSTER.findall(text)
    longer = sorted({cluster for cluster in clusters if len(cluster) > 1})
    spare = (chr(code) for code in range(*_STAND_INS) if chr(code) not in letters)
    fitting = [cluster for cluster, tokens in zip(longer, count(longer), strict=True) if tokens <= size]
    stand_ins = dict(zip(fitting, spare, strict=False))
    meant = {ord(one): cluster for cluster, one in stand_ins.items()}
    short = "".join(stand_ins.get(cluster, cluster) for cluster in clusters)
    # memoize=False, because semchunk's memo lives as long as the process.
    chunker: Any = chunkerify(lambda piece: count([piece.translate(meant)])[0], size, memoize=False)
    offsets = [0, *accumulate(len(meant.get(ord(one), one)) for one in short)]
    spans = [(offsets[start], offsets[end]) for start, end in chunker(short, offsets=True)[1]]
    return [
        Piece(word.start + start, word.start + end, tokens, word.rank if index == 0 else CHARACTER)
        for index, ((start, end), tokens) in enumerate(
            zip(spans, count([text[start:end] for start, end in spans]), strict=True)
        )
    ]


def _cut(text: str, span: Span, pattern: Any) -> list[Span]:
    return _between(text, span, [found.end() for found in pattern.finditer(text, *span)])


def _between(text: str, span: Span, cuts: Sequence[int]) -> list[Span]:
    inside = {cut for cut in cuts if span[0] < cut < span[1] and not _JOINED.match(text, cut)}
    borders = [span[0], *sorted(inside), span[1]]
    spans = [_trim(text, start, end) for start, end in pairwise(borders)]
    return [(start, end) for start, end in spans if start < end]


def _trim(text: str, start: int, end: int) -> Span:
    right = start + len(text[start:end].rstrip())
    return right - len(text[start:right].lstrip()), right
