"""The scheduler's side: which requests are fused, in which step, and what is computed ahead.

It holds no KV and no store. A request is looked up by the workers first, then promised to vLLM as loaded but for its
last token, and fused in the step in which vLLM schedules it.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.cache_hit_source import CacheHitSource

from chunkcache.errors import InputError
from chunkcache.integrations.vllm.messages import PREFIX, Load, Lookup, Missing, News, Orders, Report
from chunkcache.integrations.vllm.options import Options
from chunkcache.integrations.vllm.spec import NAME, ChunkSpec, salt_of
from chunkcache.kv import ChunkKey, ChunkRef, TokenIds
from chunkcache.library.registry import ChunkRegistry, warn_once

PREFIXES = 64  # different beginnings of prompts that are remembered
LOOKING = 8  # requests whose KV are in memory before they are fused
QUEUED = 256  # chunks that wait to be computed; others are found missing by the next request that has them
RETRY_S = 60.0  # after which what could not be stored is computed once more
SOURCES = {"device": CacheHitSource.DEVICE, "memory": CacheHitSource.HOST, "disk": CacheHitSource.DISK}


@dataclass
class _Request:
    """A request with chunks.

    Attributes:
        request: vLLM's.
        spec: where they stand.
        token_ids: the prompt.
        salt: the caller's own.
        asked: when it was looked up, by `time.monotonic`; 0 before.
        report: what the workers have found so far.
        waits_for: chunks that are computed before it is looked up again.
        promised: preemptions it had had when it was last promised; None before.
        queued: whether its missing chunks wait to be computed.
        plain: whether it is left to vLLM.
    """

    request: Any = field(repr=False)
    spec: ChunkSpec
    token_ids: TokenIds
    salt: str | None
    asked: float = 0.0
    report: Report | None = None
    waits_for: set[Missing] | None = None
    promised: int | None = None
    queued: bool = False
    plain: bool = False


class Scheduling:
    """Decides for the requests of one engine.

    Args:
        options: the connector's.
        ranks: how many workers report.

    Attributes:
        counts: what happened, for the metrics.
    """

    def __init__(self, options: Options, ranks: int) -> None:
        self._options, self._ranks = options, ranks
        self._requests: dict[str, _Request] = {}
        self._orders = Orders()
        self._fused_tokens = 0  # in this step
        self._queue: dict[Missing, None] = {}
        self._looking: set[str] = set()
        self._known = ChunkRegistry()
        self._prefixes: dict[TokenIds, None] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._unstored: dict[Missing, float] = {}  # until when it is not computed again, by `time.monotonic`
        self.counts: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether chunks are still to be computed, so that the engine has to go on stepping."""
        return bool(self._queue)

    def add(self, request: Any) -> None:
        """Take note of a request, and move it to a namespace of vLLM's prefix cache of its own if it has chunks."""
        given = (request.kv_transfer_params or {}).get(NAME)
        if given is False or (given is None and not self._options.find):
            return
        reason = _refusal(request, self._options.share_salted)
        if reason is not None:
            if given is not None:
                self.counts["refused"] += 1
                warn_once("chunkcache: a request is served without reuse: %s", reason)
            return
        ids = tuple(request.prompt_token_ids)
        try:
            spec = self._found(ids) if given is None else ChunkSpec.parse(given, len(ids))
            if given is not None and spec is not None:
                self._remember(spec.prompt(ids).chunks, ids[: spec.context])
        except InputError as error:
            self.counts["malformed"] += 1
            warn_once("a request is served without reuse: %s", error)
            return
        if spec is not None:
            known = _Request(request, spec, ids, request.cache_salt)
            _salt(request, self._salt_of(request, known))
            self._requests[request.request_id] = known

    def matched(self, request: Any, computed: int) -> int | None:
        """Return how many tokens will be loaded beyond the `computed` ones; None to be asked again."""
        known = self._requests.get(request.request_id)
        if known is None or known.plain:
            return 0
        if known.promised is not None:
            if request.num_preemptions <= known.promised:
                return 0  # it could not be loaded
            known.promised, known.asked, known.report = None, 0.0, None
            _salt(request, self._salt_of(request, known))  # all of it is fused again, and so comes out the same
            return None
        if computed > 0:
            return 0
        if known.waits_for:
            if any(missing in self._queue for missing in known.waits_for):
                return None
            known.waits_for, known.asked, known.report = set(), 0.0, None
        if not known.asked:
            self._look_up(request.request_id, known)
            return None
        if known.report is None or known.report.ranks < self._ranks:
            if time.monotonic() - known.asked < self._options.lookup_s:
                return None
            self.counts["timeouts"] += 1
            self._leave(request, known)
            return None
        return self._decide(request, known, known.report)

    def _look_up(self, name: str, known: _Request) -> None:
        """Have the workers look a request up, unless they hold enough of others."""
        if len(self._looking) < LOOKING:
            self._looking.add(name)
            known.asked = time.monotonic()
            self._orders.lookups.append(Lookup(name, known.token_ids, known.spec))

    @staticmethod
    def _salt_of(request: Any, known: _Request) -> str:
        return salt_of(known.spec, known.token_ids, known.salt, f"{request.request_id}:{request.num_preemptions}")

    def _decide(self, request: Any, known: _Request, report: Report) -> int | None:
        missing = self._missing(known, report)
        if missing and known.spec.warm and known.waits_for is None:
            known.waits_for, known.queued = set(missing), True
            self._queue = {**dict.fromkeys(missing), **self._queue}
            self._drop(request.request_id)
            return None
        if not known.queued:
            known.queued = True
            self._queue.update(dict.fromkeys(missing[: max(0, QUEUED - len(self._queue))]))
        tokens = len(known.token_ids)
        if not report.reused or tokens - report.reused > self._options.fresh_tokens:
            self.counts["cold"] += 1
            self._leave(request, known)
            return None
        if self._fused_tokens and self._fused_tokens + tokens > self._options.step_tokens:
            return None
        return tokens - 1

    def _leave(self, request: Any, known: _Request) -> None:
        """Leave a request to vLLM, whose blocks are exact then, may serve others, and are looked for anew."""
        known.plain = True
        self._drop(request.request_id)
        _salt(request, known.salt)

    def _drop(self, name: str) -> None:
        """Have the workers let go of what they found of a request."""
        self._looking.discard(name)
        self._orders.forget.append(name)

    def allocated(self, request: Any, block_ids: list[int], tokens: int) -> None:
        """Fuse a request in this step, whose blocks are there now."""
        known = self._requests.get(request.request_id)
        if known is None or tokens <= 0 or known.report is None:
            return
        known.promised = request.num_preemptions
        self._looking.discard(request.request_id)
        self._fused_tokens += len(known.token_ids)
        report = known.report
        self._orders.loads.append(Load(request.request_id, block_ids, report.missing, report.exact))
        _count_cached(request, sum(_by_tier(known).values()))

    def sources(self, request: Any, tokens: int) -> dict[CacheHitSource, int]:
        """Return where the `tokens` come from that a request was just promised: by vLLM's names of tiers.

        What is in no tier that vLLM has a name for is among its unspecified ones, and so is what is computed in the
        load itself.
        """
        known, found = self._requests.get(request.request_id), Counter[CacheHitSource]()
        for tier, count in (_by_tier(known) if known is not None else {}).items():
            found[SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)] += count
        found[CacheHitSource.EXTERNAL_UNSPECIFIED] += tokens - found.total()
        return {source: count for source, count in found.items() if count}

    def orders(self) -> Orders:
        """Return what the workers are to do in this step."""
        tokens = 0
        while self._queue and tokens < self._options.warm_tokens and not self._orders.loads:
            missing = next(iter(self._queue))
            del self._queue[missing]
            self._orders.missing.append(missing)
            tokens += len(missing.chunk or missing.context)
        orders, self._orders, self._fused_tokens = self._orders, Orders(), 0
        return orders

    def hear(self, news: News) -> None:
        """Take note of what the workers have found and done."""
        for name, report in news.reports.items():
            known = self._requests.get(name)
            if known is not None:
                known.report = report if known.report is None else known.report.with_rank(report)
        self._done.update({name: done for name, done in news.done.items() if name in self._requests})
        for name in news.unloaded & self._requests.keys():
            _count_cached(self._requests[name].request, 0)
        self._unstored.update(dict.fromkeys(news.unstored, time.monotonic() + RETRY_S))
        while len(self._unstored) > QUEUED:
            del self._unstored[next(iter(self._unstored))]

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Forget a request; return what was done for it, which goes to its client."""
        name = request.request_id
        if self._requests.pop(name, None) is None:
            return None
        self._drop(name)
        done = self._done.pop(name, None)
        return None if done is None else {NAME: done}

    def _missing(self, known: _Request, report: Report) -> list[Missing]:
        """Return what would have to be computed for all of a request's chunks to be stored."""
        spec, ids = known.spec, known.token_ids
        chunks, context, policy = spec.prompt(ids).chunks, ids[: spec.context], spec.policy or self._options.policy
        first = [Missing((), ids[: spec.prefix], policy)] if PREFIX in report.missing and spec.prefix else []
        rest = [Missing(chunks[index], context, policy) for index in sorted(report.missing) if index != PREFIX]
        now = time.monotonic()
        return [missing for missing in dict.fromkeys((*first, *rest)) if self._unstored.get(missing, now) <= now]

    def _remember(self, chunks: tuple[TokenIds, ...], prefix: TokenIds) -> None:
        """Make chunks findable in prompts that do not say where they stand."""
        if not self._options.find:
            return
        self._prefixes[prefix] = None
        if len(self._prefixes) > PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        for ids in chunks:
            self._known.add(ChunkRef(ChunkKey.of("", (), ids, ""), ids, ()))

    def _found(self, ids: TokenIds) -> ChunkSpec | None:
        """Return where known chunks stand in a prompt, or None if there are none."""
        spans = [span for span, _ in self._known.find_tokens(ids) if span.stop < len(ids)]
        if not spans:
            return None
        before = [prefix for prefix in self._prefixes if ids[: len(prefix)] == prefix]
        prefix = len(max(before, key=len, default=()))
        spans = [span for span in spans if span.start >= prefix]
        wholes = {index: (span.offset, span.chunk_ids) for index, span in enumerate(spans)}
        return ChunkSpec(prefix, tuple((s.start, s.stop) for s in spans), wholes, prefix) if spans else None


