"""Single-flight: of several threads that need the same thing computed, one computes it and the others wait."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Flights(Generic[K, V]):
    """What is being computed now, by an identity that all threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_the_air: dict[Hashable, Future[V]] = {}

    def board(self, wanted: Mapping[K, Hashable]) -> Boarded[K, V]:
        """Claim each of `wanted` (names, with identities) that no other thread is computing.

        Use the result as a context, compute what is `mine` in it, and look at `others()` only afterwards: nobody
        waits for a thread that waits, so no two ever wait for each other.
        """
        mine: dict[K, Future[V]] = {}
        others: dict[K, Future[V]] = {}
        with self._lock:
            for name, identity in wanted.items():
                if identity in self._in_the_air:
                    others[name] = self._in_the_air[identity]
                else:
                    mine[name] = self._in_the_air[identity] = Future()
        return Boarded(self, {name: wanted[name] for name in mine}, mine, others)

    def arrived(self, identities: Mapping[K, Hashable]) -> None:
        """Take these off the list of what is being computed."""
        with self._lock:
            for identity in identities.values():
                del self._in_the_air[identity]


class Boarded(Generic[K, V]):
    """One thread's part: what it has to compute, and what it may wait for.

    Attributes:
        mine: names of what this thread has to compute.
    """

    def __init__(
        self,
        flights: Flights[K, V],
        identities: Mapping[K, Hashable],
        mine: dict[K, Future[V]],
        others: dict[K, Future[V]],
    ) -> None:
        self._flights, self._identities = flights, identities
        self._mine, self._others = mine, others
        self.mine = tuple(mine)

    def land(self, name: K, value: V) -> None:
        """Give `value` to those who wait for `name`."""
        self._mine[name].set_result(value)

    def others(self) -> Iterator[V]:
        """Wait for what other threads computed, and yield it; nothing for those that failed."""
        for future in self._others.values():
            if future.exception() is None:
                yield future.result()

    def __enter__(self) -> Boarded[K, V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flights.arrived(self._identities)
        for future in self._mine.values():
            if not future.done():
                future.set_exception(error or RuntimeError("it was not computed"))
