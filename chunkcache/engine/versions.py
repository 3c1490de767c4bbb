"""Versions of the same chunk, each computed in another context, and which of them is worth keeping.

Cache-Craft (arXiv 2502.15734, section 4) keeps up to M versions of each of the N hottest chunks, and uses the one
that needs the least recomputing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from chunkcache.kv import ChunkKey, ContextAttention

LEAST_OVERHEAD = 0.01  # a version that needs nothing recomputed counts as used this cheaply, not infinitely so


@dataclass
class Variant:
    """One version: its key, what it looked at, and its worth, the sum of 1/CFO over its uses."""

    key: ChunkKey
    context: ContextAttention
    worth: float = 0.0


class Variants:
    """The versions of every chunk, in memory; safe to use from several threads.

    Args:
        chunks: most chunks that have versions (N); the one used longest ago loses its own first.
        versions: most versions of one chunk (M); the one of least worth goes first.
    """

    def __init__(self, chunks: int = 1000, versions: int = 5) -> None:
        self._chunks = chunks
        self._versions = versions
        self._of: OrderedDict[tuple[int, ...], list[Variant]] = OrderedDict()
        self._lock = threading.Lock()

    def pick(
        self, token_ids: tuple[int, ...], overhead: Callable[[ContextAttention], float]
    ) -> tuple[Variant | None, float]:
        """Return the version of least `overhead` and that overhead; None and 1 if there is no version."""
        with self._lock:
            versions = self._of.get(token_ids, [])
            priced = [(overhead(variant.context), index) for index, variant in enumerate(versions)]
            if not priced:
                return None, 1.0
            self._of.move_to_end(token_ids)
            least, index = min(priced)
            return versions[index], least

    def use(self, variant: Variant, overhead: float) -> float:
        """Count one use of a version that needed `overhead`; return what it adds to the version's worth."""
        gained = 1 / max(overhead, LEAST_OVERHEAD)
        with self._lock:
            variant.worth += gained
        return gained

    def add(self, token_ids: tuple[int, ...], key: ChunkKey, context: ContextAttention) -> list[ChunkKey]:
        """Add a version, replacing one of the same key; return the keys of those that had to go."""
        gone = []
        with self._lock:
            versions = [variant for variant in self._of.get(token_ids, []) if variant.key != key]
            if len(versions) == self._versions:
                least = min(versions, key=lambda variant: variant.worth)
                versions.remove(least)
                gone.append(least.key)
            self._of[token_ids] = [*versions, Variant(key, context)]
            self._of.move_to_end(token_ids)
            if len(self._of) > self._chunks:
                _, others = self._of.popitem(last=False)
                gone += [variant.key for variant in others]
        return gone

    def forget(self, token_ids: tuple[int, ...], key: ChunkKey) -> None:
        """Drop a version that the store no longer holds."""
        with self._lock:
            versions = [variant for variant in self._of.get(token_ids, []) if variant.key != key]
            if versions:
                self._of[token_ids] = versions
            else:
                self._of.pop(token_ids, None)