def _by_tier(known: _Request) -> Counter[str]:
    """Return how many tokens of a request all ranks have KV of, by the kind of tier that these came from."""
    report, spec, tiers = known.report or Report(), known.spec, Counter[str]()
    for index, tier in report.sources.items():
        if index not in report.missing:
            start, stop = (0, spec.prefix) if index == PREFIX else spec.spans[index]
            tiers[tier] += stop - start
    return tiers


def _count_cached(request: Any, tokens: int) -> None:
    """Have vLLM count `tokens` of a prompt as cached, instead of all that were promised."""
    if request.prefill_stats is not None and not request.num_preemptions:
        request.prefill_stats.set(request.num_prompt_tokens, 0, tokens)


def _refusal(request: Any, share_salted: bool) -> str | None:
    """Return why a request cannot be fused, or None."""
    if request.cache_salt is not None and not share_salted:
        return "it has a cache_salt, and chunks are shared by all clients of the engine (option share_salted)"
    if request.lora_request is not None:
        return "it has a LoRA adapter, whose KV are others"
    if request.prompt_token_ids is None or getattr(request, "mm_features", None):
        return "its prompt is not token ids alone"
    if request.sampling_params is None or request.skip_reading_prefix_cache:
        return "it wants something of every token of its prompt"
    return None


def _salt(request: Any, salt: str | None) -> None:
    """Move a request to another namespace of vLLM's prefix cache: the hash of each block depends on the first's."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
