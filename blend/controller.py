"""The loading controller: recompute as much as loading takes anyway, and store no faster than that (CacheBlend).

While layer i computes, the KV of layer i+1 are loaded. Recomputing is free of charge as long as it takes no longer
than loading, and a slower, cheaper tier is free of charge as long as loading takes no longer than recomputing
(arXiv 2405.16444, section 5.1).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from chunkcache.blend.cacheblend import RATIO


@dataclass(frozen=True)
class Choice:
    """A recompute ratio, the tier it goes with if one was chosen, and why in a sentence."""

    ratio: float
    tier: str | None
    why: str


def choose_ratio(prefill_s: float, load_s: float, least: float = RATIO) -> Choice:
    """Return the ratio whose recomputing takes as long as loading, but at least `least`.

    Args:
        prefill_s: seconds to prefill one layer of the reused tokens in full; a ratio r of them takes r times that.
        load_s: seconds to load one layer of them.
        least: ratio below which the quality suffers.
    """
    hidden = load_s / prefill_s if prefill_s > 0 else 1.0
    ratio = min(1.0, max(least, hidden))
    times = f"a layer takes {load_s * 1e3:.2f} ms to load and {prefill_s * 1e3:.2f} ms to prefill"
    if hidden <= least:
        return Choice(ratio, None, f"{times}: loading is hidden behind the least ratio, {least:.0%}")
    return Choice(ratio, None, f"{times}: {ratio:.0%} are recomputed in the time that loading takes")


def choose_tier(prefill_s: float, tiers: Mapping[str, float], least: float = RATIO) -> Choice:
    """Return the slowest tier whose loading is hidden behind recomputing `least`; the fastest if none is.

    Args:
        prefill_s: seconds to prefill one layer of the reused tokens in full.
        tiers: seconds to load one layer of them, by tier. The slowest is taken to be the cheapest.
        least: ratio below which the quality suffers.

    Raises:
        ValueError: there are no tiers.
    """
    if not tiers:
        raise ValueError("no tiers to choose from")
    hidden = {tier: load_s for tier, load_s in tiers.items() if load_s <= least * prefill_s}
    tier = max(hidden, key=hidden.__getitem__) if hidden else min(tiers, key=tiers.__getitem__)
    choice = choose_ratio(prefill_s, tiers[tier], least)
    which = "the slowest that is hidden" if hidden else "the fastest, and not hidden"
    return Choice(choice.ratio, tier, f"{tier} is {which}; {choice.why}")


class LoadingController:
    """Chooses from what earlier requests took; safe to use from several threads.

    Attributes:
        last: the last choice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compute = 0.0  # seconds per token-layer, a moving average
        self._load = 0.0
        self.last = Choice(RATIO, None, "nothing has been measured yet")

    def observe(self, prefill_s: float, computed: int, load_s: float, loaded: int) -> None:
        """Take note of one request: seconds and token-layers of its recomputing and of its loading."""
        with self._lock:
            if computed and prefill_s > 0:
                self._compute = _average(self._compute, prefill_s / computed)
            if loaded:
                self._load = _average(self._load, load_s / loaded)

    @property
    def token_layer_s(self) -> tuple[float, float]:
        """Seconds to compute, and to load, one layer of one token; 0 before anything was measured."""
        with self._lock:
            return self._compute, self._load

    def choose(self, tokens: int = 1000) -> Choice:
        """Return the ratio for a request that reuses `tokens` tokens; the figures in its reason are for so many."""
        with self._lock:
            if self._compute:
                self.last = choose_ratio(self._compute * tokens, self._load * tokens)
            return self.last


def _average(old: float, new: float) -> float:
    return new if not old else 0.7 * old + 0.3 * new
