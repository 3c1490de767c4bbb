"""What a server counts, under the names that vLLM gives it where it has one, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chunkcache.engine.provenance import COMPUTED
from chunkcache.engine.sampling import Sampled
from chunkcache.engine.scheduler import Scheduler
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.ticket import Event, Failed, Finished
from chunkcache.store import Store, StoreStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STAGE_SECONDS = (0.0005, 0.001, 0.0025, *_SECONDS)
_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
_WHERE = {"device": "device", "memory": "host", "disk": "disk"}  # vLLM's names for tiers
_EXTERNAL = "external_unspecified"  # and for all others
TOLD_ANEW_S = 15.0  # a far tier lists its entries to count them


class Metrics:
    """Counts of one server.

    Args:
        scheduler: says how many requests run and wait.
        store: says what its tiers hold.
    """

    def __init__(self, scheduler: Scheduler, store: Store) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"chunkcache_{name}", text, registry=registry).set_function(value)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"chunkcache_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float] = _SECONDS, label: str = "") -> Histogram:
            labels = (label,) if label else ()
            return Histogram(f"chunkcache_{name}", text, labels, buckets=buckets, registry=registry)

        gauge("num_requests_running", "Requests that are being answered.", lambda: scheduler.load[0])
        gauge("num_requests_waiting", "Requests that wait.", lambda: scheduler.load[1])
        gauge("decode_steps", "Decoding steps so far.", lambda: scheduler.steps)
        self._ttft = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._between = histogram("inter_token_latency_seconds", "From one token of an answer to the next.")
        self._whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._queued = histogram("request_queue_time_seconds", "From the prompt's tokens to its prefill.")
        self._prefill = histogram("request_prefill_time_seconds", "From the prefill's begin to the first token.")
        self._computed = histogram("request_prefill_kv_computed_tokens", "Tokens whose KV were computed.", _TOKENS)
        self._stages = histogram("prefill_stage_seconds", "Stages to the first token.", _STAGE_SECONDS, "stage")
        source = ("source",)
        self._by_source = counter("prompt_tokens_by_source", "Tokens of prompts, by where KV came from.", source)
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts whose stored KV were used as they are.")
        self._cached_by = counter("prompt_tokens_cached_by_source", "These, by where they were stored.", source)
        self._by_fidelity = counter(
            "prompt_tokens_by_fidelity", "Tokens of prompts, by whether stored KV were exact.", ("fidelity",)
        )
        self._hits = counter("chunk_hits", "Chunks whose KV were found, by the tier that they were in.", ("tier",))
        self._chunks = counter("chunks", "Chunks in prompts, by whether they were stored.", ("result",))
        self._ends = counter("request_success", "Answers that ended, by why.", ("finished_reason",))
        self._errors = counter("request_errors", "Requests that were answered with an error.", ("status",))
        registry.register(_Tiers(store))

    def watch(self) -> Callable[[Event], None]:
        """Return what is to be called with every event of one answer."""
        began = time.perf_counter()
        last: float | None = None

        def see(event: Event) -> None:
            nonlocal last
            now = time.perf_counter()
            if isinstance(event, Sampled):
                (self._ttft if last is None else self._between).observe(now - (began if last is None else last))
                last = now
                self._generated.inc()
            elif isinstance(event, Finished):
                self._whole.observe(now - began)
                self._ends.labels(event.reason).inc()
                if event.stats is not None:
                    self._take(event.stats)
            elif isinstance(event, Failed):
                self._ends.labels("error").inc()

        return see

    def failed(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._errors.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)

    def _take(self, stats: RequestStats) -> None:
        self._prompt.inc(stats.tokens)
        self._chunks.labels("hit").inc(stats.hits)
        self._chunks.labels("miss").inc(stats.misses)
        self._queued.observe(stats.queue_s)
        self._prefill.observe(max(0.0, stats.ttft_s - stats.tokenize_s - stats.queue_s))
        self._computed.observe(round(stats.recomputed_share * stats.tokens))
        for stage, seconds in stats.stages(queued=True).items():
            self._stages.labels(stage).observe(max(0.0, seconds))
        reused = stats.cached_tokens
        exact = min(stats.exact_tokens, reused)
        for fidelity, tokens in (
            ("exact", exact),
            ("approximate", reused - exact),
            ("computed", stats.tokens - reused),
        ):
            self._by_fidelity.labels(fidelity).inc(tokens)
        self._take_sources(stats)

    def _take_sources(self, stats: RequestStats) -> None:
        """Count where KV came from that were used as they are."""
        if stats.report is None:
            return
        for chunk in stats.report.chunks:
            if chunk.source != COMPUTED:
                self._hits.labels(chunk.source).inc()
        cached = external = 0
        for part in (stats.report.prefix, *stats.report.chunks):
            if part is not None and part.source != COMPUTED:
                source = _WHERE.get(part.source, _EXTERNAL)
                self._cached_by.labels(source).inc(part.reused_tokens)
                cached += part.reused_tokens
                external += part.reused_tokens if source == _EXTERNAL else 0
        self._cached.inc(cached)
        self._by_source.labels("local_compute").inc(stats.tokens - cached)
        self._by_source.labels("local_cache_hit").inc(cached - external)
        self._by_source.labels("external_kv_transfer").inc(external)


class _Tiers(Collector):
    """What the tiers of a store hold and have done."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._told: dict[str, StoreStats] = {}
        self._at = -TOLD_ANEW_S

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        if time.monotonic() - self._at >= TOLD_ANEW_S:
            self._told = {name: tier.stats() for name, tier in self._store.tiers().items()}
            self._at = time.monotonic()
        gauges = {"kv_bytes": "nbytes", "kv_entries": "entries"}
        counters = ("hits", "misses", "evictions", "errors", "refused")
        for name, attribute in gauges.items():
            gauge = GaugeMetricFamily(f"chunkcache_{name}", f"{attribute} of chunk KV in a tier.", labels=("tier",))
            for tier, stats in self._told.items():
                gauge.add_metric((tier,), getattr(stats, attribute))
            yield gauge
        for attribute in counters:
            counter = CounterMetricFamily(
                f"chunkcache_store_{attribute}", f"{attribute} of a tier; see StoreStats.", labels=("tier",)
            )
            for tier, stats in self._told.items():
                counter.add_metric((tier,), getattr(stats, attribute))
            yield counter

    def describe(self) -> list[Metric]:
        """Name nothing ahead, so that no tier is asked before somebody wants to know."""
        return []
