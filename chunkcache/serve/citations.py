"""Which words of an answer stand in which document, word for word.

Nothing here is a model's: a citation says that these words of the answer stand in that document in this order, letter
case and punctuation between them apart. It does not say that the document is where the model took them from, and what
an answer puts into words of its own is not cited.

A run of three words or more is cited if one of them has four letters, or a digit. A shorter run is cited if it has a
name or a number that the question did not have, and stands in one of the documents alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORDS = 3  # of a run, at least
_LETTERS = 4
_BEFORE = 16  # characters before a word in which the end of a sentence is looked for
_OPENING = " \t\"'“”‘’(*_#-"
_ENDS = tuple(".!?:\n")
_WORD = re.compile(r"\w+(?:[.,:/'’-]\w+)*")


@dataclass(frozen=True)
class Citation:
    """A span of an answer, and where it stands.

    Attributes:
        start: of its first character in the answer.
        end: behind its last character.
        sources: places of the documents that have it, in order.
    """

    start: int
    end: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class _Word:
    text: str  # as it is compared
    start: int
    end: int
    named: bool  # a number, or a word with a capital that does not begin a sentence
    telling: bool


def cite(answer: str, documents: Sequence[str], question: str = "") -> list[Citation]:
    """Return which spans of an answer stand in documents, in order and without overlap.

    Args:
        answer: the text.
        documents: what it may have words of.
        question: names and numbers of it are not cited by themselves.
    """
    said, texts = _words(answer), [_words(document) for document in documents]
    if not said or not any(texts):
        return []
    runs = _runs(said, texts)  # [words of the answer, documents]
    longest = runs.max(axis=1).tolist()
    asked = {word.text for word in _words(question)}
    citations, place = [], 0
    while place < len(said):
        length = longest[place]
        # A longer run that begins inside this one is the better citation.
        if length == 0 or max(longest[place + 1 : place + length], default=0) > length:
            place += 1
            continue
        sources = tuple(np.flatnonzero(runs[place] == length).tolist())
        run = said[place : place + length]
        if _is_telling(run) or _is_rare(run, sources, asked):
            citations.append(Citation(run[0].start, run[-1].end, sources))
            place += length
        else:
            place += 1
    return citations


def _words(text: str) -> list[_Word]:
    words = []
    for found in _WORD.finditer(text):
        given, before = found.group(), text[max(0, found.start() - _BEFORE) : found.start()].rstrip(_OPENING)
        begins = before[-1:] in _ENDS if before else found.start() <= _BEFORE
        digit = any(map(str.isdigit, given))
        named = len(given) > 1 and (digit or (given[0].isupper() and not begins))
        telling = digit or len(given) >= _LETTERS
        word = unicodedata.normalize("NFKC", given).casefold()
        words.append(_Word(word, found.start(), found.end(), named, telling))
    return words


def _runs(said: Sequence[_Word], texts: Sequence[Sequence[_Word]]) -> NDArray[np.int32]:
    """Return for each word of the answer how many words from it on stand in each document, `[words, documents]`.

    One row of the table of common runs at a time, backwards: words of the answer times words of all documents.
    """
    numbers: dict[str, int] = {}
    flat: list[int] = []
    borders = []
    for text in texts:
        borders.append(len(flat))
        flat += [numbers.setdefault(word.text, len(numbers)) for word in text]
        flat.append(-1)  # no run goes on from one document to the next
    documents = np.array(flat)
    row = np.zeros(len(flat) + 1, dtype=np.int32)
    runs = np.zeros((len(said), len(texts)), dtype=np.int32)
    for place in range(len(said) - 1, -1, -1):
        number = numbers.get(said[place].text, -2)
        row[:-1] = np.where(documents == number, row[1:] + 1, 0)
        runs[place] = np.maximum.reduceat(row[:-1], borders)
    return runs


def _is_telling(run: Sequence[_Word]) -> bool:
    return len(run) >= WORDS and any(word.telling for word in run)


def _is_rare(run: Sequence[_Word], sources: Sequence[int], asked: set[str]) -> bool:
    return len(sources) == 1 and any(word.named and word.text not in asked for word in run)
