"""A plan: the token ids of one prompt, and its spans with the KV that were found. Built once, then read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from chunkcache.kv import Span, TokenIds


@dataclass(frozen=True)
class Plan:
    """One prompt, its prefix and its chunks, in order and without overlap.

    The last token is never reused: its logits are what the prefill is for.

    Attributes:
        token_ids: the prompt.
        chunks: its chunks, reused or not.
        prefix: what stands before them, if it is reused.
    """

    token_ids: TokenIds = field(repr=False)
    chunks: tuple[Span, ...] = ()
    prefix: Span | None = None

    @classmethod
    def of(cls, token_ids: Sequence[int], chunks: Sequence[Span] = (), prefix: Span | None = None) -> Plan:
        """Build a plan; spans that would reuse the last token end before it.

        Raises:
            ValueError: reused spans overlap, are out of order, or hold other tokens than the prompt.
        """
        ids = tuple(token_ids)
        spans = [] if prefix is None else [replace(prefix, stop=min(prefix.stop, len(ids) - 1))]
        spans += [span if span.kv is None else replace(span, stop=min(span.stop, len(ids) - 1)) for span in chunks]
        end = 0
        for span in spans:
            if span.kv is not None and len(span) > 0:
                stored = span.kv.token_ids[span.offset : span.offset + len(span)]
                if span.start < end or stored != ids[span.start : span.stop]:
                    raise ValueError(f"the span at position {span.start} does not fit the prompt")
                end = span.stop
        kept = [span for span in spans[len(spans) - len(chunks) :] if len(span) > 0]
        return cls(ids, tuple(kept), spans[0] if prefix is not None and len(spans[0]) > 0 else None)

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def reused(self) -> tuple[Span, ...]:
        """The spans whose KV are there, the prefix first."""
        return tuple(span for span in self._spans() if span.kv is not None)

    @property
    def end(self) -> int:
        """Position right after the last span, where the question starts; 0 without any."""
        return min(max((span.stop for span in self._spans()), default=0), len(self) - 1)

    @cached_property
    def fresh(self) -> Tensor:
        """Positions `[n]` that no KV were found for: computed under every policy."""
        covered = torch.zeros(len(self), dtype=torch.bool)
        for span in self.reused:
            covered[span.start : span.stop] = True
        return (~covered).nonzero()[:, 0]

    @cached_property
    def inexact(self) -> Tensor:
        """Positions `[n]` of reused tokens that were computed after other tokens: what a policy chooses from."""
        ranges = [torch.arange(span.start, span.stop) for span in self.reused if not span.exact]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    @cached_property
    def ids(self) -> Tensor:
        """The token ids `[tokens]`, on the CPU."""
        return torch.tensor(self.token_ids)

    @cached_property
    def counts(self) -> Tensor:
        """How often each token id stands among the inexact tokens, `[highest id of the plan + 1]`."""
        return torch.bincount(self.ids[self.inexact], minlength=max(self.token_ids) + 1)

    def inexact_on(self, device: torch.device) -> Tensor:
        """Return `inexact` on `device`, copied there once."""
        if device not in self._inexact_on:
            self._inexact_on[device] = self.inexact.to(device, non_blocking=True)
        return self._inexact_on[device]

    @cached_property
    def _inexact_on(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def owner(self) -> Tensor:
        """For each position `[tokens]` which reused span that is not exact holds it, counted from 1; 0 for none."""
        owner = torch.zeros(len(self), dtype=torch.int64)
        inexact = [span for span in self.reused if not span.exact]
        for number, span in enumerate(inexact, start=1):
            owner[span.start : span.stop] = number
        return owner

    def first_of_each(self, k: int) -> Tensor:
        """Return the first `k` positions `[n]` of each span that is reused and not exact."""
        heads = [torch.arange(s.start, min(s.start + k, s.stop)) for s in self.reused if not s.exact]
        return torch.cat(heads) if heads else self.inexact

    def _spans(self) -> Iterator[Span]:
        if self.prefix is not None:
            yield self.prefix
        yield from self.chunks
