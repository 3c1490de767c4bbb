"""Fills in what a policy leaves to measurement: options that are `auto`, and the model behind a fidelity guard."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from chunkcache.blend import Plan, Policy
from chunkcache.blend.cacheblend import RATIO, CacheBlend
from chunkcache.blend.cachecraft import CacheCraft
from chunkcache.blend.guard import GuardedSelection
from chunkcache.blend.loader import LEAST_DEPTH
from chunkcache.blend.query import LEAD, Look, Query
from chunkcache.engine.calibration import Calibration, load_calibration
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import CalibrationError

logger = logging.getLogger("chunkcache")


class Tuning:
    """What was measured for one model.

    Args:
        fingerprint: the model's.
        calibration: a calibration, or its file; None looks in the cache folder when a policy needs one.
        layers: number of layers of the model.
        window: its narrowest sliding window, in tokens; 0 for none.
    """

    def __init__(
        self, fingerprint: str, calibration: Calibration | str | Path | None, layers: int, window: int = 0
    ) -> None:
        self._fingerprint = fingerprint
        self._given = calibration
        self._layers, self._window = layers, window
        self.controller = LoadingController()

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration of this model, if there is one; a given one of another model is none."""
        if isinstance(self._given, Calibration):
            return self._given if self._given.fingerprint == self._fingerprint else None
        return load_calibration(self._fingerprint, None if self._given is None else Path(self._given))

    @property
    def lead(self) -> int:
        """Tokens of lead-in that chunks of this model are best computed behind, as far as that is known."""
        measured = None if self.calibration is None else self.calibration.lead
        return LEAD if measured is None else measured

    @property
    def look(self) -> Look:
        """How `query` best looks at a question with this model, as far as that is known."""
        measured = None if self.calibration is None else self.calibration.look
        return Look() if measured is None else measured

    def selection(self, policy: Policy) -> GuardedSelection | None:
        """Return what selects the rows of a prefill under `policy` if it is guarded and the model was calibrated."""
        bound = policy.guarded()
        model = None if bound is None or self.calibration is None else self.calibration.guard
        return None if bound is None or model is None else GuardedSelection(model, bound)

    def resolve(self, policy: Policy) -> Policy:
        """Return `policy` with nothing left open.

        Raises:
            CalibrationError: it needs a calibration that there is none of.
        """
        if isinstance(policy, CacheBlend) and policy.ratio == "auto":
            ratio = self.controller.ratio()
            logger.info(
                "cacheblend:ratio=%.3f, for seconds per token-layer of %s", ratio, self.controller.token_layer_s
            )
            return replace(policy, ratio=ratio)
        if isinstance(policy, CacheCraft) and policy.alpha == "auto":
            alpha = self.calibration.alpha if self.calibration is not None else None
            if alpha is None:
                raise _missing(policy)
            return replace(policy, alpha=alpha)
        if isinstance(policy, Query):
            policy = replace(policy, lead=self.lead) if policy.lead is None else policy
            policy = replace(policy, window=self._window or None) if policy.window is None else policy
            look = None if self.calibration is None else self.calibration.look
            policy = policy if look is None else policy.fitted(look)
        if policy.guarded() is not None and self.selection(policy) is None:
            raise _missing(policy)
        return policy

    def depth(self, plan: Plan) -> int:
        """Return how many layers of `plan` to load ahead, by what earlier requests took."""
        computed, loaded = self.controller.token_layer_s
        return preload_depth(self._layers, computed * len(plan.fresh), loaded * len(plan))

    def observe(self, stats: RequestStats) -> None:
        """Count what a request took, for the loading controller."""
        computed = round(stats.recomputed_share * stats.tokens * self._layers)
        loaded = stats.reused_tokens * self._layers
        load_s = stats.lookup_s + max(stats.load_s, stats.assemble_s)
        self.controller.observe(stats.prefill_s - stats.assemble_s, computed, load_s, loaded)


def _missing(policy: Policy) -> CalibrationError:
    return CalibrationError(
        f"policy {policy} needs a calibration of this model, and there is none: run chunkcache calibrate DATA"
    )


def preload_depth(layers: int, prefill_s: float, load_s: float) -> int:
    """Return how many layers to load ahead so that computing is never held up (Cache-Craft's formula).

    Args:
        layers: number of layers of the model.
        prefill_s: seconds to compute one layer.
        load_s: seconds to load one layer; 0 if that is not known.
    """
    if load_s <= 0:
        return LEAST_DEPTH
    depth = math.ceil((layers - 1) * (1 - prefill_s / load_s) + 1)
    return max(LEAST_DEPTH, min(layers, depth))


def free_ratio(prefill_s: float, load_s: float, least: float = RATIO) -> float:
    """Return the ratio whose recomputing takes as long as loading, but at least `least`.

    Args:
        prefill_s: seconds to prefill one layer of the reused tokens in full; a ratio r of them takes r times that.
        load_s: seconds to load one layer of them.
        least: ratio below which the quality suffers.
    """
    return min(1.0, max(least, load_s / prefill_s if prefill_s > 0 else 1.0))


def choose_tier(prefill_s: float, tiers: Mapping[str, float], least: float = RATIO) -> tuple[str, float]:
    """Return the slowest tier whose loading is hidden behind recomputing `least`, else the fastest, and its ratio.

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
    return tier, free_ratio(prefill_s, tiers[tier], least)


class LoadingController:
    """Recompute as much as loading takes anyway (CacheBlend, arXiv 2405.16444, section 5.1).

    While layer i computes, the KV of layer i+1 are loaded: recomputing is free as long as it takes no longer. Keeps
    moving averages of what earlier requests took; safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compute_s = 0.0  # per token-layer
        self._load_s = 0.0

    def observe(self, prefill_s: float, computed: int, load_s: float, loaded: int) -> None:
        """Add one request: seconds and token-layers of its recomputing and of its loading."""
        with self._lock:
            if computed and prefill_s > 0:
                self._compute_s = _average(self._compute_s, prefill_s / computed)
            if loaded:
                self._load_s = _average(self._load_s, load_s / loaded)

    @property
    def token_layer_s(self) -> tuple[float, float]:
        """Seconds to compute, and to load, one layer of one token; 0 before anything was measured."""
        with self._lock:
            return self._compute_s, self._load_s

    def ratio(self) -> float:
        """Return the recompute ratio for the next request."""
        compute_s, load_s = self.token_layer_s
        return free_ratio(compute_s, load_s) if compute_s else RATIO


def _average(old: float, new: float) -> float:
    return new if not old else 0.7 * old + 0.3 * new
