"""Tombstones: what was deleted when, so that nothing computed before is stored afterwards."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import takewhile
from typing import Any

KEPT = 10_000  # tombstones remembered of each kind; the oldest go first


class Tombs:
    """When single keys, and everything that agrees with some condition, were deleted; safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: OrderedDict[str, float] = OrderedDict()  # both in the order of time
        self._conditions: OrderedDict[Hashable, float] = OrderedDict()

    def bury(self, what: Any) -> None:
        """Take note that `what`, the digest of a key or else a condition, is deleted now."""
        tombs: OrderedDict[Any, float] = self._keys if isinstance(what, str) else self._conditions
        with self._lock:
            tombs[what] = time.time()
            tombs.move_to_end(what)
            if len(tombs) > KEPT:
                tombs.popitem(last=False)

    def cover(self, digest: str, created: float, agrees: Callable[[Any], bool]) -> bool:
        """Return whether what was created at `created` has been deleted since, alone or with all that agree."""
        with self._lock:
            if created <= self._keys.get(digest, -math.inf):
                return True
            since = takewhile(lambda tomb: created <= tomb[1], reversed(self._conditions.items()))
            return any(agrees(condition) for condition, _ in since)
