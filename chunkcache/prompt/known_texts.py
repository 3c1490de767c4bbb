"""Finds the texts of chunks inside any other text: a prompt that somebody else has rendered.

Each text is indexed by its first characters. A text is searched at the places where a word may begin; where these
characters are met, the longest known text that stands there is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

ANCHOR = 32  # characters; a shorter text saves less than it costs to look for it

_WORD_STARTS = re.compile(r"(?<!\w)\S")


@dataclass(frozen=True)
class FoundText:
    """A known text at `start` of another: its chunk, and the system prompt that its KV are computed after."""

    start: int
    text: str
    name: str
    system: str | None

    @property
    def end(self) -> int:
        """Index right after its last character."""
        return self.start + len(self.text)


class TextIndex:
    """An index of texts, without the space around them. Not safe for several threads: `ChunkRegistry` locks."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str | None]] = {}  # name and system prompt, by text
        self._anchors: dict[str, Counter[int]] = {}  # lengths of the texts that begin with these characters

    def add(self, text: str, name: str, system: str | None = None) -> None:
        """Index the text of the chunk `name`, unless it is too short; `system` is what it was last added with."""
        if len(text) < ANCHOR:
            return
        if text not in self._known:
            self._anchors.setdefault(text[:ANCHOR], Counter())[len(text)] += 1
        self._known[text] = (name, system)

    def remove(self, text: str) -> None:
        """Remove a text, if it is there."""
        if text not in self._known:
            return
        del self._known[text]
        lengths = self._anchors[text[:ANCHOR]]
        lengths[len(text)] -= 1
        if not lengths[len(text)]:
            del lengths[len(text)]
        if not lengths:
            del self._anchors[text[:ANCHOR]]

    def find(self, content: str) -> list[FoundText]:
        """Return the known texts in `content`, in order and without overlap."""
        results: list[FoundText] = []
        for start in self._candidates(content):
            if results and start < results[-1].end:
                continue
            for length in sorted(self._anchors[content[start : start + ANCHOR]], reverse=True):
                text = content[start : start + length]
                if text in self._known:
                    results.append(FoundText(start, text, *self._known[text]))
                    break
        return results

    def __len__(self) -> int:
        return len(self._known)

    def _candidates(self, content: str) -> Iterator[int]:
        """Yield the places where a known text may begin."""
        if not self._anchors:
            return
        for word in _WORD_STARTS.finditer(content):
            start = word.start()
            if content[start : start + ANCHOR] in self._anchors:
                yield start
