"""Many requests at once on one model: continuous batching (Orca, OSDI 2022) over fused prefills.

One thread prefills, one prompt at a time; another decodes, a token of every running sequence per step
(`blend.ragged`). A prompt that is prefilled joins between two steps, and one that is done leaves: decoding goes on
beside a prefill and is never behind it in a queue (the aim of Sarathi-Serve, OSDI 2024, without cutting prompts up).
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from chunkcache.blend import FusedCache
from chunkcache.blend.ragged import RaggedDecoder
from chunkcache.engine.engine import Engine, PreparedRequest
from chunkcache.engine.fair import FairQueue, has_room
from chunkcache.engine.faults import log_fault
from chunkcache.engine.generation import new_tokens
from chunkcache.engine.sampling import Sampled, Sampler
from chunkcache.engine.ticket import Deliver, Failed, Finished, Ticket
from chunkcache.errors import ContextLengthError, InputError, QueueFullError

_DECODERS = 8  # one for each adapter that answers of late


@dataclass(frozen=True)
class Limits:
    """What is served at once.

    Attributes:
        running: sequences that decode together.
        waiting: requests that wait for their turn; tenants below their share of them get up to as many again.
        kv_bytes: bytes of KV that running sequences may need together, apart from what the store holds; None for no
            bound.
    """

    running: int = 8
    waiting: int = 64
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.running < 1 or self.waiting < 1:
            raise InputError(f"running={self.running}, waiting={self.waiting}: give 1 or more of each")


class Scheduler:
    """Answers requests together.

    Args:
        engine: what answers. Requests of one adapter decode together, those of different ones take turns.
        limits: what is served at once.

    Attributes:
        limits: as given.
        steps: decoding steps so far.
    """

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.steps = 0
        self._engine = engine
        self._changed = threading.Condition()
        self._waiting: FairQueue[Ticket] = FairQueue()
        self._prefilling: Ticket | None = None
        self._running: list[Ticket] = []
        self._draining = self._closed = False
        self._decoders: dict[str, RaggedDecoder] = {}
        self._threads = [
            threading.Thread(target=work, name=f"chunkcache-{name}", daemon=True)
            for name, work in (("prefill", self._prefill_loop), ("decode", self._decode_loop))
        ]
        for thread in self._threads:
            thread.start()
        _schedulers.add(self)

    def submit(
        self,
        request: PreparedRequest,
        sampler: Sampler,
        deliver: Deliver,
        *,
        tenant: str = "",
        timeout: float | None = None,
        engine: Engine | None = None,
    ) -> Ticket:
        """Take a request on.

        Args:
            request: the prompt, its policy, and the length of its answer.
            sampler: chooses its tokens.
            deliver: called with its tokens, and once with its end, from a thread of the scheduler: it must not block.
            tenant: requests of different tenants take turns.
            timeout: seconds after which it ends, counted from when it was prepared.
            engine: what prefills it, of the same model; by default the scheduler's.

        Raises:
            ContextLengthError: prompt and answer do not fit the model.
            InputError: its KV can never fit, or there is no such adapter.
            QueueFullError: too many wait already, or the server is shutting down.
        """
        tokens, room = len(request.prompt.token_ids), new_tokens(request.options, len(request.prompt.token_ids))
        most = self._engine.decoder.max_tokens
        if tokens + room > most:
            raise ContextLengthError(
                f"the prompt has {tokens} tokens, which with {room} new ones do not fit the model's context of "
                f"{most}; pass fewer or shorter chunks, or a shorter answer"
            )
        self._engine.served.adapters.check(request.adapter)
        needed = self._engine.decoder.kv_bytes_per_token * (tokens + room)
        if self.limits.kv_bytes is not None and needed > self.limits.kv_bytes:
            raise InputError(
                f"the request needs {needed} bytes of KV, and the server keeps {self.limits.kv_bytes}; pass fewer or "
                "shorter chunks"
            )
        deadline = None if timeout is None else request.started + timeout
        ticket = Ticket(engine or self._engine, request, sampler, deliver, room, needed, deadline)
        self._sweep()
        with self._changed:
            self._refuse(tenant)
            self._waiting.put(tenant, ticket)
            self._changed.notify_all()
        return ticket

    def check_room(self, tenant: str = "") -> None:
        """Refuse a tenant's request before anything is done for it.

        Raises:
            QueueFullError: as in `submit`.
        """
        self._sweep()
        with self._changed:
            self._refuse(tenant)

    def _refuse(self, tenant: str) -> None:
        if self._draining or not has_room(self._waiting.counts, tenant, self.limits.waiting):
            raise QueueFullError(len(self._waiting), self._draining)

    @property
    def waiting(self) -> dict[str, int]:
        """How many requests of each tenant wait."""
        with self._changed:
            return self._waiting.counts

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are being answered, and how many wait."""
        with self._changed:
            return len(self._running) + (self._prefilling is not None), len(self._waiting)

    def close(self, timeout: float | None = 0.0) -> None:
        """Take no more requests; give those that are here `timeout` seconds to end (None for all they need)."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (len(self._waiting) or self._prefilling or self._running), timeout)
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for ticket in (*self._running, *self._waiting.drain()):
            ticket.tell(Finished("cancelled", ticket.stats))
        self._running = []

    # --- prefill

    def _prefill_loop(self) -> None:
        while (ticket := self._next()) is not None:
            try:
                with _outcome(ticket):
                    if self._ended(ticket):
                        continue
                    self._start(ticket)
                    if not self._ended(ticket):
                        self._catch_up(ticket)
                        with self._changed:
                            self._running.append(ticket)
            finally:
                with self._changed:
                    self._prefilling = None
                    self._changed.notify_all()

    def _next(self) -> Ticket | None:
        """Wait for a request that fits beside those that run; None when the scheduler closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (len(self._waiting) and self._fits(self._waiting.first())))
            if self._closed:
                return None
            self._prefilling = self._waiting.get()
            return self._prefilling

    def _sweep(self) -> None:
        """End those that wait in vain: their client went away, or their time is over."""
        with self._changed:
            gone = self._waiting.remove(lambda ticket: ticket.over is not None)
        for ticket in gone:
            self._ended(ticket)

    def _fits(self, ticket: Ticket) -> bool:
        if len(self._running) >= self.limits.running:
            return False
        used = sum(each.kv_bytes for each in self._running)
        return self.limits.kv_bytes is None or used + ticket.kv_bytes <= self.limits.kv_bytes

    def _start(self, ticket: Ticket) -> None:
        """Prefill a prompt and choose its first token."""
        ticket.began = time.perf_counter()
        output, ticket.served = ticket.engine.prefilled(ticket.request)
        ticket.cache, ticket.stats = output.past_key_values, output.stats
        sampled = ticket.sampler.choose(output.logits)
        output.stats.ttft_s = time.perf_counter() - ticket.request.started
        self._take(ticket, sampled)

    def _catch_up(self, ticket: Ticket) -> None:
        """Recompute what the policy left for later, while the first token is on its way and others decode."""
        if not isinstance(ticket.cache, FusedCache) or ticket.stats is None:
            return
        with self._engine.served.held(ticket.request.adapter):
            ticket.cache.catch_up()
        ticket.stats.take_later(ticket.cache)

    # --- decoding

    def _decode_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._running)
                running = list(self._running)
                if self._closed:
                    return
            self._sweep()
            left = [ticket for ticket in running if self._ended(ticket)]
            running = [ticket for ticket in running if ticket not in left]
            for model in {ticket.model for ticket in running}:
                left += self._step([ticket for ticket in running if ticket.model == model])
            if left:
                with self._changed:
                    self._running = [ticket for ticket in self._running if ticket not in left]
                    self._changed.notify_all()

    def _step(self, tickets: list[Ticket]) -> list[Ticket]:
        """Decode a token of each, all of one model; return those that are over."""
        try:
            with self._engine.served.held(tickets[0].request.adapter):
                logits = self._decoder(tickets[0]).step(
                    [ticket.last for ticket in tickets],
                    [ticket.cache for ticket in tickets if ticket.cache is not None],
                )
        except BaseException as error:  # noqa: BLE001 - whoever waits is told, and the loop goes on
            log_fault(f"a decoding step of {len(tickets)} sequences failed", error)
            for ticket in tickets:
                ticket.tell(Failed(error))
            return tickets
        self.steps += 1
        over: list[Ticket] = []
        for ticket, row in zip(tickets, logits, strict=True):
            with _outcome(ticket, over):
                self._take(ticket, ticket.sampler.choose(row))
                if self._ended(ticket):
                    over.append(ticket)
        return over

    def _decoder(self, ticket: Ticket) -> RaggedDecoder:
        """Return what decodes with the model as it was when a request was prefilled; the last few are kept."""
        assert ticket.served is not None
        if ticket.fingerprint not in self._decoders:
            if len(self._decoders) >= _DECODERS:
                del self._decoders[next(iter(self._decoders))]
            self._decoders[ticket.fingerprint] = RaggedDecoder(ticket.served.decoder)
        return self._decoders[ticket.fingerprint]

    # --- tokens

    @staticmethod
    def _take(ticket: Ticket, sampled: Sampled) -> None:
        ticket.last = sampled.token_id
        ticket.produced += 1
        ticket.tell(sampled)

    @staticmethod
    def _ended(ticket: Ticket) -> bool:
        """Return whether a request is over, and tell whoever waits for it why."""
        reason = ticket.over
        if reason is None and ticket.last in ticket.sampler.ends:
            reason = "stop"
        elif reason is None and ticket.produced >= ticket.tokens:
            reason = "length"
        if reason is not None:
            ticket.tell(Finished(reason, ticket.stats))
        return reason is not None


@contextmanager
def _outcome(ticket: Ticket, over: list[Ticket] | None = None) -> Iterator[None]:
    """Deliver an error of the block to whoever waits for the ticket."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - likewise
        ticket.tell(Failed(error))
        if over is not None:
            over.append(ticket)


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _close_schedulers() -> None:
    # A thread that is inside torch when the interpreter goes away takes the process down with an abort.
    for scheduler in list(_schedulers):
        scheduler.close()
