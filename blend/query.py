"""query: recompute the tokens that the question looks at (ours; related: ProphetKV, arXiv 2602.02579).

The question is prefilled over the reused KV as they are. The tokens that it attends to most are selected before
layer 0 and recomputed in one pass, so that no layer is ever computed in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkcache.blend.link import Link
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.errors import PolicyError


@dataclass(frozen=True)
class Query(Policy):
    """The `ratio` of chunk tokens with the most attention from the question, and the first `k` of each chunk.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "query"
    ratio: float = 0.05
    k: int = 0
    lead: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise PolicyError(f"ratio={self.ratio} is not between 0 and 1")
        if self.k < 0:
            raise PolicyError(f"k={self.k} is negative")

    def lead_in(self) -> int:
        """Return `lead`."""
        return self.lead

    def scout_layers(self, layers: int) -> Sequence[int]:
        """Return all layers but the last third."""
        return range(math.ceil(layers * 2 / 3))

    def select(self, plan: Plan) -> Tensor:
        """Return what `link` would: there is nothing to look at."""
        return Link(self.k).select(plan)

    def select_seen(self, plan: Plan, attention: Tensor) -> Tensor:
        """Return the positions with the highest attention, and the first `k` of each chunk."""
        candidates = plan.inexact.to(attention.device)
        count = math.ceil(self.ratio * len(candidates))
        top = candidates[attention.mean(0)[candidates].topk(count).indices].cpu()
        selected: Tensor = torch.unique(torch.cat((top, Link(self.k).select(plan))))
        return selected
