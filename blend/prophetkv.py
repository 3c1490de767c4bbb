"""prophetkv: recompute what the question looks at in all layers, in two stages (ProphetKV, arXiv 2602.02579).

Stage one runs the question over the reused KV, through all layers. In each layer the attention that a context token
gets from the question is summed over heads and question tokens. Stage two averages these over the layers, all alike
(eq. 8), and recomputes the tokens with the highest average, together with the question (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy, check_share, highest


@dataclass(frozen=True)
class ProphetKV(Policy):
    """The `ratio` of chunk tokens with the most attention from the question, averaged over all layers.

    Each question token's weights are a softmax over the context alone, without the question (algorithm 1). Our
    reading, from two reimplementations: the system prompt counts as context in that softmax, but is not chosen from;
    the question is all that stands behind the last chunk.

    Args:
        ratio: share of the chunk tokens, 0 for none and no look at the question.

    Raises:
        PolicyError: the ratio is out of range.
    """

    name = "prophetkv"
    ratio: float = 0.2

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio, "; the paper uses 0.2")

    def wants_attention(self, plan: Plan) -> bool:
        """Return whether something is to be selected."""
        return self.ratio > 0

    def attention_layers(self, layers: int) -> Sequence[int]:
        """Return all layers."""
        return range(layers)

    def pool(self, weights: Tensor) -> Tensor:
        """Sum over heads and question rows, the weights on the context scaled to sum to 1.

        Of a question that is too long to be looked at in whole, what stands before these rows is context, too.
        """
        context = weights.shape[2] - weights.shape[1]  # the question is the last tokens
        totals = weights[:, :, :context].sum(-1, keepdim=True)
        return (weights / totals.clamp(min=1e-30)).sum(dim=(0, 1))

    def select(self, plan: Plan) -> Tensor:
        """Return nothing: there is nothing to look at."""
        return plan.inexact[:0]

    def select_by_attention(self, plan: Plan, attention: Tensor) -> Tensor:
        """Return the positions with the highest average over the layers."""
        return highest(plan.inexact_on(attention.device), attention.mean(0), self.ratio)
