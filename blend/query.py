"""query: recompute the tokens that the question looks at (after FusionRAG, 2601.12904, and ProphetKV, 2602.02579).

The question is prefilled over the reused KV as they are, up to two thirds of the layers. The tokens that it attends
to most there are selected and recomputed in one pass, so that no layer is ever computed in full. The chunks were
computed behind a lead-in: passages that are in no prompt, so that no chunk was computed as if it came first.

FusionRAG computes chunks behind similar chunks and selects by the question first; ProphetKV selects by its attention
over the reused KV in all layers. Ours are the generic lead-in, the look at the middle layers, and the guard. What
each of these choices is worth is in docs/policies.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy, Share, check_share
from chunkcache.errors import PolicyError

LADDER = (0.15, 0.4)  # what a guarded prefill tries next
AUTO_MASS = 0.5  # ratio=auto selects the fewest tokens that hold this share of the attention
AUTO_RATIOS = (0.005, 0.0125)  # within these bounds
LEAD = 1024  # tokens of lead-in, where no calibration says otherwise
AUTO_LEAST = 2048  # tokens; with fewer to choose from, looking costs more time than it gives fidelity


@dataclass(frozen=True)
class Query(Policy):
    """The `ratio` of chunk tokens with the most attention from the question.

    Args:
        ratio: share of the chunk tokens, 0 for none and no look at the question; `auto` takes the fewest that hold
            half of the question's attention to chunk tokens, between 0.5 % and 1.25 %, and none of less than 2,048
            tokens.
        k: the first k tokens of each chunk are selected in any case.
        lead: tokens of lead-in at most that the chunks were computed behind, 0 for none; None for what
            `chunkcache calibrate` found to be best for the model, 1,024 without a calibration.
        guard: bound on the KL of the first token, in nats: more is recomputed until it is predicted to hold
            (`blend.guard`). It needs a calibration.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "query"
    skips_windows = True
    ratio: Share = "auto"
    k: int = 0
    lead: int | None = None
    guard: float | None = None

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        if self.k < 0:
            raise PolicyError(f"k={self.k} is negative")
        if self.lead is not None and self.lead < 0:
            raise PolicyError(f"lead={self.lead} is negative; it is a number of tokens, 0 for no lead-in")
        if self.guard is not None and not self.guard > 0:
            raise PolicyError(f"guard={self.guard} is not above 0; it bounds the KL of the first token, in nats")

    def guarded(self) -> float | None:
        """Return `guard`."""
        return self.guard

    def escalation(self) -> Sequence[Query]:
        """Return this policy, and others that recompute 15 % and 40 % where that is more."""
        least = AUTO_RATIOS[0] if self.ratio == "auto" else self.ratio
        return [self, *(replace(self, ratio=ratio) for ratio in LADDER if ratio > least)]

    def lead_in(self) -> int:
        """Return `lead`."""
        return LEAD if self.lead is None else self.lead

    def neighbours(self) -> bool:
        """Return True: nearest chunks are worth having also where another lead-in is not."""
        return True

    def wants_attention(self, plan: Plan) -> bool:
        """Return whether something is to be selected."""
        return len(plan.inexact) >= AUTO_LEAST if self.ratio == "auto" else self.ratio > 0

    def attention_layers(self, layers: int) -> Sequence[int]:
        """Return the layers from the middle to two thirds of the way up."""
        return range(layers // 2, max(layers // 2 + 1, math.ceil(layers * 2 / 3)))

    def carries(self) -> bool:
        """Return whether the ratio is `auto`: of so few rows the question would be the larger part."""
        return self.ratio == "auto" and self.guard is None

    def select(self, plan: Plan) -> Tensor:
        """Return what `link` would: there is nothing to look at."""
        return plan.first_of_each(self.k)

    def select_by_attention(self, plan: Plan, attention: Tensor) -> Tensor:
        """Return the positions with the highest attention, and the first `k` of each chunk."""
        candidates = plan.inexact_on(attention.device)
        seen, order = attention.mean(0)[candidates].sort(descending=True)
        if self.ratio == "auto":
            low, high = (math.ceil(ratio * len(candidates)) for ratio in AUTO_RATIOS)
            count = _auto(seen).clamp(low, high)
            both = torch.cat((count[None], candidates[order[:high]])).cpu()  # one wait for the device
            highest = both[1 : 1 + int(both[0])]
        else:
            highest = candidates[order[: math.ceil(self.ratio * len(candidates))]].cpu()
        selected: Tensor = torch.unique(torch.cat((highest, self.select(plan))))
        return selected


def _auto(seen: Tensor) -> Tensor:
    """Return how many of the scores `[tokens]`, sorted from the highest, hold `AUTO_MASS` of their sum."""
    return (seen.cumsum(0) < AUTO_MASS * seen.sum()).sum() + 1
