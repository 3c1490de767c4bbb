"""What a server counts, under the names that vLLM gives it where it has one, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from chunkcache.engine.sampling import Sampled
from chunkcache.engine.scheduler import Scheduler
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.ticket import Event, Failed, Finished

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts of one server.

    Args:
        scheduler: says how many requests run and wait.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"chunkcache_{name}", text, registry=registry).set_function(value)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"chunkcache_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"chunkcache_{name}", text, buckets=_SECONDS, registry=registry)

        gauge("num_requests_running", "Requests that are being answered.", lambda: scheduler.load[0])
        gauge("num_requests_waiting", "Requests that wait.", lambda: scheduler.load[1])
        gauge("decode_steps", "Decoding steps so far.", lambda: scheduler.steps)
        self._ttft = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._between = histogram("inter_token_latency_seconds", "From one token of an answer to the next.")
        self._whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._by_source = counter(
            "prompt_tokens_by_source", "Tokens of prompts, by where their KV came from.", ("source",)
        )
        self._chunks = counter("chunks", "Chunks in prompts, by whether they were stored.", ("result",))
        self._ends = counter("request_success", "Answers that ended, by why.", ("finished_reason",))
        self._errors = counter("request_errors", "Requests that were answered with an error.", ("status",))

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
        reused = stats.cached_tokens
        exact = min(stats.exact_tokens, reused)
        for source, tokens in (
            ("exact", exact),
            ("approximate", reused - exact),
            ("computed", stats.tokens - reused),
        ):
            self._by_source.labels(source).inc(tokens)
