"""One request that a scheduler has taken on, and what it tells of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from transformers.cache_utils import Cache

from chunkcache.engine.engine import Engine, PreparedRequest
from chunkcache.engine.faults import log_fault
from chunkcache.engine.sampling import Sampled, Sampler
from chunkcache.engine.served import Served
from chunkcache.engine.stats import RequestStats

Reason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: why it ended.
        stats: what the request did; None where it was not prefilled.
    """

    reason: Reason
    stats: RequestStats | None


@dataclass(frozen=True)
class Failed:
    """A request that went wrong.

    Attributes:
        error: what went wrong.
    """

    error: BaseException


Event = Sampled | Finished | Failed
Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Ticket:
    """One request that was taken on; `cancel` may be called from any thread."""

    engine: Engine
    request: PreparedRequest
    sampler: Sampler
    deliver: Deliver
    tokens: int
    kv_bytes: int
    deadline: float | None
    cancelled: threading.Event = field(default_factory=threading.Event)
    served: Served | None = None
    cache: Cache | None = None
    stats: RequestStats | None = None
    began: float = 0.0  # when its prefill began, by `time.perf_counter`
    last: int = -1
    produced: int = 0

    def cancel(self) -> None:
        """End it after the step it is in; nothing more is delivered but its end."""
        self.cancelled.set()

    def tell(self, event: Event) -> None:
        """Deliver an event. A fault of whoever takes it ends this request, and no other."""
        if not isinstance(event, Sampled):
            self.cache = None  # its KV go now
        try:
            self.deliver(event)
        except Exception as error:  # noqa: BLE001 - it is logged, and no other request is the worse for it
            log_fault("an event of a request could not be delivered", error)
            self.cancel()

    @property
    def fingerprint(self) -> str:
        """Which model it was prefilled with; those of one model decode together, whosever they are."""
        return "" if self.served is None else self.served.library.fingerprint

    @property
    def over(self) -> Reason | None:
        """Why it must end now, if it must."""
        if self.cancelled.is_set():
            return "cancelled"
        if self.deadline is not None and time.perf_counter() > self.deadline:
            return "deadline"
        return None
