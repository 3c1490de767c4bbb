"""Chunk KV that are computed behind the chunk's nearest chunks, as in FusionRAG (arXiv 2601.12904).

In a prompt a chunk stands among others that are like it, for one question finds them all. So it is computed behind
the prefix, the lead-in if there is one, and its nearest chunks, the nearest last. They are not computed anew: their
stored KV are put in place, keys re-rotated. Each chunk therefore costs one computation, plus one more for some that
came before their nearest chunks were there.

What stands first in a prompt has nothing like it before it. So by default each chunk is also computed behind the
prefix alone: there it is exact.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from chunkcache.blend import Policy
from chunkcache.errors import EntryLostError, InputError
from chunkcache.kv import ChunkKV, ChunkRef, Span, TokenIds, chunk_name
from chunkcache.library.library import PART_TOKENS, ChunkLibrary, Progress

TOKENS = 1024  # of nearest chunks before a chunk
LEAST = 64  # tokens of a chunk that stand there at least, of one that does not fit whole
MOST = 10  # nearest chunks that are considered: the paper found no gain from more
ASKED = 2 * MOST  # nearest chunks to ask an index for: those that repeat others are not considered
REPEATED = 0.2  # share of its token n-grams from which on a chunk repeats another
GRAM = 16  # tokens of an n-gram
NAMES = 32  # chunks that one entry may depend on: it is deleted with any of them

Nearest = Mapping[TokenIds, Sequence[TokenIds]]


@dataclass(frozen=True)
class Neighbours:
    """How chunks are computed behind their nearest chunks.

    Args:
        nearest: for each text its nearest texts, best first: a list of lists, in the order of the texts, or a
            function of one text. None finds them among the texts with the retriever's embedding model.
        tokens: of nearest chunks before a chunk, at most; of the last one that does not fit whole, its end.
        extra: share of the chunks that is computed a second time, at most.
        first: whether each chunk is also computed behind the prefix alone, for prompts that begin with it.
        renew: whether chunks that are stored already are computed again, where that is behind more of their nearest.

    Raises:
        InputError: a number is out of range.
    """

    nearest: Callable[[Any], Sequence[Any]] | Sequence[Sequence[Any]] | None = None
    tokens: int = TOKENS
    extra: float = 0.3
    first: bool = True
    renew: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens} leaves no room for neighbours: give 1 or more")
        if not 0 <= self.extra <= 1:
            raise InputError(f"extra={self.extra} is no share of the chunks: give 0 to 1")


def without_repeats(token_ids: TokenIds, nearest: Iterable[TokenIds]) -> list[TokenIds]:
    """Return of the nearest chunks of a chunk the first `MOST` that repeat neither it nor each other.

    Behind its own text a chunk is computed as one that repeats something, which in a prompt it seldom is. Two chunks
    repeat each other if the overlap coefficient of their token n-grams is above `REPEATED`.
    """
    kept: list[TokenIds] = []
    known = [_grams(token_ids)]
    for ids in nearest:
        grams = _grams(ids)
        if all(len(grams & other) <= REPEATED * min(len(grams), len(other)) for other in known):
            kept.append(ids)
            known.append(grams)
        if len(kept) == MOST:
            break
    return kept


def _grams(token_ids: TokenIds) -> set[TokenIds]:
    """Return the n-grams of a chunk; a shorter chunk is one."""
    return {token_ids[at : at + GRAM] for at in range(max(1, len(token_ids) - GRAM + 1))}


class NearChunks:
    """Computes chunks behind their nearest chunks, for requests that begin with one prefix.

    Args:
        library: looks up, computes and stores.
        prefix: what requests begin with.
        policy: says which lead-in stands before the nearest chunks.
        nearest: token ids of the nearest chunks of each chunk, best first. They may be others than those computed.
        tokens: of nearest chunks before a chunk, at most.
        first: whether chunks are also computed behind the prefix alone.

    Attributes:
        computed: how many computations there were.
        done: the chunks that were computed.
    """

    def __init__(
        self,
        library: ChunkLibrary,
        prefix: TokenIds,
        policy: Policy,
        nearest: Nearest,
        tokens: int = TOKENS,
        first: bool = False,
    ) -> None:
        self._library, self._prefix, self._policy = library, prefix, policy
        self._nearest, self._tokens, self._first = nearest, tokens, first
        self._allowed = cache(self._allowed_of)  # texts are compared once, for what is wanted and what is considered
        self._candidates = cache(self._candidates_of)
        self._wanted = cache(self._wanted_of)
        self._alone = cache(self._alone_of)
        self._contexts: dict[TokenIds, ChunkKV] = {}
        self._behind: dict[TokenIds, tuple[TokenIds, ...]] = {}  # what a chunk was computed behind here
        self.computed = 0
        self.done: set[TokenIds] = set()

    def compute(self, chunks: Sequence[TokenIds], extra: float = 0.0, on_progress: Progress | None = None) -> int:
        """Compute and store chunks, each behind those of its nearest chunks that are stored by then.

        First some are computed behind the packaged lead-in alone, so that each of the others finds one of its nearest
        (greedy dominating sets: as far as the share reaches, one of those that would stand before it; then one of all
        that are considered). At the end those are computed again that stood behind the fewest of their nearest.

        Args:
            chunks: different chunks that fit the model.
            extra: share of them that is computed again, at most.
            on_progress: called with (chunks done, chunks in all).

        Returns:
            how many of them were computed behind nearest chunks.
        """
        budget = int(extra * len(chunks))
        report = _Report(on_progress, len(chunks), len(chunks) + budget)
        stored = {ids for chunk in chunks for ids in self._candidates(chunk) if self._is_stored(ids)}
        seeds = self._seeds(chunks, stored, self._wanted)[:budget]
        seeds += self._seeds(chunks, {*stored, *seeds}, self._candidates)
        self._library.precompute([self._alone(ids) for ids in seeds], report.within)
        self._behind.update(dict.fromkeys(seeds, ()))
        self._count(seeds, report)
        done = {*stored, *seeds}
        self._compute_all(self._ordered([ids for ids in chunks if ids not in self._behind], done), report)
        again = sorted((self._overlap(ids, self._behind[ids]), place) for place, ids in enumerate(chunks))
        self._compute_all([chunks[place] for overlap, place in again[:budget] if overlap < 1], report)
        near = [ids for ids in chunks if self._behind[ids]]
        self._drop_alone(near, set(seeds))
        if self._first:
            self._library.precompute([self._library.ref(ids, self._prefix) for ids in self.done])
        report.end()
        return len(near)

    def _drop_alone(self, chunks: Iterable[TokenIds], seeds: Collection[TokenIds]) -> None:
        """Delete what requests ask for no more of chunks that are stored as computed behind their nearest.

        KV behind the prefix alone stay if they were there before, or are to be: they may be exact in a prompt.
        """
        for ref in map(self._alone, chunks):
            wanted = ref.context_ids == self._prefix and (self._first or ref.token_ids not in seeds)
            if not wanted and self._library.holds(ref):
                self._library.drop(ref.key)
                self._library.registry.forget_key(ref.token_ids, ref.key)

    def overlap(self, token_ids: TokenIds) -> float:
        """Return the share of the nearest chunks of a chunk that its stored KV were computed behind.

        It is 0 if they were computed behind none, or are not stored; 1 if it has no nearest chunks.
        """
        near = self._library.ref_near(token_ids, self._prefix)
        kv = self._library.get(near) if self._library.holds(near) else None
        names = () if kv is None else kv.origin.chunks[1:]
        return self._overlap(token_ids, [ids for ids in self._wanted(token_ids) if chunk_name(ids) in names])

    def _overlap(self, token_ids: TokenIds, behind: Collection[TokenIds]) -> float:
        wanted = self._wanted(token_ids)
        return sum(ids in behind for ids in wanted) / len(wanted) if wanted else 1.0

    @staticmethod
    def _seeds(
        chunks: Sequence[TokenIds], stored: Collection[TokenIds], near_to: Callable[[TokenIds], Sequence[TokenIds]]
    ) -> list[TokenIds]:
        """Return chunks, found greedily, so that each has one of them near, or one that has one of `stored` near."""
        near = {ids: set(near_to(ids)) for ids in chunks}
        reached, waiting = set(stored), set(chunks).difference(stored)
        while more := {ids for ids in waiting if not near[ids].isdisjoint(reached)}:
            reached |= more
            waiting -= more
        helped: dict[TokenIds, set[TokenIds]] = {ids: {ids} & waiting for ids in chunks}
        for ids in waiting:
            for other in near[ids] & helped.keys():
                helped[other].add(ids)
        heap = [(-len(others), place) for place, others in enumerate(helped.values()) if others]
        heapq.heapify(heap)
        seeds = []
        while waiting:
            worth, place = heapq.heappop(heap)
            left = helped[chunks[place]] & waiting
            if len(left) == -worth:
                seeds.append(chunks[place])
                waiting -= {*left, chunks[place]}
            elif left:  # less than it seemed, for others were chosen meanwhile
                heapq.heappush(heap, (-len(left), place))
        return seeds

    def _ordered(self, chunks: Sequence[TokenIds], done: set[TokenIds]) -> Iterator[TokenIds]:
        """Yield chunks, always one of those with the most of their nearest in `done`, to which each is added."""
        waiting_for: dict[TokenIds, list[int]] = {}
        for place, ids in enumerate(chunks):
            for other in self._wanted(ids):
                waiting_for.setdefault(other, []).append(place)
        count = [sum(other in done for other in self._wanted(ids)) for ids in chunks]
        left = set(range(len(chunks)))
        heap = [(-number, place) for place, number in enumerate(count)]
        heapq.heapify(heap)
        while heap:
            number, place = heapq.heappop(heap)
            if place not in left or -number < count[place]:
                continue
            left.remove(place)
            yield chunks[place]
            for later in waiting_for.get(chunks[place], ()) if chunks[place] not in done else ():
                count[later] += 1
                heapq.heappush(heap, (-count[later], later))
            done.add(chunks[place])

    def _compute_all(self, chunks: Iterable[TokenIds], report: _Report) -> None:
        """Compute chunks one by one, those in a row that stand behind the same ones together."""
        group: list[TokenIds] = []
        behind: list[Span] = []
        started, tokens = time.time(), 0
        for ids in chunks:
            if not set(group).isdisjoint(self._candidates(ids)):  # it may stand behind one of them
                self._compute_group(group, behind, started, report)
                group = []
            now = time.time()
            chosen = self._chosen(ids)
            if not self._improves(ids, chosen):
                self._behind.setdefault(ids, ())
                continue
            same = [span.token_ids for span in chosen] == [span.token_ids for span in behind]
            fit = sum(map(len, group)) + len(ids) <= self._library.pack_tokens
            if not (group and same and fit and self._alone(group[0]).context_ids == self._alone(ids).context_ids):
                self._compute_group(group, behind, started, report)
                group, behind, started = [], chosen, now
            group.append(ids)
            tokens += len(ids)
            if tokens >= PART_TOKENS:
                self._library.flush()
                tokens = 0
        self._compute_group(group, behind, started, report)
        self._library.flush()

    def _compute_group(
        self, group: Sequence[TokenIds], behind: Sequence[Span], started: float, report: _Report
    ) -> None:
        """Compute chunks that stand behind the same ones; behind the packaged lead-in where these have gone."""
        if not group:
            return
        if behind:
            refs = [self._library.ref_near(ids, self._prefix) for ids in group]
            with suppress(EntryLostError):  # counted by the store
                self._library.compute_behind(refs, self._context(group[0]), behind, started)
                self._behind.update(dict.fromkeys(group, tuple(span.chunk_ids for span in behind)))
                self._count(group, report)
                return
        missing = [ids for ids in group if not self._is_stored(ids)]
        self._library.compute([self._alone(ids) for ids in missing])
        for ids in group:
            self._behind.setdefault(ids, ())
        self._count(missing, report)

    def _count(self, chunks: Collection[TokenIds], report: _Report) -> None:
        self.done.update(chunks)
        self.computed += len(chunks)
        report.add(len(chunks))

    def _improves(self, token_ids: TokenIds, chosen: Sequence[Span]) -> bool:
        """Return whether KV behind some others are better than what is stored of a chunk."""
        if not self._library.holds(self._library.ref_near(token_ids, self._prefix)):
            return True
        return self._overlap(token_ids, [span.chunk_ids for span in chosen]) > self.overlap(token_ids)

    def _chosen(self, token_ids: TokenIds) -> list[Span]:
        """Return stored nearest chunks, as many as fit, the nearest last; of one that does not fit whole its end."""
        chosen: list[Span] = []
        room, own = self._room(token_ids), chunk_name(token_ids)
        names = {own}
        for ids in self._candidates(token_ids):
            kv = self._source(ids, own, names) if _fits(ids, room) else None
            if kv is not None:
                kept = min(len(ids), room)
                chosen.append(Span(0, kept, ids, offset=len(ids) - kept, kv=kv))
                names.update(kv.origin.chunks)
                room -= kept
        return chosen[::-1]

    def _source(self, token_ids: TokenIds, own: str, names: Collection[str]) -> ChunkKV | None:
        """Return stored KV of a nearest chunk, best as computed behind its own, and not behind the chunk `own`.

        None if there are none, or if the chunk `own` would then depend on more than an entry may name, of which it
        has `names` already, or on one of another trust label.
        """
        behind_own = None
        for ref in (self._library.ref_near(token_ids, self._prefix), self._alone(token_ids)):
            kv = self._library.get(ref) if self._library.holds(ref) else None
            if kv is None or len({*names, *kv.origin.chunks}) > NAMES:
                continue
            if not self._library.registry.trusts(own, kv.origin.chunks):
                continue
            if own not in kv.origin.chunks:
                return kv
            behind_own = kv
        return behind_own

    def _allowed_of(self, token_ids: TokenIds) -> list[TokenIds]:
        """Return the nearest chunks that may stand before a chunk: with other text, and of its trust label."""
        room = self._room(token_ids)
        others = without_repeats(token_ids, self._nearest.get(token_ids, ()))
        return [ids for ids in others if _fits(ids, room) and self._library.trusts([token_ids, ids])]

    def _wanted_of(self, token_ids: TokenIds) -> list[TokenIds]:
        """Return the nearest chunks that would stand before a chunk if all were stored, best first."""
        wanted, room = [], self._room(token_ids)
        for ids in self._allowed(token_ids):
            if _fits(ids, room):
                wanted.append(ids)
                room -= min(len(ids), room)
        return wanted

    def _candidates_of(self, token_ids: TokenIds) -> list[TokenIds]:
        """Return the nearest chunks that are considered: twice as many as are wanted, as some may not be stored."""
        return self._allowed(token_ids)[: 2 * len(self._wanted(token_ids))]

    def _room(self, token_ids: TokenIds) -> int:
        return min(self._tokens, self._library.room(self._alone(token_ids)))

    def _alone_of(self, token_ids: TokenIds) -> ChunkRef:
        return self._library.ref_for(token_ids, self._prefix, self._policy)

    def _is_stored(self, token_ids: TokenIds) -> bool:
        return self._library.holds(self._library.held_ref(token_ids, self._prefix, self._policy))

    def _context(self, token_ids: TokenIds) -> ChunkKV | None:
        """Return the KV of what stands before nearest chunks: the prefix, and the lead-in."""
        ids = self._alone(token_ids).context_ids
        if ids and ids not in self._contexts:
            self._contexts[ids] = self._library.prefix(ids)
        return self._contexts.get(ids)


def _fits(token_ids: TokenIds, room: int) -> bool:
    """Return whether a chunk may stand in so many tokens: whole, or as much of its end as is worth it."""
    return room >= min(len(token_ids), LEAST)


class _Report:
    """Counts computations, and shows them as chunks: some chunks need two."""

    def __init__(self, on_progress: Progress | None, chunks: int, computations: int) -> None:
        self._on_progress, self._chunks, self._all = on_progress, chunks, computations
        self._done = 0

    def within(self, done: int, _: int) -> None:
        """Show computations that `add` will count."""
        if self._on_progress is not None:
            self._on_progress(self._chunks * min(self._done + done, self._all) // self._all, self._chunks)

    def add(self, more: int) -> None:
        """Count computations."""
        self._done += more
        if more:
            self.within(0, 0)

    def end(self) -> None:
        """Show that there are no more."""
        if self._done < self._all:
            self.add(self._all - self._done)
