"""prefix: exact reuse of the longest stored beginning of the prompt; the rest is recomputed.

This is prompt prefix caching as serving engines do it (vLLM, arXiv 2309.06180): no error, and no gain once
the order of the chunks changes. What a request computed is stored in its context for the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy


@dataclass(frozen=True)
class Prefix(Policy):
    """Prefix caching."""

    name = "prefix"
    stores_in_context = True

    def select(self, plan: Plan) -> Tensor:
        """Return every position that is not exact."""
        return plan.inexact


@dataclass(frozen=True)
class Exact(Prefix):
    """Prefix caching that takes no KV which a codec has rounded: for judging and comparing answers.

    Reuse that is nearly exact changes which of two answers a judge prefers (arXiv 2601.08343).
    """

    name = "exact"
    lossless = True
