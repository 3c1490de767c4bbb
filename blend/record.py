"""Records what freshly computed chunks look at, for Cache-Craft's context impact (arXiv 2502.15734, section 3.2).

Attention weights exist for a block of rows at a time and are summed by chunk at once, layer after layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chunkcache.blend.attention import BLOCK_ROWS, Watch
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan
from chunkcache.kv import ContextAttention, Span, chunk_name


class Recorder:
    """Watches one selective prefill.

    Args:
        decoder: a decoder over the shadow that runs the prefill.
        plan: what is reused. Chunks of the plan that no KV were found for are recorded.
        rows: sorted positions `[rows]` that are computed, the recorded chunks among them, in all layers.
    """

    def __init__(self, decoder: Decoder, plan: Plan, rows: Tensor) -> None:
        self._plan = plan
        self.spans = [span for span in plan.chunks if span.kv is None]
        self._watches: list[Watch] = []
        if not self.spans:
            return
        rows = rows[rows >= self.spans[0].start]
        onto = torch.zeros(len(plan), len(plan.chunks) + 1)
        for index, span in enumerate(plan.chunks):
            onto[span.start : span.stop, index] = 1
        onto[1 : plan.chunks[0].start, -1] = 1  # the prefix, but for the first token: every token looks there
        self._rows = rows
        self._on_device = rows.to(decoder.device, non_blocking=True)
        self._onto = onto.to(decoder.device, non_blocking=True)
        self._seen = torch.zeros(len(rows), onto.shape[1], device=decoder.device)
        self._own = torch.zeros(len(rows), device=decoder.device)
        self._layers = len(decoder.layers)
        self._watches = [Watch(module, len(rows), self._see, BLOCK_ROWS) for module in decoder.attentions]

    def remove(self) -> None:
        """Stop watching."""
        for watch in self._watches:
            watch.remove()

    def contexts(self) -> dict[int, ContextAttention]:
        """Return what each recorded chunk looked at, by its start."""
        names = [chunk_name(self._plan.token_ids[span.start : span.stop]) for span in self._plan.chunks]
        sums = torch.cat((self._seen, self._own[:, None]), dim=1).cpu() if self.spans else None  # one wait
        return {} if sums is None else {span.start: self._context(span, names, sums) for span in self.spans}

    def _see(self, weights: Tensor, first: int) -> None:
        mean = weights.float().mean(0)
        block = slice(first, first + len(mean))
        onto = self._onto.to(mean.device)  # a layer may live on another device than the first
        self._seen[block] += (mean @ onto).to(self._seen.device)
        own = mean.gather(1, self._on_device[block].to(mean.device)[:, None])[:, 0]
        self._own[block] += own.to(self._own.device)

    def _context(self, span: Span, names: Sequence[str], sums: Tensor) -> ContextAttention:
        index = self._plan.chunks.index(span)
        inside = (self._rows >= span.start) & (self._rows < span.stop)
        seen, own = (sums[inside] / self._layers).tensor_split([-1], dim=1)
        own = own[:, 0]
        inter = seen[:, :index].sum(0).tolist()
        intra = float((seen[:, index] - own).sum())
        return ContextAttention(
            chunks=tuple(names[:index]),
            inter=tuple(inter),
            intra=intra,
            a=sum(total / len(span) / len(other) for total, other in zip(inter, self._plan.chunks, strict=False)),
            b=intra / len(span) ** 2,
            outside=seen[:, :index].sum(1) if index else seen[:, -1],
        )
