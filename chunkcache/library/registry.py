"""The chunks that this process knows: their tokens, texts, keys and documents, with one bound and one deletion.

A stored entry names the documents that it is from; the registry names those of chunks that are still to be computed,
and finds chunks in prompts that somebody else has built.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from chunkcache.kv import ChunkKey, ChunkRef, Span, TokenIds, chunk_name
from chunkcache.library.finder import Match, TokenIndex
from chunkcache.prompt.known_texts import FoundText, TextIndex

warn_once = lru_cache(maxsize=None)(logging.getLogger("chunkcache").warning)

LIMIT = 100_000  # chunks that can be found
OWNED = 1_000_000  # chunks whose documents are known: names only, without tokens
KEYS = 8  # of one chunk and model, computed after different tokens


@dataclass
class _Known:
    """A chunk that can be found: its tokens, its text if it was given one, and the keys of its KV.

    What was computed behind its nearest chunks comes first, and the latest last.
    """

    token_ids: npt.NDArray[np.uint32]  # 4 bytes each
    text: str | None = None
    system: str | None = None
    keys: dict[str, list[ChunkKey]] = field(default_factory=dict)  # by fingerprint of the model


class ChunkRegistry:
    """Finds chunks by token ids and by text, and knows their documents; safe to use from several threads.

    Chunks go by `chunk_name`, documents by `hashed_label`.

    Args:
        limit: chunks that can be found at most; the one that was used longest ago goes first.
        owned: chunks whose documents are remembered at most, likewise.
    """

    def __init__(self, limit: int = LIMIT, owned: int = OWNED) -> None:
        self._limit, self._owned = limit, owned
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._documents: OrderedDict[str, set[str]] = OrderedDict()
        self._trust: dict[str, set[str]] = {}  # of the chunks that have a label
        self._tokens: TokenIndex | None = None  # made when something is first looked for
        self._texts: TextIndex | None = None

    def add(
        self,
        ref: ChunkRef,
        text: str | None = None,
        system: str | None = None,
        document: str | None = None,
        model: str = "",
        trust: str | None = None,
    ) -> None:
        """Make a chunk findable, by its text too if that is given, as a part of `document` if that is given.

        Args:
            ref: the chunk.
            text: its text.
            system: the system prompt that its KV are computed after.
            document: label of a document that it is part of.
            model: fingerprint of the model that its KV are of.
            trust: its trust label; None leaves it as it is.
        """
        name = chunk_name(ref.token_ids)
        with self._lock:
            known = self._known.setdefault(name, _Known(np.asarray(ref.token_ids, dtype=np.uint32)))
            self._known.move_to_end(name)
            keys = known.keys.setdefault(model, [])
            if ref.key not in keys and ref.near:
                known.keys[model] = [ref.key, *keys[-KEYS + 1 :]]
            elif ref.key not in keys:
                known.keys[model] = [*keys[-KEYS + 1 :], ref.key]
            if self._tokens is not None:
                self._tokens.add(name, ref.token_ids)
            if text is not None:
                if self._texts is not None:
                    self._texts.remove(known.text or "")
                    self._texts.add(text.strip(), name, system)
                known.text, known.system = text.strip(), system
            if document is not None:
                self._documents.setdefault(name, set()).add(document)
                self._documents.move_to_end(name)
            if trust:
                self._trust.setdefault(name, set()).add(trust)
            self._keep_bounds()

    def trusts(self, name: str, others: Iterable[str]) -> bool:
        """Return whether a chunk and some others all have one trust label, or all have none."""
        with self._lock:
            labels = [self._trust.get(each, set()) for each in (name, *others)]
        return all(len(each) < 2 and each == labels[0] for each in labels)

    def documents_of(self, names: Iterable[str]) -> set[str]:
        """Return the documents that any of these chunks is part of."""
        with self._lock:
            return set().union(*(self._documents.get(name, ()) for name in names))

    def find_tokens(self, token_ids: Sequence[int], model: str = "") -> list[tuple[Span, tuple[ChunkKey, ...]]]:
        """Return the longest runs of known chunks in `token_ids`, in order.

        With each come the keys of its KV of the model with this fingerprint, in the order of `_Known`.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens = TokenIndex()
                for name, known in self._known.items():
                    if known.keys:
                        self._tokens.add(name, known.token_ids.tolist())
            matches = self._tokens.find(token_ids)
            for match in matches:
                self._known.move_to_end(match.name)
            return [(self._span(match), tuple(self._known[match.name].keys.get(model, ()))) for match in matches]

    def find_text(self, content: str) -> list[FoundText]:
        """Return the known texts in `content`, in order and without overlap."""
        with self._lock:
            if self._texts is None:
                self._texts = TextIndex()
                for name, known in self._known.items():
                    if known.text is not None:
                        self._texts.add(known.text, name, known.system)
            results = self._texts.find(content)
            for result in results:
                self._known.move_to_end(result.name)
            return results

    def forget_key(self, token_ids: TokenIds, key: ChunkKey) -> None:
        """Remove a key of a chunk that the store no longer has; without any, it is not found by its tokens."""
        name = chunk_name(token_ids)
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                rest = {model: [k for k in keys if k != key] for model, keys in known.keys.items()}
                known.keys = {model: keys for model, keys in rest.items() if keys}
                if not known.keys and self._tokens is not None:
                    self._tokens.remove(name)

    def delete(self, names: Collection[str]) -> None:
        """Remove chunks, in whichever contexts they were computed."""
        with self._lock:
            for name in names:
                self._drop(name)
                self._documents.pop(name, None)
                self._trust.pop(name, None)

    def delete_document(self, document: str, but: Collection[str] = ()) -> set[str]:
        """Remove the chunks of a document that are part of no other, all but these; return their names."""
        with self._lock:
            gone = [name for name, labels in self._documents.items() if document in labels and name not in but]
            for name in gone:
                self._documents[name].discard(document)
            orphans = {name for name in gone if not self._documents[name]}
            for name in orphans:
                self._drop(name)
                self._trust.pop(name, None)
                del self._documents[name]
            return orphans

    def clear(self) -> None:
        """Remove everything."""
        with self._lock:
            self._known.clear()
            self._documents.clear()
            self._trust.clear()
            self._tokens = self._texts = None

    def __len__(self) -> int:
        return len(self._known)

    def _span(self, match: Match) -> Span:
        ids = tuple(self._known[match.name].token_ids.tolist())
        return Span(match.start, match.start + match.length, ids, match.first)

    def _drop(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is not None and self._tokens is not None:
            self._tokens.remove(name)
        if known is not None and self._texts is not None:
            self._texts.remove(known.text or "")

    def _keep_bounds(self) -> None:
        while len(self._known) > self._limit:
            self._drop(next(iter(self._known)))
        while len(self._documents) > self._owned:
            self._documents.popitem(last=False)
            warn_once(
                "more than %d chunks have documents: what is computed again of the oldest does not name them",
                self._owned,
            )
