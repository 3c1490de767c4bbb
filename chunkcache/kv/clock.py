"""Times the stages of a request where their work is done: on the host, or in the queue of an accelerator.

The host runs ahead of an accelerator, and its own clock says there how long it took to ask for the work. So what is
noted on an accelerator is an event in its queue, and events become seconds when somebody
asks for them: best after the first token was waited for, when all of them are past. Untested on a GPU.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from chunkcache.kv.device import timed_event

Mark = Any  # a time of the host in seconds, or an event


class StageClock:
    """Adds up how long each stage took; for one thread.

    Args:
        device: where the work is done. Of a model on several devices, the first: events tell of one queue only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_host = device.type == "cpu"
        self._stages: list[str] = []  # the one that runs, behind those around it
        self._since: Mark = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, Mark, Mark]] = []  # of an accelerator: what is not counted yet

    def mark(self) -> Mark:
        """Return this moment; on an accelerator, when the work that was asked for by now is done."""
        return time.perf_counter() if self._on_host else timed_event(self._device)

    def between(self, start: Mark, end: Mark) -> float:
        """Return the seconds from one mark to a later one; waits where the work in between is not done."""
        if self._on_host:
            return float(end - start)
        if not end.query():
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block for stage `name`, but for what other stages inside it take."""
        self._switch(name)
        try:
            yield
        finally:
            self._switch(None)

    def seconds(self, *names: str) -> float:
        """Return the seconds that stages took; waits where their work is not done."""
        spans, self._spans = self._spans, []
        for name, start, end in spans:
            self._seconds[name] += self.between(start, end)
        return sum(self._seconds[name] for name in names)

    def _switch(self, name: str | None) -> None:
        now = self.mark()
        if self._stages:
            ended = self._stages[-1]
            if self._on_host:
                self._seconds[ended] += now - self._since
            else:
                self._spans.append((ended, self._since, now))
        self._since = now
        if name is None:
            self._stages.pop()
        else:
            self._stages.append(name)


def wait_for(tensor: Tensor) -> None:
    """Wait until a tensor's values are there."""
    if tensor.device.type != "cpu":
        timed_event(tensor.device).synchronize()
