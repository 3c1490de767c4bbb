"""What hints from retrieval do for the nearest tier: traces of retrievals, replayed on real stores, without a model.

A small memory tier stands over a large one that holds every chunk. Two rates say what the small one had:

    held    chunks that it held when the retriever returned them: what eviction, and prefetching for earlier
            retrievals, left there. Prefetching for this retrieval has no part in it.
    ready   chunks that it held when the request looked them up: `IN_TIME` of those that were missing can be
            fetched between the retrieval and the request.

Between two retrievals everything that waits is fetched, up to the length of the store's queue: a user reads an answer
for longer than a tier needs to read a few chunks. Hints are told of each retrieval when it happens, and of nothing
that comes later.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from chunkcache.eval.measure import OnStep, averages, table
from chunkcache.eval.results import Results, Row
from chunkcache.eval.traces import Trace
from chunkcache.kv import ChunkKey, ChunkKV, Origin
from chunkcache.store import Budget, MemoryStore, TieredStore
from chunkcache.store.budget import GHOSTS
from chunkcache.store.hints import Hints

BENCH = "hints"
BUDGETS = (0.02, 0.05, 0.1, 0.2)
IN_TIME = 2  # chunks
QUEUE = 16  # of the store, its default
_OVERHEAD = 2  # tokens' worth of time that computing a chunk takes, whatever its length


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
    remembers: bool = False
    hints: Mapping[str, Any] | None = None


VARIANTS = (
    Variant("lru", "lru"),
    Variant("lfu", "lfu"),
    Variant("cost", "cost"),
    Variant("lfu, remembering", "lfu", remembers=True),
    Variant("lfu, popularity", "lfu", remembers=True, hints={"likely": 0}),
    Variant("lru, hints", "lru", hints={}),
    Variant("lfu, hints", "lfu", remembers=True, hints={}),
    Variant("cost, hints", "cost", remembers=True, hints={}),
    Variant("lfu, hints, least=0", "lfu", remembers=True, hints={"least": 0.0}),
)


def bench_hints(
    results: Results,
    traces: Sequence[Trace],
    budgets: Sequence[float] = BUDGETS,
    variants: Sequence[Variant] = VARIANTS,
    in_time: int = IN_TIME,
    on_step: OnStep | None = None,
) -> Results:
    """Replay `traces` under each of `variants` and `budgets`.

    Args:
        results: gets a row of each trace, seed, budget and variant. `held`, `ready` and `fetched` (read from the far
            tier, for whatever reason) are shares of all chunks retrieved.
        traces: what is retrieved. Several with one name and different seeds are summarised together.
        budgets: bytes of the nearest tier, as shares of the bytes of all chunks.
        variants: how it evicts, and what hints it gets.
        in_time: chunks that can be fetched between a retrieval and its request.
        on_step: called with (replays done, replays in all).
    """
    steps = [(trace, budget, variant) for trace in traces for budget in budgets for variant in variants]
    for number, (trace, budget, variant) in enumerate(steps):
        ids = {"trace": trace.name, "seed": trace.seed, "budget": budget, "variant": variant.name}
        if not results.done(**ids):
            results.add({**ids, **_replay(trace, budget, variant, in_time)})
        if on_step is not None:
            on_step(number + 1, len(steps))
    return results


def settings(traces: Sequence[Trace]) -> dict[str, Any]:
    """Return what rows of these traces depend on, under the default budgets and variants."""
    about = [
        {"name": each.name, "seed": each.seed, "chunks": len(each.tokens), "retrievals": len(each.retrievals)}
        for each in traces
    ]
    return {"budgets": list(BUDGETS), "in_time": IN_TIME, "queue": QUEUE, "traces": about}


def summary(results: Results) -> dict[str, Any]:
    """Return for each trace, budget and variant means over the seeds, and the gain over `lru` with its spread."""
    shares = ("held", "ready", "fetched", "held_gain", "ready_gain")
    spreads = {f"{name}_spread": name for name in shares}
    lru = {_ids(row): row for row in results.rows if row["variant"] == "lru"}
    rows = []
    for row in results.rows:
        base = lru.get(_ids(row))
        row = row | {f"{name}_gain": base and row[name] - base[name] for name in ("held", "ready")}
        rows.append(row | {spread: row[name] for spread, name in spreads.items()})
    of = dict.fromkeys(shares, statistics.mean) | dict.fromkeys(spreads, _spread)
    sums = averages(rows, ("trace", "budget", "variant"), "seed", of)
    columns = {
        "trace": "{trace}", "budget": "{budget:.0%}", "variant": "{variant}",
        "held": "{held:.3f} ± {held_spread:.3f}", "over lru": "{held_gain:+.3f}",
        "ready": "{ready:.3f} ± {ready_spread:.3f}", "fetched": "{fetched:.2f}",
    }  # fmt: skip
    title = (
        f"share of chunks in the nearest tier, {max(each['seeds'] for each in sums)} seeds (held: when they were "
        "retrieved; ready: when the request came, prefetch included)"
    )
    return {"variants": sums, "tables": [table(title, columns, sums)], "plots": []}


def _ids(row: Row) -> tuple[Any, ...]:
    return row["trace"], row["budget"], row["seed"]


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _replay(trace: Trace, budget: float, variant: Variant, in_time: int) -> Row:
    chunks = [(_key(number), _kv(number, tokens)) for number, tokens in enumerate(trace.tokens)]
    max_bytes = int(budget * sum(kv.nbytes for _, kv in chunks))
    near = MemoryStore(Budget(max_bytes, variant.evict, ghosts=GHOSTS if variant.remembers else 0))
    far = MemoryStore()
    for key, kv in chunks:
        far.put(key, kv)
    with closing(_Paced(near, far)) as store:
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
                got = store.get(key, None)
                assert got is not None  # the far tier holds all
                got.loaded()
                store.flush()  # it is promoted before the next is looked up
            store.fetch(QUEUE)
        stats = near.stats()
        return {"held": held / asked, "ready": stats.hits / asked, "fetched": stats.writes / asked}


class _Paced(TieredStore):
    """Prefetches when it is told to, so that a replay does the same each time; by its own queue and thread."""

    def __init__(self, near: MemoryStore, far: MemoryStore) -> None:
        super().__init__([near, far], queue=QUEUE)
        self._near = near
        self._waiting: list[ChunkKey] = []

    def prefetch(self, keys: Iterable[ChunkKey]) -> None:
        self._waiting = [key for key in keys if key not in self._near][:QUEUE]

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
