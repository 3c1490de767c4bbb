"""link: recompute the first k tokens of each chunk (EPIC's LegoLink, arXiv 2410.15332).

A chunk's first tokens draw most of the attention that should have gone to what stands before the chunk.
Recomputing only them lets the rest of the chunk see where it now stands.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.errors import PolicyError


@dataclass(frozen=True)
class Link(Policy):
    """The first `k` tokens of each chunk, in all layers.

    Raises:
        PolicyError: k is negative.
    """

    name = "link"
    k: int = 8

    def __post_init__(self) -> None:
        if self.k < 0:
            raise PolicyError(f"k={self.k} is negative; link recomputes the first k tokens, 8 to 32 in the paper")

    def select(self, plan: Plan) -> Tensor:
        """Return the first `k` positions of each span that is not exact."""
        return plan.first_of_each(self.k)
