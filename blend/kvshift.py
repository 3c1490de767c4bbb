"""kvshift: recompute probes of each chunk, and move its other tokens by their mean (AgentKVShift, arXiv 2607.21604).

The residual of a reused token, true less stored KV, is taken as an offset that its whole chunk shares, and noise.
Each chunk's probes are recomputed in all layers. In each layer their mean residual is added to all other tokens of
the chunk, each weighted by w = min(d, 1) (algorithm 1, section 3.3); `blend.shift` does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Check, Policy, check_share
from chunkcache.blend.shift import Shift
from chunkcache.errors import PolicyError

PROBES = ("top", "even")


@dataclass(frozen=True)
class KVShift(Policy):
    """The `ratio` of each chunk's tokens as probes, and an offset for all its others.

    The paper's probes (`top`) are the tokens of a chunk whose fresh keys deviate most from the stored ones at an
    early check layer; d is a token's deviation there (L2 norm). The layers below are computed for all tokens. Our
    reading, from a reimplementation, as there is no code of the authors: the check is at layer 1, below which stored
    KV do not deviate; one set of probes serves keys and values; values are weighted by their own deviation; keys are
    averaged as they are rotated for this prompt.

    Evenly spaced probes (`even`) are ours: no layer is computed for all tokens. A token has no d of its own then, and
    d is the norm of the mean residual over its standard error, for each chunk and layer.

    Args:
        ratio: share of each chunk's tokens.
        probes: `top` or `even`.
        layer: the check layer, without effect on `even`.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "kvshift"
    ratio: float = 0.1
    probes: str = "top"
    layer: int = 1

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio, "; the paper uses 0.1 to 0.3")
        if self.probes not in PROBES:
            raise PolicyError(f"probes={self.probes!r} is none of {', '.join(PROBES)}")
        if self.layer < 1:
            raise PolicyError(f"layer={self.layer} is below 1: stored KV of layer 0 never deviate")

    def shift(self) -> Shift:
        """Return the whole mean residual, keys and values, weighted by d."""
        return Shift(weight="deviation" if self.probes == "top" else "evidence")

    def filter_layers(self, layers: int) -> Sequence[int]:
        """Return the check layer, if probes are chosen there."""
        return [self.layer] if self.probes == "top" else ()

    def select(self, plan: Plan) -> Tensor:
        """Return evenly spaced positions of each chunk, or all that go through the layers below the check."""
        if self.probes == "top":
            return plan.inexact
        spans = [span for span in plan.reused if not span.exact]
        probes = [span.start + evenly_spaced(len(span), math.ceil(self.ratio * len(span))) for span in spans]
        return torch.cat(probes) if probes else plan.inexact

    def filter_rows(self, check: Check) -> Tensor:
        """Keep the tokens of each chunk whose keys deviate most, and all that are not reused."""
        fresh, stored = check.kv()
        on_host = check.plan.owner[check.rows_on_host()]
        owner = on_host.to(fresh.device, non_blocking=True)  # where layers are on several devices, not the rows'
        deviation = (fresh[0] - stored[0]).float().square().sum(dim=(0, 2)).masked_fill(owner == 0, 0.0)
        order = deviation.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]  # by chunk, and in each the one that deviates most first
        counts = torch.bincount(on_host)
        quota = (self.ratio * counts.double()).ceil().long()
        quota[0] = counts[0]  # what is not reused
        of_order = on_host.sort().values  # the owners of `order`
        rank = torch.arange(len(of_order)) - (counts.cumsum(0) - counts)[of_order]
        kept = (rank < quota[of_order]).nonzero()[:, 0].to(order.device, non_blocking=True)
        return order[kept].sort().values


def evenly_spaced(tokens: int, count: int) -> Tensor:
    """Return `count` indices below `tokens`, evenly spaced, each in the middle of its share."""
    return (2 * torch.arange(count) + 1) * tokens // (2 * max(count, 1))
