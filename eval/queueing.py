"""One server, first come first served: times to first token at any rate of arrivals, from measured service times.

The requests of a sequence were each served alone, in their order, in the cache state that they really met. First come
first served keeps that order at every rate, and so the cache states: all that a rate adds is waiting, which is
simulated here. What follows is exact up to what requests do to one another besides waiting (write-behind, heat).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chunkcache.eval.workload import at_rate, check_rate

STEPS = 24  # of a bisection
_CEILING = 1e6  # times the rate at which one request follows the other: above, no bound on the TTFT is met or missed


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
        """Requests per second that the server can just keep up with."""
        return len(self.services) / sum(service.whole_s for service in self.services)

    def highest_rate(self, bound_s: float, percent: float = 90) -> float | None:
        """Return the highest rate at which a percentile of the TTFT stays within `bound_s`.

        0 if it does not even without load; None if so few requests stay within it however close they come.
        """
        if self.unloaded(percent) > bound_s:
            return 0.0

        def met(rate: float) -> bool:
            return percentile(self.ttfts(rate), percent) <= bound_s

        return _highest(met, self.capacity)


def _highest(met: Callable[[float], bool], start: float) -> float | None:
    """Return the highest rate that meets a bound which all lower ones meet, too, by bisection."""
    check_rate(start)
    low, high = 0.0, start
    while met(high):
        low, high = high, 2 * high
        if high > _CEILING * start:
            return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low
