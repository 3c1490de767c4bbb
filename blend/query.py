"""query: recompute the tokens that the question looks at (ours; related: ProphetKV, arXiv 2602.02579).

The question is prefilled over the reused KV as they are. The tokens that it attends to most are selected before
layer 0 and recomputed in one pass, so that no layer is ever computed in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkcache.blend.link import Link
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.errors import PolicyError

LADDER = (0.15, 0.4)  # what a guarded prefill tries next


@dataclass(frozen=True)
class Query(Policy):
    """The `ratio` of chunk tokens with the most attention from the question, and the first `k` of each chunk.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "query"
    ratio: float = 0.03
    k: int = 0
    lead: int = 1024
    guard: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise PolicyError(f"ratio={self.ratio} is not between 0 and 1")
        if self.k < 0:
            raise PolicyError(f"k={self.k} is negative")
        if self.lead < 0:
            raise PolicyError(f"lead={self.lead} is negative; it is a number of tokens, 0 for no lead-in")
        if self.guard is not None and not self.guard > 0:
            raise PolicyError(f"guard={self.guard} is not above 0; it bounds the KL of the first token, in nats")

    def guarded(self) -> float | None:
        """Return `guard`."""
        return self.guard

    def ladder(self) -> Sequence[Query]:
        """Return this policy, and others that recompute 15 % and 40 % where that is more."""
        return [replace(self, ratio=ratio) for ratio in (self.ratio, *(r for r in LADDER if r > self.ratio))]

    def lead_in(self) -> int:
        """Return `lead`."""
        return self.lead

    def scout_layers(self, layers: int) -> Sequence[int]:
        """Return the layers from the middle to two thirds of the way up; none if nothing is to be selected."""
        return range(layers // 2, max(layers // 2 + 1, math.ceil(layers * 2 / 3))) if self.ratio else ()

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
