"""A queue in which tenants take turns, so that one with many requests does not hold up the others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within a tenant; round robin between tenants. The caller holds the lock."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

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
