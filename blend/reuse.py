"""reuse: every chunk KV is used as it is, moved to its position and not repaired. Fastest, least faithful."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy


@dataclass(frozen=True)
class Reuse(Policy):
    """Reuse without repair (full KV reuse; PromptCache, arXiv 2311.04934)."""

    name = "reuse"

    def select(self, plan: Plan) -> Tensor:
        """Return no position."""
        return plan.inexact[:0]
