"""One server, first come first served: times to first token at any rate of arrivals, from measured service times.

The requests of a sequence were each served alone, in their order, in the cache state that they really met. First come
first served keeps that order at every rate, and so the cache states: all that a rate adds is waiting, which is
simulated here. What follows is exact up to what requests do to one another besides waiting (write-behind, heat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chunkcache.eval.workload import at_rate

STEPS = 24  # of a bisection


@dataclass(frozen=True)
class Service:
    """What one request takes of its server, in seconds: until its first token, and until it is done."""

    first_s: float
    whole_s: float


def serve(arrivals: Sequence[float], services: Sequence[Service]) -> list[float]:
    """Simulate one server; return each request's seconds from its arrival to its first token.

    A request is served when it has come and the one before it is done (Lindley's recursion, 1952).

    Args:
        arrivals: when each request comes, in seconds, in order.
        services: what each takes.
    """
    free, ttfts = 0.0, []
    for arrival, service in zip(arrivals, services, strict=True):
        begins = max(arrival, free)
        free = begins + service.whole_s
        ttfts.append(begins - arrival + service.first_s)
    return ttfts


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly."""
    return float(np.percentile(values, percent))


@dataclass(frozen=True)
class Queue:
    """Requests with their measured service times, and patterns of arrival at one request per second.

    Attributes:
        services: of each request.
        patterns: arrival times, each of as many requests; TTFTs of all patterns are pooled.
    """

    services: Sequence[Service]
    patterns: Sequence[Sequence[float]]

    def ttfts(self, rate: float) -> list[float]:
        """Return all times to first token at `rate` requests per second."""
        return [ttft for pattern in self.patterns for ttft in serve(at_rate(pattern, rate), self.services)]

    def unloaded(self, percent: float) -> float:
        """Return a percentile of the TTFT where no request waits."""
        return percentile([service.first_s for service in self.services], percent)

    @property
    def capacity(self) -> float:
        """Requests per second that the server can just keep up with.

        At this rate and above the queue only grows: what a finite run finds there tells how long the run is.
        """
        return len(self.services) / sum(service.whole_s for service in self.services)

    def highest_rate(self, bound_s: float, percent: float = 90) -> float:
        """Return the highest rate at which a percentile of the TTFT stays within `bound_s`, by bisection.

        0 if it does not even without load; never above the capacity, however short the run.
        """
        if self.unloaded(percent) > bound_s:
            return 0.0
        low, high = 0.0, self.capacity
        if percentile(self.ttfts(high), percent) <= bound_s:
            return high
        for _ in range(STEPS):
            middle = (low + high) / 2
            met = percentile(self.ttfts(middle), percent) <= bound_s
            low, high = (middle, high) if met else (low, middle)
        return low
