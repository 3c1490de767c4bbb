"""The answers to one request as they come, from the scheduler's threads into the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from chunkcache.engine.detokenizer import Detokenizer
from chunkcache.engine.faults import log_fault
from chunkcache.engine.sampling import Sampled
from chunkcache.engine.scheduler import Scheduler
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.ticket import Event, Failed, Finished, Ticket
from chunkcache.errors import QueueFullError
from chunkcache.serve.record import by_chunk, stages_s
from chunkcache.serve.service import Choice


@dataclass(frozen=True)
class Piece:
    """Some text of one answer.

    Attributes:
        index: which answer.
        text: what was added to it.
        tokens: the tokens that came since the piece before.
        finish: why it is over; None while it is not.
    """

    index: int
    text: str
    tokens: tuple[Sampled, ...] = ()
    finish: str | None = None


@dataclass
class Answers:
    """The answers to one request, to be iterated over once; leaving the loop early ends them.

    Attributes:
        stats: what was done for each answer, by its index.
        prompt_tokens: tokens of all prompts, each counted once.
        completion_tokens: tokens of all answers so far.
    """

    scheduler: Scheduler
    choices: Sequence[Choice]
    stop: Sequence[str] = ()
    tenant: str = ""
    timeout: float | None = None
    watch: Callable[[], Callable[[Event], None]] | None = None
    stats: dict[int, RequestStats] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []

    def submit(self) -> None:
        """Hand all answers to the scheduler, or none.

        Raises:
            QueueFullError, InputError: one is not taken on.
        """
        loop = asyncio.get_running_loop()

        def deliver(index: int, event: Event) -> None:
            ended = not isinstance(event, Sampled) and self.choices[index].found is not None
            try:
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))
                if ended:
                    loop.call_soon_threadsafe(loop.run_in_executor, None, self._settle, index)
            except RuntimeError:  # the loop has closed: nobody waits any more
                if ended:
                    self._settle(index)

        try:
            for index, choice in enumerate(self.choices):
                ticket = self.scheduler.submit(
                    choice.request, choice.sampler, partial(deliver, index), tenant=self.tenant, timeout=self.timeout,
                    engine=choice.llm.engine,
                )  # fmt: skip
                self._tickets.append(ticket)
        except BaseException:
            self.cancel()
            raise
        prompts = {id(choice.request): len(choice.request.prompt.token_ids) for choice in self.choices}
        self.prompt_tokens = sum(prompts.values())

    def _settle(self, index: int) -> None:
        """Delete what an answer that is over computed of documents that went meanwhile; it may wait for a store."""
        found = self.choices[index].found
        assert found is not None
        try:
            found.ended()
        except Exception as error:  # noqa: BLE001 - the answer is there, and nobody waits for this
            log_fault("KV of documents that went during a request could not be deleted", error)

    @property
    def tickets(self) -> Sequence[Ticket]:
        """The answers as the scheduler has them, in their order."""
        return self._tickets

    def cancel(self) -> None:
        """End all answers after the step they are in."""
        for ticket in self._tickets:
            ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield pieces as they come.

        Raises:
            Exception: what went wrong with one of the answers, or that the server ends before they do.
        """
        texts = [Detokenizer(choice.llm.tokenizer, self.stop, choice.shown) for choice in self.choices]
        pending: list[list[Sampled]] = [[] for _ in self.choices]
        watches = [_unseen if self.watch is None else self.watch() for _ in self.choices]
        going = set(range(len(self.choices)))
        try:
            while going:
                index, event = await self._queue.get()
                if index not in going:
                    continue
                watches[index](event)
                if isinstance(event, Sampled):
                    pending[index].append(event)
                text, finish = self._read(index, event, texts[index])
                if finish is not None:
                    going.discard(index)
                    if isinstance(event, Sampled):  # by a stop string, before the scheduler knows of it
                        watches[index](Finished("stop", self.stats.get(index)))
                if text or finish:
                    yield Piece(index, text, tuple(pending[index]), finish)
                    pending[index] = []
        finally:
            self.cancel()

    def _read(self, index: int, event: Event, text: Detokenizer) -> tuple[str, str | None]:
        """Return what an event adds to the text of an answer, and why that is over now, if it is."""
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            if event.reason == "cancelled":
                raise QueueFullError(0, draining=True)
            self._note(index, event.stats)
            piece = text.finish()
            return piece, "stop" if text.stopped else event.reason
        self.completion_tokens += 1
        piece = text.push(event.token_id)
        if not text.stopped:
            return piece, None
        self._note(index, self._tickets[index].stats)
        self._tickets[index].cancel()
        return piece, "stop"

    def _note(self, index: int, stats: RequestStats | None) -> None:
        if stats is not None:
            self.stats[index] = stats

    def extra(self) -> dict[str, Any]:
        """Return what stands beside OpenAI's fields: the documents that were found in an index."""
        found = self.choices[0].found
        return {} if found is None else {"chunkcache": {"documents": found.told}}

    @property
    def cached_tokens(self) -> int:
        """Tokens of all prompts that no answer so far computed, each counted once."""
        cached: dict[int, int] = {}
        for index, stats in self.stats.items():
            prompt = id(self.choices[index].request)
            cached[prompt] = min(_not_computed(stats), cached.get(prompt, stats.tokens))
        return sum(cached.values())

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's `usage`, with what was reused."""
        each = [self.stats[index] for index in sorted(self.stats)]
        details: dict[str, Any] = {
            "cached_tokens": self.cached_tokens,
            "cache_write_tokens": sum(stats.computed_tokens for stats in each),
        }
        if each:
            details["chunkcache"] = [_told(self.stats[index], self.choices[index]) for index in sorted(self.stats)]
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": details,
        }


def _unseen(event: Event) -> None:
    """Take no note of an event."""


def _not_computed(stats: RequestStats) -> int:
    """Return how many rows of a prompt were reused as they were; a row is a token in all layers."""
    computed = round(stats.recomputed_share * stats.tokens)
    return max(0, min(stats.cached_tokens, stats.tokens - computed))


def _told(stats: RequestStats, choice: Choice) -> dict[str, Any]:
    """Return what clients are told of a request, under `usage.prompt_tokens_details.chunkcache`."""
    return {
        "policy": stats.policy,
        "chunks": stats.chunks,
        "hits": stats.hits,
        "misses": stats.misses,
        "lost": stats.lost,
        "reused_tokens": stats.reused_tokens,
        "exact_tokens": stats.exact_tokens,
        "recomputed_share": round(stats.recomputed_share, 6),
        "guard_full": stats.guard_full,
        "by_chunk": by_chunk(stats, choice),
        "ttft_s": round(stats.ttft_s, 6),
        "stages_s": stages_s(stats),
    }
