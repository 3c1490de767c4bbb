"""What hints from retrieval do for the nearest tier: traces of retrievals, replayed on real stores, without a model.

A small memory tier stands over a large one that holds every chunk. Two rates say what the small one had:

    held    chunks that it held when the retriever returned them: what eviction, and prefetching for earlier
            retrievals, left there. Prefetching for this retrieval has no part in it.
    ready   chunks that it held when the request looked them up: `in_time` of those that were missing can be
            fetched between the retrieval and the request.

Between two retrievals everything that waits is fetched, up to the length of the store's queue: a user reads an answer
for longer than a tier needs to read a few chunks. Hints are told of each retrieval when it happens, and of nothing
that comes later.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from chunkcache.eval.workload import interleaved, recorded_sessions, trace_blocks
from chunkcache.kv import ChunkKey, ChunkKV, Origin
from chunkcache.store import Budget, MemoryStore, Store, TieredStore
from chunkcache.store.budget import GHOSTS
from chunkcache.store.hints import Hints

BUDGETS = (0.02, 0.05, 0.1, 0.2)
QUEUE = 16  # of the store, its default
LIKELY = 8  # guesses of the traces that are recorded
_OVERHEAD = 2  # tokens' worth of time that computing a chunk takes, whatever its length


@dataclass(frozen=True)
class Retrieval:
    """One retrieval: numbers of chunks in the order of rank, and what the retriever takes to be likely next."""

    chunks: tuple[int, ...]
    likely: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A sequence of retrievals over chunks of so many tokens each."""

    name: str
    seed: int
    tokens: tuple[int, ...]
    retrievals: tuple[Retrieval, ...]


@dataclass(frozen=True)
class Variant:
    """One way to run the nearest tier.

    Attributes:
        name: what it is called.
        evict: its order of eviction.
        remembers: whether uses outlive an entry and age with the tier's size; otherwise they go with it.
        hints: options of `Hints`; None for no hints.
    """

    name: str
    evict: str
    stores_in_context: bool = False
    hints: Mapping[str, Any] | None = None


VARIANTS = (
    Variant("lru", "lru"),
    Variant("lfu", "lfu"),
    Variant("cost", "cost"),
    Variant("lfu, remembering", "lfu", stores_in_context=True),
    Variant("lfu, popularity", "lfu", stores_in_context=True, hints={"likely": 0}),
    Variant("lru, hints", "lru", hints={}),
    Variant("lfu, hints", "lfu", stores_in_context=True, hints={}),
    Variant("cost, hints", "cost", stores_in_context=True, hints={}),
    Variant("lfu, hints, least=0", "lfu", stores_in_context=True, hints={"least": 0.0}),
)


@dataclass(frozen=True)
class Row:
    """One trace under one variant and budget; `held`, `ready` and `fetched` are shares of all chunks retrieved.

    `budget` is a share of the bytes of all chunks, `fetched` what was read from the far tier, for whatever reason.
    """

    trace: str
    seed: int
    budget: float
    variant: str
    held: float
    ready: float
    fetched: float


@dataclass
class HintsBench:
    """The rows of a run, and its settings."""

    meta: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def summaries(self) -> list[dict[str, Any]]:
        """Return for each trace, budget and variant means over the seeds, and the gain over `lru` with its spread."""
        groups: dict[tuple[str, float, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.trace, row.budget, row.variant), []).append(row)
        return [self._summary(*group, rows) for group, rows in groups.items()]

    def as_dict(self) -> dict[str, Any]:
        """Return meta data, summaries and rows as plain dicts for JSON."""
        return {"meta": self.meta, "summary": self.summaries(), "rows": [asdict(row) for row in self.rows]}

    def _summary(self, trace: str, budget: float, variant: str, rows: Sequence[Row]) -> dict[str, Any]:
        lru = {row.seed: row for row in self.rows if (row.trace, row.budget, row.variant) == (trace, budget, "lru")}
        found: dict[str, Any] = {"trace": trace, "budget": budget, "variant": variant, "seeds": len(rows)}
        for name in ("held", "ready", "fetched"):
            values = [getattr(row, name) for row in rows]
            found[name], found[f"{name}_spread"] = statistics.mean(values), _spread(values)
            gains = [getattr(row, name) - getattr(lru[row.seed], name) for row in rows if row.seed in lru]
            if gains and name != "fetched":
                found[f"{name}_gain"], found[f"{name}_gain_spread"] = statistics.mean(gains), _spread(gains)
        return found


