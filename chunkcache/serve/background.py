"""Work that no answer waits for: chunk KV that are computed ahead, and documents that are indexed.

One thread does it, a step at a time, and tenants take turns at each step. So it takes none of the threads that
prepare answers, ends with its client after the step it is in, and changes of an index never happen side by side.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from chunkcache.engine.fair import FairQueue, has_room
from chunkcache.engine.scheduler import Scheduler
from chunkcache.errors import QueueFullError

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields after each step, and returns what came of it

_GIVE_WAY_S = 1.0  # that a step is put off at most while requests are under way
_LOOK_S = 0.01


@dataclass(eq=False)
class _Job:
    tenant: str
    steps: Steps[Any]
    future: Future[Any] = field(default_factory=Future)


class Background:
    """Does work of tenants step by step, and gives way to requests.

    Args:
        scheduler: answers requests; its limit on those that wait holds for jobs, too.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._jobs: FairQueue[_Job] = FairQueue()
        self._under_way: Counter[str] = Counter()  # by tenant
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "chunkcache-background")

    def submit(self, tenant: str, steps: Steps[T]) -> Future[T]:
        """Take on a job; cancelling the future ends it after the step it is in.

        Raises:
            QueueFullError: too many requests and jobs wait already, or the server is shutting down.
        """
        job = _Job(tenant, steps)
        with self._lock:
            waiting = self._under_way + Counter(self._scheduler.waiting)
            if self._closed or not has_room(waiting, tenant, self._scheduler.limits.waiting):
                raise QueueFullError(waiting.total(), self._closed)
            self._under_way[tenant] += 1
            self._queue(job)
        return job.future

    @property
    def under_way(self) -> int:
        """How many jobs there are, with the one whose step is being done."""
        with self._lock:
            return self._under_way.total()

    def close(self) -> None:
        """Take on nothing more, and end what is under way after its step."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs.drain())
            self._under_way -= Counter(job.tenant for job in jobs)
        for job in jobs:
            _end(job, QueueFullError(0, draining=True))
        self._thread.shutdown()

    def _queue(self, job: _Job) -> None:
        self._jobs.put(job.tenant, job)
        self._thread.submit(self._turn)

    def _turn(self) -> None:
        """Do one step of the job whose turn it is."""
        end = time.monotonic() + _GIVE_WAY_S
        while any(self._scheduler.load) and time.monotonic() < end and not self._closed:
            time.sleep(_LOOK_S)
        with self._lock:
            if self._closed:
                return
            job = self._jobs.get()
        going = _step(job)
        with self._lock:
            if going and not self._closed:
                self._queue(job)
                return
            self._under_way -= Counter([job.tenant])
        if going:
            _end(job, QueueFullError(0, draining=True))


def _step(job: _Job) -> bool:
    """Do the next step of a job; return whether there are more."""
    if job.future.cancelled():
        job.steps.close()
        return False
    try:
        next(job.steps)
    except StopIteration as end:
        with suppress(InvalidStateError):  # it was cancelled meanwhile
            job.future.set_result(end.value)
    except Exception as error:  # noqa: BLE001 - told to whoever waits for it
        _end(job, error)
    else:
        return True
    return False


def _end(job: _Job, error: Exception) -> None:
    job.steps.close()
    with suppress(InvalidStateError):
        job.future.set_exception(error)
