"""A queue in which tenants take turns, so that one with many requests does not hold up the others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


def has_room(waiting: Mapping[str, int], tenant: str, most: int) -> bool:
    """Return whether one more of a tenant may wait.

    Where `most` wait, a tenant that has less than its share of these places still gets one, until twice as many wait:
    so one tenant alone cannot keep the others out.

    Args:
        waiting: how many of each tenant wait.
        tenant: who asks.
        most: that wait at once, but for those below their share.
    """
    count = sum(waiting.values())
    share = max(1, most // len({*waiting, tenant}))
    return count < most or (count < 2 * most and waiting.get(tenant, 0) < share)


class FairQueue(Generic[T]):
    """First come, first served within a tenant; round robin between tenants. The caller holds the lock."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    @property
    def counts(self) -> dict[str, int]:
        """How many items each tenant has; those without any are left out."""
        return {tenant: len(items) for tenant, items in self._tenants.items()}

    def put(self, tenant: str, item: T) -> None:
        """Append an item of a tenant."""
        self._tenants.setdefault(tenant, deque()).append(item)

    def first(self) -> T:
        """Return the item whose turn it is, and leave it there.

        Raises:
            IndexError: there is none.
        """
        for items in self._tenants.values():
            return items[0]
        raise IndexError("the queue is empty")

    def get(self) -> T:
        """Take the item whose turn it is; its tenant is the last in turn from now on.

        Raises:
            IndexError: there is none.
        """
        item = self.first()
        tenant, items = self._tenants.popitem(last=False)
        items.popleft()
        if items:
            self._tenants[tenant] = items
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take the items that are unwanted, wherever they stand."""
        removed: list[T] = []
        for tenant, items in list(self._tenants.items()):
            gone = [item for item in items if unwanted(item)]
            if gone:
                removed += gone
                self._tenants[tenant] = deque(item for item in items if item not in gone)
                if not self._tenants[tenant]:
                    del self._tenants[tenant]
        return removed

    def drain(self) -> Iterator[T]:
        """Take all items."""
        while self._tenants:
            yield self.get()
