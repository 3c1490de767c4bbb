"""cacheblend: recompute the tokens whose KV deviates most (CacheBlend, arXiv 2405.16444, section 4).

The first layer is computed for all tokens. At the check layer the fresh values of all tokens are compared
with the stored ones, and only the share of tokens that deviates most goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.errors import PolicyError


@dataclass(frozen=True)
class CacheBlend(Policy):
    """The `ratio` of chunk tokens with the highest KV deviation (HKVD), chosen at layer `layer`.

    The deviation of a token is the sum over heads and dimensions of (V_new - V_stored)^2, as in the authors'
    released code. What is prefix or question is always computed whole and not counted in the ratio.

    Raises:
        PolicyError: ratio is not in [0, 1], or layer is below 1.
    """

    name = "cacheblend"
    ratio: float = 0.15
    layer: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise PolicyError(f"ratio={self.ratio} is not between 0 and 1; the paper uses 0.15 to 0.18")
        if self.layer < 1:
            raise PolicyError(f"layer={self.layer} is below 1: stored KV of layer 0 never deviate")

    @property
    def check_layers(self) -> frozenset[int]:
        """The one layer where tokens are compared."""
        return frozenset({self.layer})

    def select(self, plan: Plan) -> Tensor:
        """Return every position that is not exact: all go through the layers below the check."""
        return plan.inexact

    def narrow(self, plan: Plan, rows: Tensor, fresh: Tensor, stored: Tensor) -> Tensor:
        """Keep the tokens that deviate most, and all that are not reused."""
        deviation = (fresh[1] - stored[1]).float().square().sum(dim=(0, 2))
        candidate = torch.isin(rows, plan.inexact.to(rows.device))
        deviation = deviation.masked_fill(~candidate, math.inf)
        always = len(rows) - len(plan.inexact)
        kept = always + math.ceil(self.ratio * len(plan.inexact))
        return deviation.topk(kept).indices.sort().values
