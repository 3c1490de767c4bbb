"""query: recompute the tokens that the question looks at (after FusionRAG, 2601.12904, and ProphetKV, 2602.02579).

Behind a short question the tokens next to its own words are selected, without the model. Else the question is
prefilled over the reused KV as they are, up to a third of the layers, and the tokens that it attends to most there
are selected. They are recomputed in one pass, so that no layer is ever computed in full. The chunks were computed
behind a lead-in: passages that are in no prompt, so that no chunk was computed as if it came first.

FusionRAG computes chunks behind similar chunks and selects by the question first; ProphetKV selects by its attention
over the reused KV in all layers; EPIC (2410.15332) recomputes the first tokens of each chunk. Ours are the generic
lead-in, the look at few layers, the question's words where a look would cost too much, what is left for later, and
the guard. What each of these choices is worth is in docs/experiments.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Check, Policy, Schedule, Share, check_share
from chunkcache.blend.words import marks, near_words
from chunkcache.errors import PolicyError

OPEN = ("most", "least", "words")  # options that are those of a `Look` where they are not given
LADDER = (0.15, 0.4)  # what a guarded prefill tries next
LONG = 128  # tokens computed in any case, from which on a look adds little to what they cost: it is carried on
MIDDLE = (1 / 2, 2 / 3)  # shares of the depth: where a look tells most, and costs more than one further down
AUTO_MASS = 0.5  # ratio=auto selects the fewest tokens that hold this share of the attention
HEADS = 2  # ratio=auto selects the first so many of each chunk, where that is little beside the others
MARKS = 2 / 5  # share of what is selected without a look that are marks, if the model has a sliding window
DEPTH = (1 / 3, 0.6)  # shares of the depth: how far what is selected without a look is recomputed, with a window
ALL = (1.0, 1.0)  # likewise: in all layers
FEW = 2048  # tokens to select from, beyond which what is selected without a look grows with them
LEAD = 1024  # tokens of lead-in, where no calibration says otherwise


@dataclass(frozen=True)
class Look:
    """How `query` looks at the question, and how much `ratio=auto` selects; `chunkcache calibrate` finds it.

    Attributes:
        first: the layers looked at begin at this share of the depth.
        last: and end at this one.
        most: the largest share of the chunk tokens that is selected.
        least: chunk tokens from which on it looks; of fewer it selects the first of each chunk and by the question's
            words, which took less time and did no worse up to 4,500 tokens, where it was measured. Behind a long
            question it looks in any case.
        words: how many it selects without a look; of more than 2,048 tokens more, in proportion.
    """

    first: float = 1 / 6
    last: float = 1 / 3
    most: float = 0.03
    least: int = 8192
    words: int = 24

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= 1:
            raise PolicyError(
                f"layers from {self.first:g} to {self.last:g} of the depth are none; both are shares of it"
            )
        if not 0 <= self.most <= 1:
            raise PolicyError(f"most={self.most} is not between 0 and 1")
        if self.least < 0:
            raise PolicyError(f"least={self.least} is negative; it is a number of tokens")
        if self.words < 0:
            raise PolicyError(f"words={self.words} is negative; it is a number of tokens, 0 for none")

    @property
    def least_share(self) -> float:
        """The smallest share of the chunk tokens that is selected, where any are."""
        return self.most * 2 / 5

    def layers(self, layers: int) -> range:
        """Return the layers looked at, of a model of so many."""
        return _between(self.first, self.last, layers)


@dataclass(frozen=True)
class Query(Policy):
    """The `ratio` of chunk tokens with the most attention from the question.

    Args:
        ratio: share of the chunk tokens, 0 for none and no look at the question; `auto` takes the fewest that hold
            half of the question's attention to chunk tokens, between two fifths of `most` and `most`, and the first
            two of each chunk; of less than `least` tokens `words` of them or more.
        k: the first k tokens of each chunk are selected in any case.
        lead: tokens of lead-in at most that the chunks were computed behind, 0 for none; None for what
            `chunkcache calibrate` found to be best for the model, 1,024 without a calibration.
        guard: bound on the KL of the first token, in nats: more is recomputed until it is predicted to hold
            (`blend.guard`). It needs a calibration.
        layers: shares of the depth between which the layers looked at lie. These four, where they are not given,
            are what `chunkcache calibrate` found, and without a calibration those of `Look`. With a `ratio` that is
            given, or a guard, these layers are in the middle: who recomputes much has time to look well.
        most: share of the chunk tokens, see `ratio`.
        least: tokens, see `ratio`.
        words: tokens that are selected under `ratio=auto` where it does not look, of more than 2,048 in proportion,
            at most a share of `most`: up to a fifth are the first of each chunk, and the others stand next to the
            question's own words (`blend.words`).
        window: tokens that the narrowest layer sees, 0 if all see the whole prompt; None for what the model has. Of
            a prompt that does not fit, two fifths of what is selected without a look are marks in the window.
        depth: two shares of the depth, where what is selected without a look, of a prompt that does not fit in the
            window, is recomputed no further: at the first what lies before the window; at the second, whose keys and
            values are still computed, the others. Not given they are `DEPTH`; `depth=1,1` is all layers.
        later: share of the chunk tokens that is recomputed once the first token is out, by the same attention.

    Raises:
        PolicyError: an option is out of range.
    """

    name = "query"
    skips_windows = True
    ratio: Share = "auto"
    k: int = 0
    lead: int | None = None
    guard: float | None = None
    layers: Schedule = ()
    most: float | None = None
    least: int | None = None
    words: int | None = None
    window: int | None = None
    depth: Schedule = ()
    later: float | None = None

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        check_share("later", self.later or 0.0)
        if self.k < 0:
            raise PolicyError(f"k={self.k} is negative")
        if self.lead is not None and self.lead < 0:
            raise PolicyError(f"lead={self.lead} is negative; it is a number of tokens, 0 for no lead-in")
        if self.guard is not None and not self.guard > 0:
            raise PolicyError(f"guard={self.guard} is not above 0; it bounds the KL of the first token, in nats")
        if self.window is not None and self.window < 0:
            raise PolicyError(f"window={self.window} is negative; it is a number of tokens, 0 for no window")
        if self.depth and (len(self.depth) != 2 or not 0 < self.depth[0] <= self.depth[1] <= 1):
            raise PolicyError(f"depth={self.depth} are not two rising shares of the depth, as in depth=0.33,0.6")
        if len(self.layers) not in (0, 2):
            raise PolicyError(f"layers={self.layers} are not two shares of the depth, as in layers=0.5,0.67")
        _ = self.look

    @property
    def look(self) -> Look:
        """How it looks, by its options."""
        return self.looking(Look())

    def looking(self, found: Look) -> Look:
        """Return `found`, but for what its own options say."""
        given = {name: getattr(self, name) for name in OPEN if getattr(self, name) is not None}
        first, last = self.layers or (found.first, found.last)
        return replace(found, first=first, last=last, **given)

    def fitted(self, found: Look) -> Query:
        """Return this policy with the options that it leaves open as they were found."""
        look = self.looking(found)
        layers = (look.first, look.last) if self._is_quick else self.layers
        return replace(self, layers=layers, **{name: getattr(look, name) for name in OPEN})

    @property
    def _is_quick(self) -> bool:
        """Whether a look should cost little, because what it leads to does."""
        return self.ratio == "auto" and self.guard is None

    def afterwards(self) -> float:
        """Return `later`, 0 where it is not given."""
        return self.later or 0.0

    def at_once(self) -> Query:
        """Return it without `later`, and in all layers."""
        return replace(self, later=None, depth=ALL)

    def guarded(self) -> float | None:
        """Return `guard`."""
        return self.guard

    def escalation(self) -> Sequence[Query]:
        """Return this policy, and others that recompute 15 % and 40 % where that is more."""
        least = self.look.least_share if self.ratio == "auto" else self.ratio
        return [self, *(replace(self, ratio=ratio) for ratio in LADDER if ratio > least)]

    def lead_in(self) -> int:
        """Return `lead`."""
        return LEAD if self.lead is None else self.lead

    def neighbours(self) -> bool:
        """Return True: nearest chunks are worth having also where another lead-in is not."""
        return True

    def wants_attention(self, plan: Plan) -> bool:
        """Return whether something is to be selected."""
        if self.ratio != "auto":
            return self.ratio > 0
        return self.look.most > 0 and (len(plan.inexact) >= self.look.least or len(plan.fresh) >= LONG)

    def attention_layers(self, layers: int) -> Sequence[int]:
        """Return the layers looked at before anything is recomputed."""
        return self.look.layers(layers) if self._is_quick or self.layers else _between(*MIDDLE, layers)

    def layers_watched_for_later(self, layers: int) -> Sequence[int]:
        """Return those in the middle: the prefill comes through them in any case."""
        return _between(*MIDDLE, layers)

    def filter_layers(self, layers: int) -> Sequence[int]:
        """Return where rows end by `depth`, of a model with a window."""
        ends = self._ends(layers) if self.window and self._is_quick else ()
        return sorted({end for end in ends if end < layers})

    def filter_rows(self, check: Check) -> Tensor | None:
        """Return what is not from chunks, and up to the second layer what lies in the window; None if it looked."""
        plan = check.plan
        if not self.window or self.window >= len(plan) or self.wants_attention(plan):
            return None
        first = len(plan) - self.window  # that the window still holds
        if check.layer == self._ends(check.layers)[1]:
            first = len(plan)
            check.kv()  # which it keeps
        stays = torch.ones(len(plan), dtype=torch.bool)
        stays[plan.inexact[plan.inexact < first]] = False
        return stays[check.rows_on_host()].nonzero()[:, 0]

    def _ends(self, layers: int) -> tuple[int, int]:
        first, last = self.depth or DEPTH
        return math.ceil(layers * first), math.ceil(layers * last)

    def carries(self) -> bool:
        """Return whether the ratio is `auto`: of so few rows the question would be the larger part."""
        return self._is_quick

    def select(self, plan: Plan) -> Tensor:
        """Return the first of each chunk, and with `ratio=auto` marks and what is next to the question's words."""
        if self.ratio != "auto" or len(plan.inexact) == 0:
            return plan.first_of_each(self.k)
        look, tokens = self.look, len(plan.inexact)
        count = math.ceil(min(look.words * max(1, tokens / FEW), look.most * tokens))
        always = self._first(plan, count // 5)
        if self.window and self.window < len(plan):
            always = torch.cat((always, marks(plan, self.window, math.ceil(MARKS * count))))
        return near_words(plan, count, always).sort().values

    def select_by_attention(self, plan: Plan, attention: Tensor) -> Tensor:
        """Return the positions with the highest attention, and the first of each chunk."""
        candidates = plan.inexact_on(attention.device)
        seen, order = attention.mean(0)[candidates].sort(descending=True)
        if self.ratio == "auto":
            look = self.look
            low, high = (math.ceil(share * len(candidates)) for share in (look.least_share, look.most))
            count = _auto(seen).clamp(low, high)
            both = torch.cat((count[None], candidates[order[:high]])).cpu()  # one wait for the device
            highest, first = both[1 : 1 + int(both[0])], self._first(plan, low // 3)
        else:
            highest = candidates[order[: math.ceil(self.ratio * len(candidates))]].cpu()
            first = plan.first_of_each(self.k)
        selected: Tensor = torch.unique(torch.cat((highest, first)))
        return selected

    def _first(self, plan: Plan, most: int) -> Tensor:
        """Return the first `k` of each chunk, and `HEADS` or one of them unless that is more than `most` in all."""
        chunks = sum(not span.exact for span in plan.reused)
        return plan.first_of_each(max(self.k, min(HEADS, most // chunks)))


def _between(first: float, last: float, layers: int) -> range:
    """Return the layers between two shares of the depth, of so many; one at least."""
    lowest = min(int(layers * first), layers - 1)
    return range(lowest, max(lowest + 1, math.ceil(layers * last)))


def _auto(seen: Tensor) -> Tensor:
    """Return how many of the scores `[tokens]`, sorted from the highest, hold `AUTO_MASS` of their sum."""
    return (seen.cumsum(0) < AUTO_MASS * seen.sum()).sum() + 1
