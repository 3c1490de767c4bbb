"""The order of retrieved chunks: as the retriever ranked them, or near to it and like an order served before.

Chunks that begin a prompt just as they began an earlier one are reused exactly. ContextPilot (arXiv 2511.03475) keeps
an index of contexts that were served and orders new ones by it; here no chunk moves further from its rank than is
allowed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

from chunkcache.errors import InputError


class ServedOrders:
    """Sequences of chunk names that were served, as a bounded trie; safe to use from several threads.

    Args:
        limit: most sequences that are remembered; the one served longest ago goes first.

    Raises:
        InputError: `limit` is below 1.
    """

    def __init__(self, limit: int = 1000) -> None:
        if limit < 1:
            raise InputError(f"limit={limit} leaves no order to remember; pass 1 or more")
        self._limit = limit
        self._lock = threading.Lock()
        self._served: OrderedDict[tuple[Hashable, ...], None] = OrderedDict()
        self._root = _Node()

    def record(self, names: Sequence[Hashable], behind: Hashable = None) -> None:
        """Take note that chunks of these names were served in this order.

        Args:
            names: in the order of the prompt, such as `chunk_name(token_ids)` of each chunk.
            behind: what stands before them, such as the name of the prefix and the policy. Orders behind something
                else are kept apart.
        """
        path = (behind, *names)
        if len(path) == 1:
            return
        with self._lock:
            if path in self._served:
                self._served.move_to_end(path)
                return
            self._served[path] = None
            node = self._root
            for name in path:
                node = node.children.setdefault(name, _Node())
                node.paths += 1
            if len(self._served) > self._limit:
                self._forget(self._served.popitem(last=False)[0])

    def arrange(self, names: Sequence[Hashable], tolerance: int, behind: Hashable = None) -> list[int]:
        """Return the order in which to serve chunks, as indices into `names`.

        Of all orders in which no chunk stands more than `tolerance` places from its rank, it is the one that agrees
        longest, from its beginning, with an order that was served; and of several the one nearest to the ranks, which
        is the lexicographically smallest.

        Args:
            names: of the chunks, best ranked first; repeats are allowed.
            tolerance: places that a chunk may move up or down; 0 keeps the order.
            behind: as in `record`.

        Raises:
            InputError: `tolerance` is negative.
        """
        if tolerance < 0:
            raise InputError(f"tolerance={tolerance} is negative; pass 0 to keep the order, or places to move")
        best: tuple[int, ...] = ()
        if tolerance:
            with self._lock:
                start = self._root.children.get(behind)
                for beginning in _beginnings(start, names, tolerance) if start is not None else ():
                    if len(beginning) > len(best):  # the first of a length is the smallest
                        best = beginning
        chosen = set(best)
        return [*best, *(index for index in range(len(names)) if index not in chosen)]

    def __len__(self) -> int:
        return len(self._served)

    def _forget(self, path: tuple[Hashable, ...]) -> None:
        node = self._root
        for name in path:
            child = node.children[name]
            child.paths -= 1
            if not child.paths:
                del node.children[name]
                return
            node = child


class _Node:
    """A place in the trie: what was served next, and how many sequences go through here."""

    __slots__ = ("children", "paths")

    def __init__(self) -> None:
        self.children: dict[Hashable, _Node] = {}
        self.paths = 0


def _beginnings(root: _Node, names: Sequence[Hashable], tolerance: int) -> Iterator[tuple[int, ...]]:
    """Yield the beginnings of orders that were served and can still be completed, smallest first at each length.

    What is not in a beginning follows by rank. Of that, the best ranked is moved furthest, since it gives way to all
    that was preferred to it; so it alone has to be looked at.
    """
    stack: list[tuple[_Node, tuple[int, ...]]] = [(root, ())]
    while stack:
        node, placed = stack.pop()
        yield placed
        position = len(placed)
        first_left = next((index for index in range(len(names)) if index not in placed), len(names))
        tried: set[Hashable] = set()
        found = []
        for index in range(first_left, min(position + tolerance + 1, len(names))):
            name = names[index]
            if index in placed or name in tried or name not in node.children:
                continue
            tried.add(name)  # of equal ones the best ranked comes first
            left = first_left
            while left == index or left in placed:
                left += 1
            if abs(index - position) <= tolerance and position + 1 - left <= tolerance:
                found.append((node.children[name], (*placed, index)))
        stack += reversed(found)


def distinct(texts: Sequence[str]) -> list[int]:
    """Return the indices of texts that say something of their own, in order.

    Left out is a text that repeats an earlier one, and one that stands whole in another; space around a text does not
    count. An empty text is kept, for the prompt to refuse.
    """
    stripped = [text.strip() for text in texts]
    first: dict[str, int] = {}
    for index, text in enumerate(stripped):
        first.setdefault(text, index)
    return [
        index
        for text, index in first.items()
        if not text or not any(len(text) < len(other) and text in other for other in first)
    ]
