"""Several rankings of the same things to one. Knows nothing of what is ranked."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)

K = 60  # the paper's: it keeps one first place from outweighing two good ones


def fuse(rankings: Sequence[Sequence[Item]], k: float = K) -> list[tuple[Item, float]]:
    """Return every item with the sum of 1 / (k + rank) over the rankings that have it, best first.

    Ranks begin at 1. Equal sums are ordered by the best rank, then by the first ranking that gives it.

    Reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    ranks: dict[Item, list[tuple[int, int]]] = {}
    for number, ranking in enumerate(rankings):
        for rank, item in enumerate(ranking, start=1):
            ranks.setdefault(item, []).append((rank, number))
    # fsum rounds once, so that equal ranks give equal sums in whatever order the rankings come.
    scores = {item: math.fsum(1 / (k + rank) for rank, _ in found) for item, found in ranks.items()}
    return sorted(scores.items(), key=lambda pair: (-pair[1], min(ranks[pair[0]])))
