"""full: the whole prompt is prefilled, nothing is reused. The baseline that everything is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Full prefill."""

    name = "full"
    reuses = False

    def select(self, plan: Plan) -> Tensor:
        """Return every reused position."""
        return plan.inexact
