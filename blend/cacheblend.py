"""cacheblend: recompute the tokens whose KV deviates most (CacheBlend, arXiv 2405.16444, section 4).

The layers below the first check are computed for all tokens. At a check layer the fresh keys and values are
compared with the stored ones, and only the share of tokens that deviates most goes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Check, Policy, Schedule, Share, check_share
from chunkcache.errors import PolicyError

SCORES = {"k": slice(0, 1), "v": slice(1, 2), "kv": slice(0, 2)}
RATIO = 0.15  # the least at which the paper sees no loss in quality


@dataclass(frozen=True)
class CacheBlend(Policy):
    """The `ratio` of chunk tokens with the highest KV deviation (HKVD), chosen at layer `layer`.

    The deviation of a token is the sum over heads and dimensions of (new - stored)^2, of values, keys or both
    (`score=v`, `k`, `kv`): the paper says both, its authors' released code takes values. What is prefix or question
    is always computed whole and not counted in the ratio.

    With `gradual` the tokens are filtered again further up: its shares, falling, are spread evenly over the layers
    from `layer` on, each chosen among the tokens that the one before kept. `ratio` is then their average.
    Without both, `ratio` is 0.15.
    With `ratio=auto` the loading controller sets the ratio of each request (`engine.tuning`).

    Raises:
        PolicyError: an option is out of range, or `gradual` does not fall or does not average to `ratio`.
    """

    name = "cacheblend"
    ratio: Share | None = None
    layer: int = 1
    score: str = "v"
    gradual: Schedule = ()

    def __post_init__(self) -> None:
        if self.ratio is None:
            ratio = round(sum(self.gradual) / len(self.gradual), 6) if self.gradual else RATIO
            object.__setattr__(self, "ratio", ratio)
        check_share("ratio", self.ratio, "; the paper uses 0.15 to 0.18")
        if self.layer < 1:
            raise PolicyError(f"layer={self.layer} is below 1: stored KV of layer 0 never deviate")
        if self.score not in SCORES:
            raise PolicyError(f"score={self.score!r} is none of {', '.join(SCORES)}")
        for share in self.gradual:
            check_share("gradual", share)
        if any(below < above for below, above in pairwise(self.gradual)):
            raise PolicyError(f"gradual={self.gradual} rises: a token that was left out cannot come back")
        if self.gradual:
            average = sum(self.gradual) / len(self.gradual)
            if self.ratio == "auto" or not math.isclose(self.ratio or 0.0, average, abs_tol=1e-3):
                raise PolicyError(
                    f"gradual={self.gradual} averages to {average:.4g}, not to ratio={self.ratio}; leave one out"
                )

    def filter_layers(self, layers: int) -> Sequence[int]:
        """Return the layer where tokens are compared, or one for each share of the schedule."""
        steps = max(1, len(self.gradual))
        return [self.layer + (layers - self.layer) * step // steps for step in range(steps)]

    def select(self, plan: Plan) -> Tensor:
        """Return every position that is not exact: all go through the layers below the check."""
        return plan.inexact

    def filter_rows(self, check: Check) -> Tensor:
        """Keep the tokens that deviate most, and all that are not reused."""
        ratio = self.gradual[self.filter_layers(check.layers).index(check.layer)] if self.gradual else self.ratio
        if ratio is None or ratio == "auto":
            raise PolicyError("ratio=auto was not set by a loading controller before the prefill")
        fresh, stored = check.kv()
        part = SCORES[self.score]
        deviation = (fresh[part] - stored[part]).float().square().sum(dim=(0, 1, 3))
        rows = check.rows.to(deviation.device, non_blocking=True)  # the layer may be on another device than they are
        inexact = check.plan.inexact_on(deviation.device)
        always_computed = torch.ones(len(check.plan), dtype=torch.bool, device=deviation.device)
        deviation.masked_fill_(always_computed.index_fill_(0, inexact, False).index_select(0, rows), math.inf)
        always = len(check.plan.fresh)
        kept = min(len(check.rows), always + math.ceil(ratio * len(inexact)))
        return deviation.topk(kept).indices.sort().values
