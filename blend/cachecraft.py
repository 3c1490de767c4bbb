"""cachecraft: recompute a chunk by how much its context mattered to it (Cache-Craft, arXiv 2502.15734).

When a chunk is computed behind others, what its tokens looked at is recorded (`blend.record`). From that follows,
for any later request, how much of the chunk must be computed again: little if it hardly looked beyond itself, or if
the chunks that it looked at stand before it again. The tokens that looked beyond the chunk most go first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Check, Policy, Share, check_share
from chunkcache.errors import PolicyError
from chunkcache.kv import ContextAttention, Span, chunk_name


def context_impact(a: float, b: float) -> float:
    """Return the cache context impact, CCI = 1 / (1 + exp(-a/b)), 0.5 to 1 (section 3.2).

    Args:
        a: attention per token pair from the chunk to those before it.
        b: attention per token pair within the chunk.
    """
    return 1 / (1 + math.exp(-a / b)) if b > 0 else 1.0


def prefix_overlap(context: ContextAttention, before: Sequence[str]) -> float:
    """Return beta: the share of the attention to earlier chunks that went to chunks now before it again.

    A chunk that was computed alone has looked at no other, and 0 of its context is there again.
    """
    total = sum(context.inter)
    again = sum(inter for name, inter in zip(context.chunks, context.inter, strict=True) if name in set(before))
    return again / total if total > 0 else 0.0


def order_penalty(old: Sequence[str], new: Sequence[str]) -> float:
    """Return gamma: the share of pairs of common chunks whose order has changed (Kendall's tau distance)."""
    place = {name: index for index, name in reversed(list(enumerate(new)))}
    common = [place[name] for name in dict.fromkeys(old) if name in place]
    pairs = list(combinations(common, 2))
    return sum(first > second for first, second in pairs) / len(pairs) if pairs else 0.0


def fix_overhead(context: ContextAttention, before: Sequence[str], alpha: float) -> float:
    """Return the cache fix overhead, CFO = alpha CCI (1 - beta'), clamped to [0, 1], beta' = beta (1 - gamma).

    Args:
        context: what the stored chunk looked at.
        before: names of the chunks before it now, in order.
        alpha: the scale that calibration finds.
    """
    overlap = prefix_overlap(context, before) * (1 - order_penalty(context.chunks, before))
    return min(1.0, max(0.0, alpha * context_impact(context.a, context.b) * (1 - overlap)))


def focused(attention: Tensor, mass: float) -> Tensor:
    """Return which chunks `[chunks]` are the fewest that together hold `mass` of `attention` `[chunks]`."""
    share, order = (attention / attention.sum()).sort(descending=True)
    needed = share.cumsum(0) - share < mass
    return torch.zeros_like(needed).index_copy_(0, order, needed)


@dataclass(frozen=True)
class CacheCraft(Policy):
    """The `ceil(CFO |i|)` tokens of each chunk i that looked most at the chunks before it.

    A chunk whose CFO reaches 1 is not reused: it is computed whole, recorded, and stored as one more version of
    itself, in its context. Of several versions the one with the least CFO is used.

    Once the smallest set of chunks that holds `focus` of the question's attention has stayed the same over `stable`
    looks, the tokens of all other chunks are computed no further. The looks are four layers apart.

    Args:
        alpha: scale of the CFO; `auto` takes what `chunkcache calibrate` found for this model.
        focus: share of attention; 1 keeps all chunks to the end.
        stable: looks in a row.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "cachecraft"
    versioned = True
    alpha: Share = 0.3
    focus: float = 0.9
    stable: int = 2

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha < math.inf:
            raise PolicyError(f"alpha={self.alpha} is not a number of 0 or more")
        check_share("focus", self.focus)
        if self.stable < 1:
            raise PolicyError(f"stable={self.stable} is below 1")

    def filter_layers(self, layers: int) -> Sequence[int]:
        """Return where to look at the focus: eight times on the way up, as often as the model has layers for."""
        step = max(1, layers // 8)
        return range(step * self.stable, layers, step) if self.focus < 1 else ()

    def watched_layers(self, layers: int) -> Sequence[int]:
        """Return all layers below the last look."""
        return range(max(self.filter_layers(layers), default=0))

    def overhead(self, context: ContextAttention | None, before: Sequence[str]) -> float:
        """Return the CFO of a stored chunk behind the chunks `before`; one computed alone has looked at none."""
        if self.alpha == "auto":
            raise PolicyError("alpha=auto was not set from a calibration before the prefill")
        return fix_overhead(context or ALONE, before, self.alpha)

    def select(self, plan: Plan) -> Tensor:
        """Return the tokens that looked most beyond each chunk, as many as its CFO says."""
        names = [chunk_name(plan.token_ids[span.start : span.stop]) for span in plan.chunks]
        selected = [plan.inexact[:0]]
        for index, span in enumerate(plan.chunks):
            if span.kv is not None and not span.exact:
                count = math.ceil(self.overhead(span.kv.context, names[:index]) * len(span))
                selected.append(span.start + _most_outside(span, span.kv.context)[:count].sort().values)
        return torch.cat(selected)

    def filter_rows(self, check: Check) -> Tensor | None:
        """Keep the tokens of the chunks in focus, once the focus stands still."""
        step = max(1, check.layers // 8)
        seen = torch.stack(list(check.attention)).cumsum(0)
        layers = slice(check.layer - (self.stable - 1) * step - 1, check.layer, step)
        looks = seen[layers].cpu().flip(0)  # one wait for the device: all that follows is decided on the host
        by_chunk = [torch.stack([look[span.start : span.stop].sum() for span in check.plan.chunks]) for look in looks]
        sets = torch.stack([focused(attention, self.focus) for attention in by_chunk])
        if not bool((sets == sets[0]).all()):
            return None
        dropped = torch.zeros(len(check.plan), dtype=torch.bool)
        for kept, span in zip(sets[0].tolist(), check.plan.chunks, strict=True):
            dropped[span.start : span.stop] = not kept
        candidate = torch.zeros_like(dropped).index_fill_(0, check.plan.inexact, True)
        return (~(dropped & candidate)[check.rows_on_host()]).nonzero()[:, 0]


ALONE = ContextAttention((), (), intra=1.0, a=0.0, b=1.0, outside=torch.empty(0))


def _most_outside(span: Span, context: ContextAttention | None) -> Tensor:
    """Return indices into the span, the token that looked most beyond its chunk first.

    Of a chunk that was computed alone nothing of the kind is known: its first tokens go first, as in `link`.
    """
    if context is None or len(context.outside) == 0:
        return torch.arange(len(span))
    return context.outside[span.offset : span.offset + len(span)].argsort(descending=True, stable=True)
