"""How much a tier keeps and for how long: the options that tiers share, and sizes in bytes as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, TypeVar

from chunkcache.errors import StoreURLError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
Key = TypeVar("Key")
EVICT = ("lru", "lfu", "cost")
GHOSTS = 10_000


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a size such as `2GiB`, `500 MB` or `1048576` stands for.

    Raises:
        StoreURLError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not (size := int(Decimal(match[1]) * unit)):
        raise StoreURLError(f"{text!r} is not a size in bytes; write for example 2GiB, 500MB or 1048576")
    return size


Size = Annotated[int, parse_bytes]  # an option in bytes


@dataclass(frozen=True)
class Budget:
    """Limits of what a tier keeps, and the choice of what is evicted for room.

    Attributes:
        max_bytes: byte budget; None for none.
        evict: which entry goes first: `lru`, the least recently used; `lfu`, the least often used, lately; `cost`,
            that of the least such uses (and credit, such as Cache-Craft's 1/CFO) x recompute seconds / bytes.
        admit: `all` lets every entry in; `frequent` only if it was asked for, lately, at least as often as each that
            would have to go for it (TinyLFU, arXiv 1512.00727): what is used once flushes nothing that is used often.
        tenant_bytes: byte quota of each tenant; None for none. A tenant that is over it evicts its own entries.
        ttl: seconds that an entry is kept after it was computed; None for ever.
        ghosts: how many keys that are not held are remembered with their uses, under a budget and `lfu` or `cost`.
            Those of the least uses are forgotten first.

    Raises:
        StoreURLError: a value is none of these.
    """

    max_bytes: Size | None = None
    evict: str = "lru"
    admit: str = "all"
    tenant_bytes: Size | None = None
    ttl: float | None = None
    ghosts: int = GHOSTS

    def __post_init__(self) -> None:
        if self.evict not in EVICT:
            raise StoreURLError(f"evict={self.evict!r} is none of {', '.join(EVICT)}")
        if self.admit not in ("frequent", "all"):
            raise StoreURLError(f"admit={self.admit!r} is neither 'frequent' nor 'all'")
        if self.ttl is not None and not self.ttl > 0:
            raise StoreURLError(f"ttl={self.ttl} is no time to live; pass seconds, such as 86400")

    @property
    def bounded(self) -> bool:
        """Whether entries ever have to go for room."""
        return self.max_bytes is not None or self.tenant_bytes is not None

    def victims(
        self,
        nbytes: int,
        tenant: str,
        held: Callable[[str | None], int],
        candidates: Callable[[str | None], Iterable[tuple[Key, int]]],
    ) -> list[Key] | None:
        """Return what has to go so that an entry of `nbytes` of `tenant` fits, or None if it cannot be made to fit.

        Args:
            nbytes: of the entry.
            tenant: its tenant's label; '' has no quota.
            held: returns the bytes of all other entries of a tenant, or of all tenants for None.
            candidates: returns those of them that may go, with their bytes, the first to go first. It is asked only
                when there is too little room.
        """
        going: dict[Key, int] = {}
        for limit, whose in ((self.tenant_bytes, tenant), (self.max_bytes, None)):
            if limit is None or whose == "":
                continue
            over = held(whose) + nbytes - limit - sum(going.values())
            for key, size in candidates(whose) if over > 0 else ():
                if key not in going:
                    going[key] = size
                    over -= size
                if over <= 0:
                    break
            if over > 0:
                return None
        return list(going)


UNBOUNDED = Budget()
