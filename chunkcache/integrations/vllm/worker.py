"""A worker's side: looks chunks up, fuses requests into their blocks, and computes what is missing.

What goes wrong here is counted and logged once, and the request is computed by vLLM as if nothing were stored.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from chunkcache.blend import Plan, Policy, parse_policy
from chunkcache.engine.planner import Planner
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import EntryLostError
from chunkcache.integrations.vllm.fusion import Fused, Fusion, NotAcceptedError, refusal
from chunkcache.integrations.vllm.messages import PREFIX, Load, Lookup, Missing, Report
from chunkcache.integrations.vllm.metrics import TIER
from chunkcache.integrations.vllm.model import ServedPages
from chunkcache.kv import ChunkKV, ChunkRef, Span
from chunkcache.kv.heap import trim
from chunkcache.library.registry import warn_once
from chunkcache.store import MemoryStore
from chunkcache.store.breaker import Breaker

logger = logging.getLogger("chunkcache")
READERS = 2  # threads that read stores which are not in memory
PATIENCE_S = 0.002  # that a step waits for them


class _Reader(Planner):
    """Plans with what is stored, and computes nothing."""

    def _compute(self, refs: list[ChunkRef], stats: RequestStats) -> dict[ChunkRef, ChunkKV]:
        return {}


@dataclass(frozen=True)
class _Found:
    """What is stored of a request, in memory."""

    plan: Plan
    policy: Policy
    report: Report


class Working:
    """Serves the requests of one worker.

    Args:
        served: the model.
        agree: returns for each of some flags whether all ranks have it set.
        reduce: sums a tensor over all ranks.

    Attributes:
        counts: what happened, for the metrics.
    """

    def __init__(
        self,
        served: ServedPages,
        agree: Callable[[Sequence[bool]], list[bool]],
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._served, self._agree = served, agree
        self._fusion = Fusion(served.paged, served.outline, served.outline.dtype, reduce, agree)
        self._found: dict[str, _Found] = {}
        self._reports: dict[str, Report] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._unstored: set[Missing] = set()
        self._readers = None if isinstance(served.store, MemoryStore) else ThreadPoolExecutor(READERS, "chunkcache")
        self._reading: dict[str, Future[_Found]] = {}
        self._keeping = Breaker()
        self._faults = 0
        self.counts: Counter[str] = Counter()

    # --- look up

    def look_up(self, lookups: Sequence[Lookup]) -> None:
        """Look requests up: at once in memory, else in threads."""
        for lookup in lookups:
            if self._readers is None:
                self._take(lookup.request_id, partial(self._find, lookup))
            else:
                self._reading[lookup.request_id] = self._readers.submit(self._find, lookup)

    def reports(self) -> dict[str, Report]:
        """Return what has been found since this was last asked."""
        if self._reading:
            wait(self._reading.values(), PATIENCE_S)
        for name in [name for name, future in self._reading.items() if future.done()]:
            self._take(name, self._reading.pop(name).result)
        reports, self._reports = self._reports, {}
        return reports

    def done(self) -> dict[str, dict[str, Any]]:
        """Return the figures of what has been fused since this was last asked."""
        done, self._done = self._done, {}
        return done

    def unstored(self) -> set[Missing]:
        """Return what could not be computed or stored since this was last asked."""
        unstored, self._unstored = self._unstored, set()
        return unstored

    def forget(self, names: Sequence[str]) -> None:
        """Let go of requests."""
        for name in names:
            self._found.pop(name, None)
            future = self._reading.pop(name, None)
            if future is not None:
                future.cancel()

    def close(self) -> None:
        """Read no more, and close the store."""
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self._served.store.close()

    def _take(self, name: str, find: Callable[[], _Found]) -> None:
        """Keep what was found of a request; nothing, where that failed."""
        try:
            found = find()
        except Exception as error:  # noqa: BLE001 - whatever it is, the request is served without reuse
            self.failed("look up", error)
            self._reports[name] = Report()
            return
        self._reports[name] = found.report
        if found.report.reused:
            self._found[name] = found

    def _find(self, lookup: Lookup) -> _Found:
        served = self._served
        policy = served.tuning.resolve(parse_policy(lookup.spec.policy or served.options.policy))
        prompt = lookup.spec.prompt(lookup.token_ids)
        if policy.afterwards():
            warn_once("policy %s: nothing is recomputed later inside vLLM; that option is left out", policy)
        policy = policy.at_once()
        if (reason := refusal(policy, len(served.paged.heads), served.ranks)) is not None:
            warn_once("policy %s is not served inside vLLM, since %s: requests are not reused", policy, reason)
            return _Found(Plan(prompt.token_ids), policy, Report())
        served.register(prompt)
        stats = RequestStats(str(policy))
        plan = _Reader(served.outline, served.library).plan(prompt, policy, stats)
        prefix = None if plan.prefix is None else _loaded(plan.prefix)
        chunks = [_loaded(span) for span in plan.chunks]
        plan = Plan.of(plan.token_ids, chunks, prefix if prefix is not None and prefix.kv is not None else None)
        absent = {index for index, span in enumerate(chunks) if span.kv is None}
        if plan.prefix is None and lookup.spec.prefix:
            absent.add(PREFIX)
        exact = frozenset(index for index, span in enumerate(chunks) if span.exact)
        hits = sum(span.kv is not None for span in chunks)
        reused = sum(map(len, plan.reused)) if hits else 0
        self.counts.update(hits=hits, misses=len(chunks) - hits)
        sources = {index: span.kv.source for index, span in enumerate(chunks) if span.kv is not None}
        if plan.prefix is not None and plan.prefix.kv is not None:
            sources[PREFIX] = plan.prefix.kv.source
        return _Found(plan, policy, Report(frozenset(absent), reused, exact, sources))

    # --- fuse

    def fuse(self, loads: Sequence[Load]) -> list[Load]:
        """Fuse requests; return those that could not be."""
        found = [self._found.pop(load.request_id, None) for load in loads]
        ready = self._agree([each is not None for each in found])
        failed = []
        for load, each, there in zip(loads, found, ready, strict=True):
            try:
                if each is None or not there:
                    raise LookupError("what was looked up of a request is gone")
                if not self._fuse(load, _restricted(each.plan, load), each.policy):
                    failed.append(load)
            except Exception as error:  # noqa: BLE001 - vLLM computes it
                self.failed("fuse", error)
                failed.append(load)
        return failed

    def _fuse(self, load: Load, plan: Plan, policy: Policy) -> bool:
        """Fuse one request, and note what was done for it; False if its guard wants all of it computed."""
        began = time.perf_counter()
        guard = self._served.tuning.selection(policy)
        fused = Fused(0, 0, len(plan))
        with suppress(NotAcceptedError):
            fused = self._fusion.run(plan, policy, load.block_ids, guard)
        hits = sum(span.kv is not None for span in plan.chunks)
        figures = {**asdict(fused), "chunks": len(plan.chunks), "hits": hits, "policy": str(policy)}
        outcome = None if guard is None else guard.outcome
        if outcome is not None:
            figures |= {"guard_passes": outcome.passes, "guard_full": outcome.full}
        self._done[load.request_id] = {**figures, "fuse_s": round(time.perf_counter() - began, 6)}
        logger.debug("%s: %s", load.request_id, self._done[load.request_id])
        if outcome is not None and outcome.full:
            self.counts["unaccepted"] += 1
            return False
        self.counts.update(fused=1, **{f"{name}_tokens": value for name, value in asdict(fused).items()})
        for span in plan.reused:
            if span.kv is not None:
                self.counts[TIER + span.kv.source] += len(span)
        return True

    # --- compute what is missing

    def compute(self, orders: Sequence[Missing]) -> None:
        """Compute and store chunks, on all ranks alike; none for a while after the store was in trouble."""
        library = self._served.library
        for order in orders:
            if not self._agree([self._keeping.allows()])[0]:
                return
            try:
                policy = self._served.tuning.resolve(parse_policy(order.policy))
                if order.chunk:
                    ref = library.ref_for(order.chunk, order.context, policy)
                    self._store(library.ref(ref.context_ids, ())) if ref.context_ids else None
                else:
                    ref = library.ref(order.context, ())
                self._store(ref)
            except Exception as error:  # noqa: BLE001 - requests do without it
                self.failed("compute", error)
                self._unstored.add(order)
        if orders:
            trim()  # of what is computed for a chunk on the way, nothing else gives back what is left in the heap

    def _store(self, ref: ChunkRef) -> None:
        """Compute and store a chunk, unless all ranks have it."""
        library = self._served.library
        self._served.check_length(ref)
        if self._agree([library.holds(ref)])[0]:
            return
        started = time.time()
        context = library.get_prefix(ref.context_ids) if ref.context_ids else None
        if ref.context_ids and not self._agree([context is not None])[0]:
            raise LookupError("what a chunk is computed behind could not be stored")
        (kv,) = self._served.encoder.encode(context, [ref.token_ids])
        taken = library.put(ref, replace(kv, origin=replace(kv.origin, created=started)))
        if taken:
            self._keeping.succeeded()
        elif self._in_trouble():
            self._keeping.failed()
        if not self._agree([taken])[0]:
            raise LookupError("the store did not take it")
        self.counts["computed"] += 1

    def _in_trouble(self) -> bool:
        """Return whether the store was in trouble since this was last asked; a chunk may only be too large for it."""
        stats, before = self._served.store.stats(), self._faults
        self._faults = stats.errors + stats.skipped
        return self._faults > before

    def failed(self, what: str, error: Exception) -> None:
        """Count a failure, and log its kind once."""
        self.counts["failed"] += 1
        warn_once("could not %s, and went on without: %s: %s", what, type(error).__name__, str(error)[:200])


def _loaded(span: Span) -> Span:
    """Return the span with its KV in memory, or without any where they are lost."""
    try:
        return span if span.kv is None else replace(span, kv=span.kv.loaded())
    except EntryLostError:
        return replace(span, kv=None, exact=False)


def _restricted(plan: Plan, load: Load) -> Plan:
    """Return the plan as all ranks have it: without KV that one is missing, exact where all have exact KV."""
    chunks = [
        replace(span, kv=None if index in load.missing else span.kv, exact=index in load.exact - load.missing)
        for index, span in enumerate(plan.chunks)
    ]
    return Plan.of(plan.token_ids, chunks, None if PREFIX in load.missing else plan.prefix)
