"""What one request reuses: the prompt's token ids and which stored KV lie where in it. Built once, then read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from chunkcache.kv import ChunkKV


@dataclass(frozen=True)
class Segment:
    """A run of stored KV at its place in a prompt.

    Attributes:
        start: position in the prompt of the first reused token.
        kv: where its keys and values come from.
        first: index in `kv` of that token.
        length: number of tokens reused.
        exact: the KV was computed behind the very tokens that stand before it here, so nothing repairs it.
    """

    start: int
    kv: ChunkKV
    first: int
    length: int
    exact: bool = False

    @property
    def end(self) -> int:
        """Position right after the last reused token."""
        return self.start + self.length

    @property
    def delta(self) -> int:
        """How many positions the keys must be rotated on."""
        return self.start - (self.kv.position + self.first)


@dataclass(frozen=True)
class Plan:
    """One prompt and its reusable segments, in order and without overlap.

    The last token is never part of a segment: its logits are what the prefill is for.

    Attributes:
        token_ids: the prompt.
        segments: what is reused where.
        chunks: first and last + 1 position of each chunk, reused or not; where they are not known, the segments'.
    """

    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        segments: Sequence[Segment] = (),
        chunks: Sequence[tuple[int, int]] | None = None,
    ) -> Plan:
        """Build a plan, cutting what would reach into the last token.

        Raises:
            ValueError: segments overlap, are out of order, or hold other tokens than the prompt.
        """
        ids = tuple(token_ids)
        kept = []
        end = 0
        for segment in segments:
            length = min(segment.length, len(ids) - 1 - segment.start)
            if length <= 0:
                continue
            reused = segment.kv.token_ids[segment.first : segment.first + length]
            if segment.start < end or reused != ids[segment.start : segment.start + length]:
                raise ValueError(f"the segment at position {segment.start} does not fit the prompt")
            kept.append(Segment(segment.start, segment.kv, segment.first, length, segment.exact))
            end = kept[-1].end
        spans = [(s.start, s.end) for s in kept] if chunks is None else chunks
        return cls(ids, tuple(kept), tuple(spans))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Position right after the last segment and chunk, where the question starts; 0 without any."""
        last = max((*(s.end for s in self.segments[-1:]), *(end for _, end in self.chunks[-1:])), default=0)
        return min(last, len(self) - 1)

    @cached_property
    def fresh(self) -> Tensor:
        """Positions `[n]` that no segment covers: computed under every policy."""
        covered = torch.zeros(len(self), dtype=torch.bool)
        for segment in self.segments:
            covered[segment.start : segment.end] = True
        return (~covered).nonzero()[:, 0]

    @cached_property
    def inexact(self) -> Tensor:
        """Positions `[n]` of reused tokens that were computed in another context: what a policy chooses from."""
        ranges = [torch.arange(s.start, s.end) for s in self.segments if not s.exact]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
