"""Texts that are cached as chunks, found again inside any other text: a prompt that somebody else has rendered.

Each text is known by its first characters. A text is searched at the places where a word may begin; where these
characters are met, the longest known text that stands there is taken.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

ANCHOR = 32  # characters; a shorter text saves less than it costs to look for it
LIMIT = 100_000  # texts known at a time; those that were asked for longest ago go first

_WORD_STARTS = re.compile(r"(?<!\w)\S")


@dataclass
class _Known:
    system: str | None
    documents: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Found:
    """A known text at `start` of another, and the system prompt behind which its KV are computed."""

    start: int
    text: str
    system: str | None

    @property
    def end(self) -> int:
        """Index right after its last character."""
        return self.start + len(self.text)


class KnownTexts:
    """A bounded set of texts, without the space round them; safe to use from several threads."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, _Known] = OrderedDict()
        self._anchors: dict[str, Counter[int]] = {}  # lengths of the texts that begin with these characters

    def add(self, text: str, system: str | None = None, document: str | None = None) -> None:
        """Make a text findable, as a part of `document` if that is given; `system` is what it was last added with."""
        text = text.strip()
        if len(text) < ANCHOR:
            return
        with self._lock:
            if text not in self._texts:
                self._anchors.setdefault(text[:ANCHOR], Counter())[len(text)] += 1
            known = self._texts.setdefault(text, _Known(system))
            known.system = system
            known.documents.update(() if document is None else (document,))
            self._texts.move_to_end(text)
            if len(self._texts) > self._limit:
                self._drop(next(iter(self._texts)))

    def drop(self, texts: Collection[str]) -> None:
        """Forget these texts."""
        with self._lock:
            for text in map(str.strip, texts):
                self._drop(text)

    def drop_document(self, document: str, but: Collection[str] = ()) -> None:
        """Forget the texts of a document that are part of no other, all but these."""
        kept = set(map(str.strip, but))
        with self._lock:
            for text in [text for text, known in self._texts.items() if document in known.documents]:
                if text not in kept:
                    self._texts[text].documents.discard(document)
                    if not self._texts[text].documents:
                        self._drop(text)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._texts.clear()
            self._anchors.clear()

    def find(self, content: str) -> list[Found]:
        """Return the known texts in `content`, in order and without overlap."""
        found: list[Found] = []
        with self._lock:
            for start in self._candidates(content):
                if found and start < found[-1].end:
                    continue
                for length in sorted(self._anchors[content[start : start + ANCHOR]], reverse=True):
                    text = content[start : start + length]
                    if text in self._texts:
                        found.append(Found(start, text, self._texts[text].system))
                        self._texts.move_to_end(text)
                        break
        return found

    def __len__(self) -> int:
        return len(self._texts)

    def _candidates(self, content: str) -> Iterator[int]:
        """Yield the places where a known text may begin."""
        if not self._anchors:
            return
        for word in _WORD_STARTS.finditer(content):
            start = word.start()
            if content[start : start + ANCHOR] in self._anchors:
                yield start

    def _drop(self, text: str) -> None:
        if self._texts.pop(text, None) is None:
            return
        lengths = self._anchors[text[:ANCHOR]]
        lengths[len(text)] -= 1
        if not lengths[len(text)]:
            del lengths[len(text)]
        if not lengths:
            del self._anchors[text[:ANCHOR]]
