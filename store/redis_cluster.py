"""A Redis Cluster: which node keeps an entry, and what is done when one is down or a slot moves.

redis-py's Cluster client is not used: it asks all nodes in turn when one fails, and sleeps between, where a request
is to wait once at most.
"""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import redis
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, TryAgainError

from chunkcache.store.redis_servers import NodeError, NotNowError, Server, Servers
from chunkcache.store.redis_url import Address

T = TypeVar("T")
_FAULTS = (redis.ConnectionError, redis.TimeoutError, OSError)


class Cluster(Servers):
    """The nodes of a Cluster, of which some may be down.

    A node that fails is left alone for a while, and so are its entries; those of the others stay in reach. After a
    failure, and where a node says that a slot has moved, another node is asked who keeps what.

    Args:
        seeds: nodes to ask first.
        connect: opens the connections to a node.
        patience: seconds to wait for another thread that is asking who keeps what.
    """

    def __init__(self, seeds: Sequence[Address], connect: Callable[[Address], Server], patience: float) -> None:
        self._connect, self._patience = connect, patience
        self._nodes = {address: connect(address) for address in seeds}
        self._slots: list[tuple[int, int, Address]] = []
        self._stale = True
        self._lock = threading.Lock()

    def run(self, name: bytes, operation: Callable[[Server], T]) -> T:
        for _ in range(2):
            try:
                return self._on(self._node(key_slot(name)), operation)
            except (AskError, TryAgainError):  # or MOVED, which is one of the first
                self._stale = True
        raise NotNowError("its slot is moving")

    def each(self, operation: Callable[[Server], T], on_fault: Callable[[Exception], None]) -> Iterator[T]:
        self._refresh()
        for address in {address for _, _, address in self._slots}:
            try:
                yield self._on(self._nodes[address], operation)
            except (NodeError, NotNowError) as fault:
                on_fault(fault)

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()

    def _on(self, node: Server, operation: Callable[[Server], T]) -> T:
        if not node.breaker.allows():
            raise NotNowError("its node failed a moment ago")
        try:
            result = operation(node)
        except (*_FAULTS, ClusterDownError) as fault:
            self._stale = True
            raise NodeError(fault, node.breaker.failed()) from fault
        node.breaker.succeeded()
        return result

    def _node(self, slot: int) -> Server:
        self._refresh()
        for first, last, address in self._slots:
            if first <= slot <= last:
                return self._nodes[address]
        self._stale = True
        raise NotNowError("no node has its slot")

    def _refresh(self) -> None:
        """Ask one node who keeps what, if that is not known."""
        if not self._stale:
            return
        if not self._lock.acquire(timeout=self._patience):
            raise NotNowError("another thread is asking who keeps what")
        try:
            if self._stale:
                self._ask()
        finally:
            self._lock.release()

    def _ask(self) -> None:
        nodes = sorted(self._nodes.items(), key=lambda item: item[1].breaker.is_open)
        item = next((item for item in nodes if item[1].breaker.allows()), None)
        if item is None:
            raise NotNowError("all nodes failed a moment ago")
        (host, _), node = item
        try:
            rows = node.client.execute_command("CLUSTER SLOTS")
        except _FAULTS:
            node.breaker.failed()
            raise
        node.breaker.succeeded()
        slots: list[tuple[int, int, Address]] = []
        for first, last, (name, port, *_), *_ in rows:
            named = name.decode() if isinstance(name, bytes) else name
            slots.append((first, last, (named or host, port)))  # a node that does not know its own name
        for _, _, address in slots:
            if address not in self._nodes:
                self._nodes = {**self._nodes, address: self._connect(address)}
        self._slots, self._stale = slots, False
