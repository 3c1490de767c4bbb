"""Computes chunks again whose nearest chunks have changed, those that have least in common with them first."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chunkcache.engine.chunks import ChunkMethods
from chunkcache.library.neighbours import Neighbours

_AT_A_TIME = 16  # chunks that are computed before anyone looks at the clock


@dataclass(frozen=True)
class Refreshed:
    """What was computed again.

    Attributes:
        computed: chunks that were computed again behind what is nearest now.
        stale: chunks whose KV still were computed behind others.
    """

    computed: int = 0
    stale: int = 0


@dataclass(frozen=True)
class Budget:
    """What a refresh may cost: so many chunks, and so many seconds after which no more are begun; None for any."""

    chunks: int
    seconds: float | None = None


def refresh(
    llm: ChunkMethods,
    nearest: Mapping[str, Sequence[str]],
    owners: Mapping[str, Collection[str]],
    how: Neighbours,
    budget: Budget,
    **options: Any,
) -> Refreshed:
    """Compute texts again behind their nearest, within a budget.

    Args:
        llm: computes.
        nearest: of each text, best first.
        owners: documents of each text.
        how: how they are computed.
        budget: what it may cost.
        options: `system` and `policy`.
    """
    started = time.monotonic()
    texts = list(nearest)
    known = replace(how, nearest=lambda some: [nearest[text] for text in some], extra=0.0, renew=True)
    overlaps = llm.overlap(texts, known, **options)
    ranked = sorted((overlap, place) for place, overlap in enumerate(overlaps) if overlap < 1)
    worst = [texts[place] for _, place in ranked[: budget.chunks]]
    computed = 0
    for first in range(0, len(worst), _AT_A_TIME):
        if budget.seconds is not None and time.monotonic() - started >= budget.seconds:
            break
        pairs = [(text, owner) for text in worst[first : first + _AT_A_TIME] for owner in owners[text]]
        asked, documents = zip(*pairs, strict=True)
        computed += llm.precompute(asked, documents=documents, lead=known, **options).computed
    return Refreshed(computed, len(ranked) - computed)
