"""Fills in what a policy leaves to measurement: options that are `auto`, and the model behind a fidelity guard."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from chunkcache.blend import Plan, Policy
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.cachecraft import CacheCraft
from chunkcache.blend.controller import LoadingController
from chunkcache.blend.guard import GuardModel
from chunkcache.blend.loader import preload_depth
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
    """

    def __init__(self, fingerprint: str, calibration: Calibration | str | Path | None, layers: int) -> None:
        self._fingerprint = fingerprint
        self._given = calibration
        self._layers = layers
        self.controller = LoadingController()

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration of this model, if there is one."""
        if isinstance(self._given, Calibration):
            return self._given
        return load_calibration(self._fingerprint, None if self._given is None else Path(self._given))

    def guard(self, policy: Policy) -> GuardModel | None:
        """Return what predicts the error of `policy`, if it is guarded and the model was calibrated."""
        return self.calibration.guard if policy.guarded() is not None and self.calibration is not None else None

    def resolve(self, policy: Policy) -> Policy:
        """Return `policy` with nothing left open.

        Raises:
            CalibrationError: it needs a calibration that there is none of.
        """
        if isinstance(policy, CacheBlend) and policy.ratio == "auto":
            choice = self.controller.choose()
            logger.info("cacheblend:ratio=%.3f, since %s", choice.ratio, choice.why)
            return replace(policy, ratio=choice.ratio)
        if isinstance(policy, CacheCraft) and policy.alpha == "auto":
            alpha = self.calibration.alpha if self.calibration is not None else None
            if alpha is None:
                raise _missing(policy)
            return replace(policy, alpha=alpha)
        if policy.guarded() is not None and self.guard(policy) is None:
            raise _missing(policy)
        return policy

    def depth(self, plan: Plan) -> int:
        """Return how many layers of `plan` to load ahead, by what earlier requests took."""
        computed, loaded = self.controller.token_layer_s
        return preload_depth(self._layers, computed * len(plan.fresh), loaded * len(plan))

    def observe(self, stats: RequestStats) -> None:
        """Take note of what a request took, for the loading controller."""
        computed = round(stats.recomputed_share * stats.tokens * self._layers)
        loaded = stats.reused_tokens * self._layers
        load_s = stats.lookup_s + max(stats.load_s, stats.assemble_s)
        self.controller.observe(stats.prefill_s - stats.assemble_s, computed, load_s, loaded)


def _missing(policy: Policy) -> CalibrationError:
    return CalibrationError(
        f"policy {policy} needs a calibration of this model, and there is none: run chunkcache calibrate DATA"
    )
