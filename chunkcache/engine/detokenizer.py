"""From token ids to text, piece by piece, held back where a stop string may begin."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one answer.

    Args:
        tokenizer: the model's.
        stop: strings that end the answer, and are not part of it.
        shown: special tokens that are part of the text; others are left out.

    Attributes:
        text: what was given out.
        stopped: whether a stop string was found.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), shown: Collection[int] = ()
    ) -> None:
        self._tokenizer, self._shown = tokenizer, shown
        self._special = set(tokenizer.all_special_ids).difference(shown) if shown else set()
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # of the ids: a context to decode in, and behind what was decoded already
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain by now, which may be empty."""
        self._ids.append(token_id)
        return self._give(self._decoded())

    def finish(self) -> str:
        """Return what was held back: no more tokens come."""
        if self.stopped:
            return ""
        piece, tail = self._give(self._decoded(whole=True)), self._held
        self._held = ""
        self.text += tail
        return piece + tail

    def _decoded(self, whole: bool = False) -> str:
        """Return the text of the ids that were not read; decoded behind those before, since spaces depend on them."""
        before = self._text(self._ids[self._start : self._read])
        text = self._text(self._ids[self._start :])
        if text.endswith(UNFINISHED) and not whole:  # bytes of a character whose others are still to come
            return ""
        if len(text) > len(before):  # else the context would be special tokens, which have no text
            self._start = self._read
        self._read = len(self._ids)
        return text[len(before) :]

    def _text(self, ids: list[int]) -> str:
        skip = True
        if self._shown and not set(ids).isdisjoint(self._shown):
            ids, skip = [each for each in ids if each not in self._special], False
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def _give(self, piece: str) -> str:
        pending = self._held + piece
        ends = [at for stop in self._stop if (at := pending.find(stop)) >= 0]
        if ends:
            self.stopped = True
            pending, self._held = pending[: min(ends)], ""
        else:
            held = max((overlap(pending, stop) for stop in self._stop), default=0)
            cut = len(pending) - held
            pending, self._held = pending[:cut], pending[cut:]
        self.text += pending
        return pending


def overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