def bench_hints(
    traces: Iterable[Trace],
    budgets: Sequence[float] = BUDGETS,
    variants: Sequence[Variant] = VARIANTS,
    in_time: int = 2,
    on_row: Callable[[Row], None] | None = None,
) -> HintsBench:
    """Replay `traces` under each of `variants` and `budgets`.

    Args:
        traces: what is retrieved. Several with one name and different seeds are summarised together.
        budgets: bytes of the nearest tier, as shares of the bytes of all chunks.
        variants: how it evicts, and what hints it gets.
        in_time: chunks that can be fetched between a retrieval and its request.
        on_row: called with each row when it is there.
    """
    bench = HintsBench({"budgets": list(budgets), "in_time": in_time, "queue": QUEUE, "traces": []})
    for trace in traces:
        about = {"name": trace.name, "seed": trace.seed, "chunks": len(trace.tokens)}
        bench.meta["traces"].append({**about, "retrievals": len(trace.retrievals)})
        chunks = [(_key(number), _kv(number, tokens)) for number, tokens in enumerate(trace.tokens)]
        for budget in budgets:
            for variant in variants:
                bench.rows.append(_replay(trace, chunks, budget, variant, in_time))
                if on_row is not None:
                    on_row(bench.rows[-1])
    return bench


def _replay(
    trace: Trace, chunks: Sequence[tuple[ChunkKey, ChunkKV]], budget: float, variant: Variant, in_time: int
) -> Row:
    max_bytes = int(budget * sum(kv.nbytes for _, kv in chunks))
    ghosts = GHOSTS if variant.stores_in_context else 0
    near = MemoryStore(Budget(max_bytes, variant.evict, ghosts=ghosts))
    far = MemoryStore()
    for key, kv in chunks:
        far.put(key, kv)
    with closing(_Paced([near, far], queue=QUEUE)) as store:
        hints = None if variant.hints is None else Hints(store, **variant.hints)
        asked = held = 0
        for retrieval in trace.retrievals:
            keys = [chunks[number][0] for number in retrieval.chunks]
            asked += len(keys)
            held += sum(key in near for key in keys)
            if hints is not None:
                hints.retrieved(keys, [chunks[number][0] for number in retrieval.likely])
            store.fetch(in_time)
            for key in keys:
                found = store.get(key, None)
                assert found is not None  # the far tier holds all
                found.loaded()
                store.flush()  # it is promoted before the next is looked up
            store.fetch(QUEUE)
        stats = near.stats()
        return Row(
            trace.name, trace.seed, budget, variant.name, held / asked, stats.hits / asked, stats.writes / asked
        )


class _Paced(TieredStore):
    """Prefetches when it is told to, so that a replay does the same each time; by its own queue and thread."""

    def __init__(self, tiers: Sequence[Store], queue: int) -> None:
        super().__init__(tiers, queue=queue)
        self._waiting: list[ChunkKey] = []

    def prefetch(self, keys: Iterable[ChunkKey]) -> None:
        self._waiting = [key for key in keys if key not in self._tiers[0]][:QUEUE]

    def fetch(self, most: int) -> None:
        """Fetch the first `most` of the keys that wait."""
        super().prefetch(self._waiting[:most])
        self.flush()
        del self._waiting[:most]


def _key(number: int) -> ChunkKey:
    return ChunkKey.of("synthetic", (), (number,))


def _kv(number: int, tokens: int) -> ChunkKV:
    origin = Origin(model="synthetic", compute_s=(tokens + _OVERHEAD) / 1000)
    kv = ChunkKV.of([number] * tokens, 0, [torch.zeros(2, 1, tokens, 1)])
    return replace(kv, origin=origin)


