"""Texts to token ids, a whole run at a time, in which only a template's own special tokens are special.

A run is what stands between two chunks: pieces of the chat template, which are trusted, and texts from outside, which
are not. It is tokenised as one text, so that its ids are those of the rendered template. Text from outside is never
read as special tokens: a document that contains an end-of-turn mark cannot end the turn.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from tokenizers import AddedToken

from chunkcache.kv import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]  # a text, and whether it is the template's own

_SPACES = ("▁", "Ġ", " ")
_GUARDS = ("\n", "\x01", "‖", "~", "=", "x")  # one of them merges with nothing
_SAMPLES = ("The", "a b", " 12", "(x)", "\nEnd")
_SPLIT = "[[chunkcache splits here]]"


class Tokens:
    """Tokenises for one tokenizer; safe to use from several threads.

    Some tokenizers put a space before each text (SentencePiece's dummy prefix). A text that goes on from another is
    tokenised behind a character that is cut off again, so that it gets none.

    Args:
        tokenizer: the tokenizer, which is copied: reading special tokens or not is a switch inside it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        first = self.tokenizer.convert_ids_to_tokens(list(self._encode("x"))) or [""]
        self._adds_space = first[0].startswith(_SPACES)
        self._guard, self._guard_ids = self._find_guard() if self._adds_space else ("", ())
        self.run = lru_cache(maxsize=256)(self._run)

    def text(self, text: str, continues: bool = False) -> TokenIds:
        """Return the ids of a text from outside; `continues` where it goes on from another text."""
        return self._behind_guard(text, continues, split=True)

    def with_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of `text(text, continues=True)` begins and ends in it."""
        with self._lock:
            offsets = self.tokenizer(self._guard + text, add_special_tokens=False, split_special_tokens=True,
                                     return_offsets_mapping=True).offset_mapping  # fmt: skip
        shift = len(self._guard)
        return [(start - shift, end - shift) for start, end in offsets[len(self._guard_ids) :]]

    def leading(self) -> TokenIds:
        """Return what the tokenizer puts before any plain text, such as BOS."""
        first, *_ = self._encode("x")
        with self._lock:
            ids = tuple(self.tokenizer("x").input_ids)
        return ids[: ids.index(first)] if first in ids else ()

    def _run(self, pieces: Sequence[Piece], continues: bool) -> TokenIds:
        """Return the ids of a run of texts that stand one behind another; `continues` as in `text`."""
        text = "".join(piece for piece, _ in pieces)
        matches = [match.span() for match in self._special.finditer(text)]
        own = []
        start = 0
        for piece, trusted in pieces:
            end = start + len(piece)
            if trusted:
                own += [span for span in matches if start <= span[0] and span[1] <= end]
            start = end
        if len(own) == len(matches):
            return self._behind_guard(text, continues, split=False)
        ids: TokenIds = ()
        end = 0
        for begin, stop in [*own, (len(text), len(text))]:
            if begin > end:
                stretch = text[end:begin]
                ids += self._behind_special(stretch) if end else self._behind_guard(stretch, continues, split=True)
            ids += self._encode(text[begin:stop], split=False)
            end = stop
        return ids

    def _encode(self, text: str, split: bool = True) -> TokenIds:
        with self._lock:
            return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=split).input_ids)

    def _behind_guard(self, text: str, continues: bool, split: bool) -> TokenIds:
        if not (continues and self._guard and text):
            return self._encode(text, split)
        ids = self._encode(self._guard + text, split)
        count = len(self._guard_ids)
        return ids[count:] if ids[:count] == self._guard_ids else self._encode(text, split)

    def _behind_special(self, text: str) -> TokenIds:
        """Return the ids of a text from outside as they are behind a special token."""
        if not self._adds_space:
            return self._encode(text)
        with self._lock:
            ids = self._splitter(f"{_SPLIT}{text}", add_special_tokens=False, split_special_tokens=True).input_ids
        return tuple(ids[1:])

    @cached_property
    def _splitter(self) -> PreTrainedTokenizerBase:
        """A tokenizer with one more token, which is split off whatever it stands before, and is not special."""
        splitter = copy.deepcopy(self.tokenizer)
        splitter.add_tokens([AddedToken(_SPLIT, normalized=False, special=False)])
        return splitter

    def _find_guard(self) -> tuple[str, TokenIds]:
        for guard in _GUARDS:
            ids = self._encode(guard)
            alone = self._decode(ids)
            whole = [self._encode(guard + sample) for sample in _SAMPLES]
            if all(
                each[: len(ids)] == ids and self._decode(each) == alone + sample
                for each, sample in zip(whole, _SAMPLES, strict=True)
            ):
                return guard, ids
        return "", ()

    def _decode(self, ids: TokenIds) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
