"""Where the KV of each token of a prompt came from, and what was done to them.

What is needed for it is kept when a prefill is over, and worked out when somebody asks: positions that are on an
accelerator come over then, and never before the first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from chunkcache.blend import Plan, SelectivePrefill
from chunkcache.kv import Span

State = Literal["computed", "exact", "reused", "recomputed"]
STATES: tuple[State, ...] = ("computed", "exact", "reused", "recomputed")
COMPUTED = "computed"


@dataclass(frozen=True)
class ChunkReport:
    """What was done with one chunk of a prompt, or with its prefix.

    Attributes:
        start: position of its first token in the prompt.
        tokens: how many of its tokens stand there.
        source: the kind of tier that its KV came from (`memory`, `disk`, ...), `conversation` for those of the turns
            before, `computed` where they were computed for this request.
        lead: what it was computed behind: `prefix`, `lead-in`, `neighbours`, or `context`, the very tokens that stand
            before it. None where that is not known, and for what was computed with the prompt.
        reused_tokens: tokens whose KV were put in place as they are.
        recomputed_tokens: tokens whose KV were put in place, and computed again in one layer or more.
        exact: whether its KV are now what full prefill of this very prompt computes, but for rounding.
    """

    start: int
    tokens: int
    source: str
    lead: str | None
    reused_tokens: int
    recomputed_tokens: int
    exact: bool


@dataclass(frozen=True)
class _Part:
    """A span without its KV, so that these can be let go of."""

    start: int
    stop: int
    source: str
    lead: str | None
    exact: bool
    reused: bool


class PromptReport:
    """What was done with each token of one prompt.

    Args:
        plan: what was to be reused.
        prefill: what ran.
        leads: what chunks were computed behind, by their position in the prompt.
        watched: whether to keep what the question looked at.

    Attributes:
        tokens: length of the prompt.
        later: positions `[rows]` that were recomputed once the first token was out; None for none. It is set before
            anything is asked.
    """

    def __init__(
        self, plan: Plan, prefill: SelectivePrefill, leads: Mapping[int, str], watched: bool = False
    ) -> None:
        cache = prefill.cache
        self.tokens = len(plan)
        self._layers = len(cache.layers)
        taken = prefill.reused_at if cache.prefilled else frozenset()
        self._prefix = None if plan.prefix is None else _part(plan.prefix, taken, None)
        self._chunks = [_part(span, taken, leads.get(span.start)) for span in plan.chunks]
        self._rows = _distinct(cache.computed_rows)
        if prefill.guarded is not None:  # its passes are whole forwards
            self._rows += [(selected, self._layers) for selected in prefill.guarded.selected]
        self._seen = cache.seen if watched else None
        self.later: Tensor | None = None

    @cached_property
    def prefix(self) -> ChunkReport | None:
        """What was done with the tokens before the chunks; None where none of them was reused."""
        return None if self._prefix is None else self._report(self._prefix, sound=True)

    @cached_property
    def chunks(self) -> list[ChunkReport]:
        """What was done with each chunk, in order."""
        sound, reports = self.prefix is None or self.prefix.exact, []
        for part in self._chunks:
            reports.append(self._report(part, sound))
            sound &= reports[-1].exact
        return reports

    @cached_property
    def states(self) -> list[tuple[State, int]]:
        """What was done with the tokens from the first to the last: runs of equal states, with their lengths.

        `computed` with the prompt, `exact` or approximate KV that were `reused` as they are, or approximate ones that
        were `recomputed` in one layer or more.
        """
        codes = torch.zeros(self.tokens, dtype=torch.int64)
        for part in self._parts:
            if part.reused:
                again = self._computed[part.start : part.stop] > 0
                codes[part.start : part.stop] = 1 if part.exact else 2 + again.long()
        runs, lengths = torch.unique_consecutive(codes, return_counts=True)
        return [(STATES[run], length) for run, length in zip(runs.tolist(), lengths.tolist(), strict=True)]

    @cached_property
    def attention(self) -> list[float] | None:
        """What share of the question's attention each token had, a mean over the layers that the policy looked at.

        None where it did not look, or nobody asked for it ahead (`PreparedRequest.watched`).
        """
        if self._seen is None:
            return None
        mean = self._seen.float().mean(0)[: self.tokens]
        shares: list[float] = (mean / mean.sum().clamp(min=1e-30)).tolist()
        return shares

    @property
    def _parts(self) -> Sequence[_Part]:
        return self._chunks if self._prefix is None else [self._prefix, *self._chunks]

    @cached_property
    def _computed(self) -> Tensor:
        """In how many layers each token `[tokens]` was computed."""
        counts = torch.zeros(self.tokens, dtype=torch.int64)
        for rows, layers in [*self._rows, *([] if self.later is None else [(self.later, self._layers)])]:
            counts[_within(rows, self.tokens)] += layers
        fresh = torch.ones(self.tokens, dtype=torch.bool)
        for part in self._parts:
            fresh[part.start : part.stop] = not part.reused
        counts[fresh] = self._layers  # a scout, or a guard's pass, may have computed them before
        return counts

    def _report(self, part: _Part, sound: bool) -> ChunkReport:
        """Return what was done with a part; `sound` where all before it is what full prefill computes."""
        counts = self._computed[part.start : part.stop]
        again = int((counts > 0).sum()) if part.reused and not part.exact else 0
        whole = bool((counts >= self._layers).all())
        return ChunkReport(
            start=part.start,
            tokens=part.stop - part.start,
            source=part.source,
            lead=part.lead,
            reused_tokens=part.stop - part.start - again if part.reused else 0,
            recomputed_tokens=again,
            exact=(part.reused and part.exact) or (sound and whole),
        )


def _part(span: Span, taken: frozenset[int], lead: str | None) -> _Part:
    reused = span.kv is not None and span.start in taken
    source = (span.kv.source if span.kv is not None and reused else "") or COMPUTED
    return _Part(span.start, span.stop, source, lead if reused else None, span.exact, reused)


def _distinct(computed_rows: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Return the row tensors of the layers, each once, with the number of layers that it is of."""
    layers: dict[int, int] = {}
    for rows in computed_rows:
        layers[id(rows)] = layers.get(id(rows), 0) + 1
    return [(rows, layers[id(rows)]) for rows in {id(rows): rows for rows in computed_rows}.values()]


def _within(rows: Tensor, tokens: int) -> Tensor:
    """Return the positions that are of the prompt; candidates of assisted generation may stand behind it."""
    rows = rows.cpu()
    return rows[rows < tokens]
