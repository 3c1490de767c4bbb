"""Single-flight: of several threads that need the same thing computed, one computes it and the others wait."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Computations under way, by an identity that all threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[Hashable, Future[V]] = {}

    def claim(self, wanted: Mapping[K, Hashable]) -> Claim[K, V]:
        """Claim each of `wanted` (names, with identities) that no other thread is computing.

        Use the result as a context, compute what is `claimed` in it, and read `others()` only afterwards: nobody
        waits for a thread that waits, so no two ever wait for each other.
        """
        own: dict[K, Future[V]] = {}
        others: dict[K, Future[V]] = {}
        with self._lock:
            for name, identity in wanted.items():
                if identity in self._running:
                    others[name] = self._running[identity]
                else:
                    own[name] = self._running[identity] = Future()
        return Claim(self, {name: wanted[name] for name in own}, own, others)

    def release(self, identities: Mapping[K, Hashable]) -> None:
        """Remove computations that have ended."""
        with self._lock:
            for identity in identities.values():
                del self._running[identity]


class Claim(Generic[K, V]):
    """One thread's part: what it has to compute, and what it may wait for.

    Attributes:
        claimed: names of what this thread has to compute.
    """

    def __init__(
        self,
        flights: SingleFlight[K, V],
        identities: Mapping[K, Hashable],
        own: dict[K, Future[V]],
        others: dict[K, Future[V]],
    ) -> None:
        self._flights, self._identities = flights, identities
        self._own, self._others = own, others
        self.claimed = tuple(own)

    def resolve(self, name: K, value: V) -> None:
        """Give `value` to the threads that wait for `name`."""
        self._own[name].set_result(value)

    def others(self) -> Iterator[tuple[K, V]]:
        """Wait for what other threads compute, and yield it by name; nothing for what failed."""
        for name, future in self._others.items():
            if future.exception() is None:
                yield name, future.result()

    def __enter__(self) -> Claim[K, V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flights.release(self._identities)
        for future in self._own.values():
            if not future.done():
                future.set_exception(error or RuntimeError("it was not computed"))