def _spread(values: Sequence[float]) -> float:
    """Standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


# --- traces


def zipf_trace(
    seed: int,
    retrievals: int = 2000,
    documents: int = 300,
    chunks: int = 10,
    k: int = 5,
    skew: float = 0.9,
    follow_up: float = 0.6,
    sessions: int = 4,
    drift: float = 0.0,
) -> Trace:
    """Make questions about topics of Zipf popularity, and follow-ups that move on to neighbouring chunks.

    A topic is a passage of a document. Its question retrieves, by nearness and some fixed noise, chunks around it
    and a few of two related documents; those that rank right behind are near misses.

    Args:
        seed: of everything that is drawn.
        retrievals: how many.
        documents: in the corpus.
        chunks: in each document.
        k: chunks retrieved.
        skew: exponent of the Zipf distribution over topics.
        follow_up: chance that a session goes on with a question about the chunk behind, instead of a new topic.
        sessions: sessions that are under way at a time, one of which is drawn for each retrieval.
        drift: chance, at each retrieval, that two topics swap their popularity.
    """
    draw = random.Random(seed)
    topics = [(document, chunk) for document in range(documents) for chunk in range(chunks)]
    draw.shuffle(topics)
    weights = list(accumulate((rank + 1) ** -skew for rank in range(len(topics))))
    related = [draw.sample(range(documents), 2) for _ in range(documents)]
    at = [draw.choices(topics, cum_weights=weights)[0] for _ in range(sessions)]
    found = []
    for _ in range(retrievals):
        session = draw.randrange(sessions)
        document, chunk = at[session]
        if draw.random() < follow_up and chunk + 1 < chunks:
            at[session] = (document, chunk + 1)
        else:
            at[session] = draw.choices(topics, cum_weights=weights)[0]
        ranked = _ranked(*at[session], related, chunks)
        found.append(Retrieval(ranked[:k], _likely(ranked, k, chunks)))
        if draw.random() < drift:
            a, b = draw.randrange(len(topics)), draw.randrange(len(topics))
            topics[a], topics[b] = topics[b], topics[a]
    tokens = tuple(draw.randint(4, 8) for _ in range(documents * chunks))
    return Trace("zipf" if not drift else "zipf, drifting", seed, tokens, tuple(found))


def _ranked(document: int, chunk: int, related: Sequence[Sequence[int]], chunks: int) -> tuple[int, ...]:
    """Return all candidates for a question about a chunk, best first; the same each time."""
    noise = random.Random(document * chunks + chunk)
    scores = {document * chunks + i: -abs(i - chunk) + noise.gauss(0, 1) for i in range(chunks)}
    for other in related[document]:
        scores.update({other * chunks + i: -3 + noise.gauss(0, 1) for i in range(chunks)})
    return tuple(sorted(scores, key=lambda number: (-scores[number], number)))


def _likely(ranked: Sequence[int], k: int, chunks: int) -> tuple[int, ...]:
    """Return neighbours of what was retrieved, those of the best first, then near misses."""
    beside = [
        other for number in ranked[:k] for other in (number + 1, number - 1) if other // chunks == number // chunks
    ]
    found = dict.fromkeys([*beside, *ranked[k : 2 * k]])
    return tuple(number for number in found if number not in ranked[:k])


def session_trace(path: str | Path, seed: int, sessions: int = 4) -> Trace:
    """Read recorded sessions, JSON Lines of {session_id, turns: [{document_ids: [...]}]}, interleaved at random.

    Likely next is what came new, in any session so far, in the turn after one that retrieved the same chunk.

    Raises:
        DocumentError: the file cannot be read, or holds no such sessions.
    """
    draw = random.Random(seed)
    numbers: dict[str, int] = {}
    last: dict[int, tuple[int, ...]] = {}
    after: dict[int, Counter[int]] = {}
    found = []
    for session, turn in interleaved(recorded_sessions(path), draw, sessions):
        chunks = tuple(numbers.setdefault(name, len(numbers)) for name in turn["document_ids"])
        before = last.get(session, ())
        for number in before:
            after.setdefault(number, Counter()).update(set(chunks).difference(before))
        guesses = sum((after.get(number, Counter()) for number in chunks), Counter())
        likely = [number for number, _ in guesses.most_common() if number not in chunks]
        found.append(Retrieval(chunks, tuple(likely[:LIKELY])))
        last[session] = chunks
    tokens = tuple(draw.randint(4, 8) for _ in numbers)
    return Trace("sessions", seed, tokens, tuple(found))


def block_trace(path: str | Path, limit: int = 1000) -> Trace:
    """Read the first `limit` requests of a trace in Mooncake's format, JSON Lines of {timestamp, hash_ids: [...]}.

    Likely next are the blocks that stood behind the last one in earlier requests.

    Raises:
        DocumentError: the file cannot be read, or is in another format.
    """
    numbers: dict[int, int] = {}
    ids = trace_blocks(path, limit)
    blocks = [tuple(numbers.setdefault(block, len(numbers)) for block in row) for row in ids]
    behind: dict[int, int] = {}
    found = []
    for chunks in blocks:
        behind.update(pairwise(chunks))
        likely: list[int] = []
        last = chunks[-1]
        while len(likely) < LIKELY and last in behind:
            likely.append(last := behind[last])
        found.append(Retrieval(chunks, tuple(number for number in likely if number not in chunks)))
    return Trace("blocks", 0, (6,) * len(numbers), tuple(found))
