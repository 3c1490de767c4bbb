"""Finds the texts of chunks inside any other text: a prompt that somebody else has rendered.

Each text is indexed by its first characters. Where these are met, behind a letter as well as behind a space, the
longest known text that stands there is taken. A hash of the first few, computed for all places at once, rules out
nearly every place where none stands.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ANCHOR = 32  # characters; a shorter text saves less than it costs to look for it

_BITS = 18  # of a hash: few of 10,000 texts share one, and a count for each takes 1 MiB
_POWERS = np.array([pow(0x9E3779B1, exponent, 2**32) for exponent in range(1, 9)], dtype=np.uint32)


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
        self._starts = np.zeros(2**_BITS, dtype=np.uint32)  # how many anchors have each hash

    def add(self, text: str, name: str, system: str | None = None) -> None:
        """Index the text of the chunk `name`, unless it is too short; `system` is what it was last added with."""
        if len(text) < ANCHOR:
            return
        if text not in self._known:
            anchor = text[:ANCHOR]
            if anchor not in self._anchors:
                self._anchors[anchor] = Counter()
                self._starts[_hashes(anchor)[0]] += 1
            self._anchors[anchor][len(text)] += 1
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
            self._starts[_hashes(text[:ANCHOR])[0]] -= 1

    def find(self, content: str) -> list[FoundText]:
        """Return the known texts in `content`, in order and without overlap."""
        results: list[FoundText] = []
        if not self._known or len(content) < ANCHOR:
            return results
        for start in np.flatnonzero(self._starts[_hashes(content)]).tolist():
            if results and start < results[-1].end:
                continue
            lengths = self._anchors.get(content[start : start + ANCHOR], ())
            for length in sorted(lengths, reverse=True):
                text = content[start : start + length]
                if text in self._known:
                    results.append(FoundText(start, text, *self._known[text]))
                    break
        return results

    def __len__(self) -> int:
        return len(self._known)


def _hashes(text: str) -> npt.NDArray[np.uint32]:
    """Return a hash of `_BITS` bits of each run of as many characters as there are powers, `[characters - 7]`."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    count = len(codes) - len(_POWERS) + 1
    sums = np.zeros(count, dtype=np.uint32)
    for offset, power in enumerate(_POWERS):
        sums += codes[offset : offset + count] * power  # modulo 2^32
    return sums >> np.uint32(32 - _BITS)
