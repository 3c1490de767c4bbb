"""Requests as OpenTelemetry traces: a span for each, with spans for what it spent its time on below it.

They are made when a request is over, out of times that are taken anyway. The stages of a prefill take turns, layer
by layer; their spans stand one behind the other, each as long as its stage in all. Names of attributes are those of
the semantic conventions for generative AI and HTTP where these have one. Nothing of a prompt or an answer is in them.
"""

from __future__ import annotations

import os
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from chunkcache.engine.stats import RequestStats
from chunkcache.serve.record import Record

_PATH = "/v1/traces"


class Tracer:
    """Makes a trace of each record that it is called with.

    Args:
        provider: what spans are made of, and where they go.

    Attributes:
        provider: as given; it sends what is left when the process ends.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("chunkcache")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: Record) -> None:
        """Make the spans of one request that is over."""
        name = f"{record.kind} {record.model}" if record.kind else f"{record.method} {record.route}".strip()
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(record.headers),
            kind=SpanKind.SERVER,
            start_time=_wall(record, record.began),
            attributes=_attributes(record),
        )
        if record.error is not None or (record.status or 0) >= 500:
            span.set_attribute("error.type", record.error or str(record.status))
            span.set_status(StatusCode.ERROR)
        for number, stats in enumerate(record.stats):
            self._stages(record, span, number, stats)
        span.end(_wall(record, record.ended or record.began))

    def _stages(self, record: Record, span: Span, number: int, stats: RequestStats) -> None:
        """Make the spans of what one of the answers took."""
        assert record.answers is not None
        at = record.answers.choices[number].request.started
        within = set_span_in_context(span)
        for stage, seconds in stats.stages(queued=True).items():
            if seconds > 0:
                attributes: dict[str, Any] = {"chunkcache.answer": number}
                child = self._tracer.start_span(stage, within, start_time=_wall(record, at), attributes=attributes)
                child.end(_wall(record, at + seconds))
            at += max(0.0, seconds)
        ended = max(record.ended or at, at)
        decode = self._tracer.start_span("decode", within, start_time=_wall(record, at))
        decode.set_attribute("chunkcache.answer", number)
        decode.end(_wall(record, ended))


def tracer(endpoint: str | None) -> Tracer:
    """Return what sends traces by OTLP over HTTP.

    Args:
        endpoint: address of the collector, such as `http://localhost:4318`; None for what OpenTelemetry's own
            environment variables say.
    """
    address = None
    if endpoint is not None:
        address = endpoint if endpoint.endswith(_PATH) else endpoint.rstrip("/") + _PATH
    name = os.environ.get("OTEL_SERVICE_NAME", "chunkcache")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return Tracer(provider)


def _wall(record: Record, at: float) -> int:
    """Return a time by `time.perf_counter` in nanoseconds since the epoch."""
    return int((record.at + at - record.began) * 1e9)


def _attributes(record: Record) -> dict[str, Any]:
    told = record.summary()
    named = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.operation.name": record.kind,
        "gen_ai.provider.name": "chunkcache" if record.kind else None,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": told.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": told.get("completion_tokens"),
        "gen_ai.usage.cache_read.input_tokens": told.get("cached_tokens"),
        "gen_ai.response.finish_reasons": tuple(record.reasons) or None,
        "gen_ai.response.time_to_first_chunk": None if record.first is None else record.first - record.began,
        "chunkcache.request_id": record.identity,
        "chunkcache.tenant": record.tenant,
        "chunkcache.policy": told.get("policy"),
        "chunkcache.hits": told.get("hits"),
        "chunkcache.misses": told.get("misses"),
        "chunkcache.recomputed_share": told.get("recomputed_share"),
    }
    return {name: value for name, value in named.items() if value not in (None, "")}
