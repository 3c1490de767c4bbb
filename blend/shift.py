"""Offset correction: what the recomputed rows of a chunk say of its other rows (AgentKVShift, arXiv 2607.21604).

The error of a reused chunk is taken as one offset that all its tokens share, and noise. The mean residual, true less
stored, of the tokens that are recomputed estimates the offset. It is added to the chunk's other tokens, layer by
layer. Keys are compared, and moved, as they are rotated for this prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.errors import PolicyError

WEIGHTS = ("one", "evidence", "deviation")


@dataclass(frozen=True)
class Shift:
    """How rows that are not recomputed are corrected.

    Args:
        shrink: lambda: the mean of n recomputed rows is added n / (n + lambda) times.
        weight: by what an offset is weighted, min(d, 1). `one`: d is 1. `evidence`: d is the norm of the mean
            residual over its standard error, for each chunk and layer, 0 where a chunk has a single recomputed row.
            `deviation`: d is how far a token's own keys, or values, deviated at the policy's check layer (L2 norm
            over heads and dimensions); without a check layer, 1.
        keys: whether keys are corrected.
        values: whether values are corrected.

    Raises:
        PolicyError: an option is out of range, or neither keys nor values are corrected.
    """

    shrink: float = 0.0
    weight: str = "one"
    keys: bool = True
    values: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.shrink < float("inf"):
            raise PolicyError(f"shrink={self.shrink} is not a number of rows, 0 or more")
        if self.weight not in WEIGHTS:
            raise PolicyError(f"weight={self.weight!r} is none of {', '.join(WEIGHTS)}")
        if not (self.keys or self.values):
            raise PolicyError("a shift of neither keys nor values corrects nothing; turn one on")


class Shifting:
    """The correction of one prefill.

    Args:
        shift: what is corrected, and how.
        plan: says which rows belong to one chunk.
    """

    def __init__(self, shift: Shift, plan: Plan) -> None:
        self._shift, self._plan = shift, plan
        self._parts = slice(0 if shift.keys else 1, 2 if shift.values else 1)
        self._groups: _Groups | None = None
        self._deviation: Tensor | None = None

    def note(self, rows: Tensor, fresh: Tensor, stored: Tensor) -> None:
        """Keep how far each of `rows` `[rows]` deviates; `fresh` and `stored` are `[2, kv_heads, rows, head_dim]`.

        Of rows that are noted no more, what was noted before holds.
        """
        if self._shift.weight == "deviation":
            deviation = torch.linalg.vector_norm((fresh - stored).float(), dim=(1, 3))
            if self._deviation is None:
                self._deviation = deviation.new_ones(2, len(self._plan))
            self._deviation = self._deviation.to(rows.device).index_copy_(1, rows, deviation)

    def apply(self, both: Tensor, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Add, in place, each chunk's weighted mean residual to those of its rows that are not computed here.

        Args:
            both: one layer's stored KV in place, `[2, kv_heads, tokens, head_dim]`, those of `rows` among them.
            rows: positions `[rows]` that this layer computes, sorted, on the CPU.
            key: their fresh keys `[1, kv_heads, rows, head_dim]`.
            value: their fresh values, likewise.
        """
        if self._groups is None or not self._groups.fit(rows, both.device):
            self._groups = _Groups(self._plan, rows, both.device)
        groups = self._groups
        if groups.nothing_to_do:
            return
        both = both[self._parts]
        fresh = torch.cat([part.index_select(2, groups.sampled_rows) for part in (key, value)[self._parts]])
        residual = fresh.float() - both.index_select(2, groups.sampled).float()
        mean = groups.mean(residual)
        offset = mean * (groups.counts / (groups.counts + self._shift.shrink).clamp(min=1))[:, None]
        if self._shift.weight == "evidence":
            offset *= groups.evidence(residual, mean)[:, None, :, None]
        moved = offset.index_select(2, groups.others_owner)
        if self._shift.weight == "deviation" and self._deviation is not None:
            weight = self._deviation.to(both.device)[self._parts].index_select(1, groups.others).clamp(max=1)
            moved *= weight[:, None, :, None]
        both.index_add_(2, groups.others, moved.to(both.dtype))


class _Groups:
    """Which rows belong together where `rows` are computed: found once, on the CPU, and kept on the device.

    Attributes:
        sampled: positions `[sampled]` that are computed and have stored KV to be compared with.
        sampled_rows: their indices `[sampled]` into the rows.
        others: positions `[others]` that keep their stored KV.
        others_owner: for each of these, its chunk, an index below `chunks`.
        counts: sampled rows of each chunk `[chunks]`, float32.
        nothing_to_do: no chunk has rows of both kinds.
    """

    def __init__(self, plan: Plan, rows: Tensor, device: torch.device) -> None:
        self._rows, self._device = rows, device
        owner = plan.owner - 1
        chunks = int(owner.max()) + 1
        of_rows = owner[rows]
        sampled_rows = (of_rows >= 0).nonzero()[:, 0]
        sampled_owner = of_rows[sampled_rows]
        counts = torch.bincount(sampled_owner, minlength=chunks)
        left = owner.clone()
        left[rows] = -1
        others = (left >= 0).nonzero()[:, 0]
        others = others[counts[left[others]] > 0]
        self.nothing_to_do = len(others) == 0
        self.sampled_rows, self.sampled, self.others = (
            index.to(device, non_blocking=True) for index in (sampled_rows, rows[sampled_rows], others)
        )
        self._sampled_owner = sampled_owner.to(device, non_blocking=True)
        self.others_owner = owner[others].to(device, non_blocking=True)
        self.counts = counts.float().to(device, non_blocking=True)

    def fit(self, rows: Tensor, device: torch.device) -> bool:
        """Return whether these are the groups of `rows` on `device`."""
        return self._rows is rows and self._device == device

    def mean(self, residual: Tensor) -> Tensor:
        """Return the mean of each chunk's residuals: `[.., chunks, head_dim]` of `[.., sampled, head_dim]`."""
        return self._sums(residual, 2) / self.counts.clamp(min=1)[:, None]

    def evidence(self, residual: Tensor, mean: Tensor) -> Tensor:
        """Return `[parts, chunks]` the norm of each mean over its standard error, at most 1; 0 of a single row."""
        spread = (residual - mean.index_select(2, self._sampled_owner)).square().sum(dim=(1, 3))
        variance = self._sums(spread, 1) / (self.counts - 1).clamp(min=1) / self.counts.clamp(min=1)
        norm = torch.linalg.vector_norm(mean, dim=(1, 3))
        ratio = norm / variance.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        weight: Tensor = ratio.clamp(max=1) * (self.counts > 1)
        return weight

    def _sums(self, values: Tensor, dim: int) -> Tensor:
        shape = list(values.shape)
        shape[dim] = len(self.counts)
        return values.new_zeros(shape).index_add_(dim, self._sampled_owner, values)
