"""What is known of each request while it runs and when it is over, for logs, traces and the dashboard.

Nothing here is text of a prompt or an answer.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from chunkcache.engine.sampling import Sampled
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.ticket import Event, Failed, Finished

if TYPE_CHECKING:
    from chunkcache.serve.answers import Answers
    from chunkcache.serve.service import Choice

Watch = Callable[[], Callable[[Event], None]]
_IDENTITY = re.compile(r"[A-Za-z0-9._:@+=-]{1,128}")
_COUNTS = ("policy", "chunks", "hits", "misses")


@dataclass(eq=False)
class Record:
    """One HTTP request.

    Attributes:
        identity: its `x-request-id`: the client's, where that is well formed, or a new one.
        method: the HTTP method.
        headers: the headers that traces are taken over from.
        number: counts the requests of this process.
        began: when it came, by `time.perf_counter`.
        at: when it came, in seconds since the epoch.
        route: the route that answers it, as it is declared; "" where there is none.
        tenant: who asks, once that is known.
        kind: `chat` or `text_completion` for a request for answers, else "".
        model: what the client calls the model.
        status: of the HTTP answer; None before it begins.
        gone: whether the client went away before its end.
        error: type of the error that ended it, where nobody expected that.
        answers: the answers; None for requests that ask for none.
        first: when the first token came, by `time.perf_counter`.
        reasons: why each answer ended, in the order of their ends.
        ended: when it was over, by `time.perf_counter`.
    """

    identity: str
    method: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    number: int = 0
    began: float = field(default_factory=time.perf_counter)
    at: float = field(default_factory=time.time)
    route: str = ""
    tenant: str = ""
    kind: str = ""
    model: str = ""
    status: int | None = None
    gone: bool = False
    error: str | None = None
    answers: Answers | None = field(default=None, repr=False)
    first: float | None = None
    reasons: list[str] = field(default_factory=list)
    ended: float | None = None

    def watching(self, watch: Watch) -> Watch:
        """Return `watch`, called once per answer for what sees its events, so that this record sees them, too."""

        def begin() -> Callable[[Event], None]:
            see = watch()

            def both(event: Event) -> None:
                see(event)
                self._note(event)

            return both

        return begin

    @property
    def state(self) -> str:
        """`waiting`, `prefilling`, `decoding` or `done`."""
        if self.ended is not None:
            return "done"
        tickets = () if self.answers is None else self.answers.tickets
        if any(ticket.stats is not None for ticket in tickets):
            return "decoding"
        return "prefilling" if any(ticket.began for ticket in tickets) else "waiting"

    @property
    def stats(self) -> list[RequestStats]:
        """What was done for each answer that was prefilled, in their order."""
        tickets = () if self.answers is None else self.answers.tickets
        return [ticket.stats for ticket in tickets if ticket.stats is not None]

    def summary(self) -> dict[str, Any]:
        """Return it as a plain dict for JSON, in which what is not known, or does not apply, is left out."""
        ended = time.perf_counter() if self.ended is None else self.ended
        told: dict[str, Any] = {
            "id": self.identity,
            "tenant": self.tenant,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "duration_s": round(ended - self.began, 6),
            "client_gone": self.gone or None,
            "error": self.error,
            "model": self.model,
        }
        if self.answers is not None:
            told |= {
                "answers": len(self.answers.choices),
                "prompt_tokens": self.answers.prompt_tokens,
                "completion_tokens": self.answers.completion_tokens,
                "cached_tokens": self.answers.cached_tokens,
                "finish": self.reasons,
            }
        for stats in self.stats[:1]:
            told |= {name: getattr(stats, name) for name in _COUNTS}
            told |= {
                "recomputed_share": round(stats.recomputed_share, 6),
                "ttft_s": round(stats.ttft_s, 6),
                "stages_s": stages_s(stats),
            }
        return {name: value for name, value in told.items() if value not in (None, "", [])}

    def _note(self, event: Event) -> None:
        if isinstance(event, Sampled):
            self.first = self.first or time.perf_counter()
        elif isinstance(event, Finished):
            self.reasons.append(event.reason)
        elif isinstance(event, Failed):
            self.reasons.append("error")
            self.error = type(event.error).__name__


class Recorder:
    """Keeps the records of requests that run, and tells of each when it is over.

    Args:
        observers: called with each record at its end.
    """

    def __init__(self, observers: Sequence[Callable[[Record], None]] = ()) -> None:
        self._observers = list(observers)
        self._numbers = itertools.count(1)
        self._running: dict[int, Record] = {}

    def add(self, observer: Callable[[Record], None]) -> None:
        """Tell one more observer."""
        self._observers.append(observer)

    def begin(self, method: str, headers: Mapping[str, str]) -> Record:
        """Return the record of a request that has come, by its method and headers, whose names are in lower case."""
        given = headers.get("x-request-id", "")
        identity = given if _IDENTITY.fullmatch(given) else uuid4().hex
        kept = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        record = Record(identity, method, kept, next(self._numbers))
        self._running[record.number] = record
        return record

    def end(self, record: Record) -> None:
        """Say that a request is over."""
        record.ended = time.perf_counter()
        self._running.pop(record.number, None)
        for observer in self._observers:
            observer(record)

    @property
    def running(self) -> list[Record]:
        """The requests that run, as they came."""
        return list(self._running.values())


def stages_s(stats: RequestStats) -> dict[str, float]:
    """Return where the time to the first token went, in seconds as clients and logs are told."""
    return {name: round(seconds, 6) for name, seconds in stats.stages(queued=True).items()}


def by_chunk(stats: RequestStats, choice: Choice) -> list[dict[str, Any]]:
    """Return what clients are told of each chunk of a prompt, in order; nothing where it is not known.

    `guard` is `held` where an approximate chunk passed under the fidelity guard, and `full` where that fell back to
    full prefill; without a guard it is not there.
    """
    if stats.report is None:
        return []
    told = []
    spans = {span.start: span for span in choice.request.prompt.spans}
    guard = "full" if stats.guard_full else "held" if stats.guard_passes else None
    for index, chunk in enumerate(stats.report.chunks):
        document = choice.documents.get(spans[chunk.start].chunk_ids) if chunk.start in spans else None
        told.append(
            {
                "index": index,
                **({} if document is None else {"document": document}),
                "start": chunk.start,
                "tokens": chunk.tokens,
                "source": chunk.source,
                "lead": chunk.lead,
                "reused_tokens": chunk.reused_tokens,
                "recomputed_tokens": chunk.recomputed_tokens,
                "exact": chunk.exact,
                **({} if guard is None or not (guard == "full" or chunk.reused_tokens) else {"guard": guard}),
            }
        )
    return told
