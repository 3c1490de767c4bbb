"""Texts to token ids, a whole run at a time, in which only a template's own special tokens are special.

A run is what stands between two chunks: pieces of the chat template, which are trusted, and texts from outside, which
are not. It is tokenised as one text, so that its ids are those of the rendered template. Text from outside is never
read as special tokens: a document that contains an end-of-turn mark cannot end the turn.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenizers import AddedToken

from chunkcache.kv import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]  # a text, and whether it is the template's own

_SPACES = ("▁", "Ġ", " ")
_GUARDS = ("\n", "\x01", "‖", "~", "=", "x")  # one of them merges with nothing
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # stands for a byte of plain text, even where it is called special
_SAMPLES = ("The", "a b", " 12", "(x)", "\nEnd")
_SPLIT = "[[chunkcache splits here]]"
_SPECIAL_MARK = "[[special token {} stands here]]"
_SPECIAL_MARKS = re.compile(r"\[\[special token (\d+) stands here]]")


class Tokens:
    """Tokenises for one tokenizer; safe to use from several threads.

    Some tokenizers put a space before each text (SentencePiece's dummy prefix). A text that goes on from another is
    tokenised behind a character that is cut off again, so that it gets none.

    Args:
        tokenizer: the tokenizer, which is copied: reading special tokens or not is a switch inside it.

    Attributes:
        tokenizer: the copy.
        names: texts of all special tokens, the longest first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        added = {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        of_bytes = {id_ for id_, token in added.items() if _BYTE.fullmatch(token.content)}
        plain = {*of_bytes, tokenizer.unk_token_id}
        self._marking = {*added, *tokenizer.all_special_ids} - plain  # ids that no text from outside may have
        self._flags = {token.content: token for token in added.values()}
        self.names = sorted({*self._flags, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        first = self.tokenizer.convert_ids_to_tokens(list(self._encode("x"))) or [""]
        self._adds_space = first[0].startswith(_SPACES)
        self._guards = self._find_guards() if self._adds_space else []
        self._before = self._encode("x")
        self.run = lru_cache(maxsize=256)(self._run)

    def text(self, text: str, continues: bool = False) -> TokenIds:
        """Return the ids of a text from outside; `continues` where it goes on from another text."""
        ids: list[int] = []
        for _, part, _ in self._parts(text, continues):
            ids += part
        return tuple(ids)

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each of some texts from outside has: as many as `text` returns."""
        # verbose=False: a long text is counted, never run, so the warning about the model's length is noise
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        with self._lock:
            found = self.tokenizer(list(texts), **options, verbose=False).input_ids if texts else []
        return [
            len(ids) if self._marking.isdisjoint(ids) else len(self.text(text))
            for text, ids in zip(texts, found, strict=True)
        ]

    def with_offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of `text(text, continues=True)` begins and ends in it."""
        offsets: list[tuple[int, int]] = []
        end = 0
        for part, ids, guard in self._parts(text, continues=True):
            with self._lock:
                found = self.tokenizer(guard + part, add_special_tokens=False, split_special_tokens=True,
                                       return_offsets_mapping=True).offset_mapping  # fmt: skip
            shift = end - len(guard)
            offsets += [(start + shift, stop + shift) for start, stop in found[len(found) - len(ids) :]]
            end += len(part)
        return offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids as they stand behind others: a space that begins it is kept."""
        before, whole = self._decode(self._before), self._decode((*self._before, *ids))
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def hide(self, text: str) -> str:
        """Return a text with a mark in the place of each text of a special token, for `pieces`."""
        return self._special.sub(lambda match: _SPECIAL_MARK.format(self.names.index(match.group())), text)

    def pieces(self, text: str) -> Iterator[Piece]:
        """Yield the pieces of a template's own text; what `hide` put there is none of it."""
        for index, part in enumerate(_SPECIAL_MARKS.split(text)):
            hidden = index % 2 == 1
            yield (self.names[int(part)], False) if hidden else (part, True)

    def shown(self, text: str) -> str:
        """Return a text that `hide` went over as it was."""
        return "".join(piece for piece, _ in self.pieces(text))

    def leading(self) -> TokenIds:
        """Return what the tokenizer puts before any plain text, such as BOS."""
        first, *_ = self._encode("x")
        with self._lock:
            ids = tuple(self.tokenizer("x").input_ids)
        return ids[: ids.index(first)] if first in ids else ()

    def _run(self, pieces: Sequence[Piece], continues: bool) -> TokenIds:
        """Return the ids of a run of texts that stand one behind another; `continues` as in `text`."""
        text = "".join(piece for piece, _ in pieces)
        matches = list(self._special.finditer(text))
        own = []
        start = 0
        for piece, trusted in pieces:
            end = start + len(piece)
            if trusted:
                own += [match for match in matches if start <= match.start() and match.end() <= end]
            start = end
        if len(own) == len(matches):
            ids, _ = self._behind_guard(text, continues, split=False)
            if sum(each in self._marking for each in ids) <= len(own):
                return ids
        ids = ()
        end = 0
        for begin, stop in [*(self._with_space(text, match) for match in own), (len(text), len(text))]:
            if begin > end:
                stretch = text[end:begin]
                ids += self._behind_special(stretch) if end else self.text(stretch, continues)
            ids += self._encode(text[max(begin, end) : stop], split=False)
            end = stop
        return ids

    def _with_space(self, text: str, match: re.Match[str]) -> tuple[int, int]:
        """Return where a special token begins and ends, the space round it included that it swallows."""
        begin, stop = match.span()
        flags = self._flags.get(match.group())
        if flags is not None and flags.lstrip:
            begin = len(text[:begin].rstrip())
        if flags is not None and flags.rstrip:
            stop = len(text) - len(text[stop:].lstrip())
        return begin, stop

    def _parts(self, text: str, continues: bool) -> Iterator[tuple[str, TokenIds, str]]:
        """Yield a text from outside, its ids, and the guard that they were tokenised behind.

        It comes in several parts where the model of the tokenizer would read special tokens in it by itself.
        """
        ids, guard = self._behind_guard(text, continues, split=True)
        if len(text) < 2 or self._marking.isdisjoint(ids):
            yield text, ids, guard
            return
        cuts = [match.start() + 1 for match in self._special.finditer(text)]
        cuts = [cut for cut in cuts if cut < len(text)] or [len(text) // 2]
        for begin, stop in pairwise([0, *cuts, len(text)]):
            yield from self._parts(text[begin:stop], continues or begin > 0)

    def _encode(self, text: str, split: bool = True) -> TokenIds:
        with self._lock:
            return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=split).input_ids)

    def _behind_guard(self, text: str, continues: bool, split: bool) -> tuple[TokenIds, str]:
        """Return the ids of a text, and the guard that they were tokenised behind if it goes on from another."""
        for guard, guard_ids in self._guards if continues and text else ():
            ids = self._encode(guard + text, split)
            if ids[: len(guard_ids)] == guard_ids:
                return ids[len(guard_ids) :], guard
        return self._encode(text, split), ""

    def _behind_special(self, text: str) -> TokenIds:
        """Return the ids of a text from outside as they are behind a special token."""
        if not self._adds_space:
            return self.text(text)
        with self._lock:
            ids = self._splitter(f"{_SPLIT}{text}", add_special_tokens=False, split_special_tokens=True).input_ids
        return tuple(ids[1:]) if self._marking.isdisjoint(ids) else self.text(text, continues=True)

    @cached_property
    def _splitter(self) -> PreTrainedTokenizerBase:
        """A tokenizer with one more token, which is split off whatever it stands before, and is not special."""
        splitter = copy.deepcopy(self.tokenizer)
        splitter.add_tokens([AddedToken(_SPLIT, normalized=False, special=False)])
        return splitter

    def _find_guards(self) -> list[tuple[str, TokenIds]]:
        """Return the characters that leave a text behind them as it is, and their ids."""
        guards = []
        for guard in _GUARDS:
            ids = self._encode(guard)
            alone = self._decode(ids)
            whole = [self._encode(guard + sample) for sample in _SAMPLES]
            if all(
                each[: len(ids)] == ids and _folded(self._decode(each)) == _folded(alone + sample)
                for each, sample in zip(whole, _SAMPLES, strict=True)
            ):
                guards.append((guard, ids))
        return guards

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _folded(text: str) -> str:
    """Return a text without what normalisers of some tokenizers change in it."""
    return text.lower().replace("\n", " ")
