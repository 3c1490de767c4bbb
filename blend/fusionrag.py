"""fusionrag: chunks computed behind similar ones, tokens that the bare question points to (FusionRAG, 2601.12904).

Offline each chunk is computed behind its most similar chunks (section 3.1, eq. 10), so that it has met much of what
it will meet. Online the question is prefilled by itself. Its queries in the last layer, times the last-layer keys of
each chunk, give one matrix of attention weights per chunk; the sums of their columns are the critical scores (section
3.2). The tokens with the highest are recomputed in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy, check_share, highest
from chunkcache.errors import PolicyError

LEADS = ("neighbours", "none")


@dataclass(frozen=True)
class FusionRAG(Policy):
    """The `ratio` of chunk tokens with the highest critical scores.

    Weights are a softmax over each chunk by itself, as in the authors' code. They are averaged over heads and
    question tokens, which ranks as the sum does. Our reading: the question is run behind the system prompt without
    sight of any chunk, as the paper has it; the released code runs it over the reused KV. Keys stand at their
    positions in this prompt; in the released code at those they were stored at. A chunk that is exact has no critical
    tokens, and in a last layer with a sliding window, what lies before the window scores 0.

    Args:
        ratio: share of the chunk tokens, 0 for none and no look at the question.
        lead: `neighbours` for chunks computed behind their most similar chunks, `none` for chunks computed alone.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "fusionrag"
    ratio: float = 0.15
    lead: str = "neighbours"

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio, "; the paper uses 0.15 and less")
        if self.lead not in LEADS:
            raise PolicyError(f"lead={self.lead!r} is none of {', '.join(LEADS)}")

    def neighbours(self) -> bool:
        """Return whether `lead` says so."""
        return self.lead == "neighbours"

    def blind(self) -> bool:
        """Return True: the question is computed alone."""
        return True

    def wants_attention(self, plan: Plan) -> bool:
        """Return whether something is to be selected."""
        return self.ratio > 0

    def attention_layers(self, layers: int) -> Sequence[int]:
        """Return the last layer."""
        return [layers - 1]

    def select(self, plan: Plan) -> Tensor:
        """Return nothing: there is nothing to look at."""
        return plan.inexact[:0]

    def select_by_attention(self, plan: Plan, attention: Tensor) -> Tensor:
        """Return the positions with the highest scores."""
        return highest(plan.inexact_on(attention.device), attention[0], self.ratio)
