"""The fidelity guard: recompute more, in steps, until the error is predicted to be within the user's bound.

The question is prefilled over the reused KV, then with the first selection recomputed, then with a larger one,
and so on. How far the next token's distribution moved from one pass to the next says how far it still is from full
prefill's; how much depends on the model and is fitted by calibration. When no step is good enough the whole
prompt is prefilled.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chunkcache.blend.attention import Watch
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.blend.scout import scout_layers

LEAST = 1e-6  # nats; below this a divergence is rounding
RIDGE = 0.05  # few prompts are fitted: a weight has to earn its place


@dataclass(frozen=True)
class Signals:
    """What a pass tells of its own error.

    Attributes:
        moved: KL of the next token's distribution to that of the pass before, in nats.
        entropy: of that distribution, in nats.
    """

    moved: float
    entropy: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Signals:
        """Return those of a pass, by the log-probabilities `[vocab]` that the pass before and this one came to."""
        both = (after.exp() * (after - before)).sum(), -(after.exp() * after).sum()
        moved, entropy = torch.stack(both).tolist()  # one wait for the device
        return cls(moved, entropy)

    def features(self) -> tuple[float, float, float]:
        """Return what the prediction is linear in."""
        return 1.0, math.log(max(self.moved, LEAST)), self.entropy


@dataclass(frozen=True)
class GuardStep:
    """One pass of a guarded prefill: what it recomputed, what came out, and its signals."""

    selected: Tensor
    log_probs: Tensor
    signals: Signals


GuardOutcomes = Sequence[tuple[Signals, float]]  # of one prompt, rung by rung: the signals, and the true KL in nats


@dataclass(frozen=True)
class GuardModel:
    """Predicts an upper bound of KL(full || pass) of the first token from the signals of a pass.

    For each rung, log KL is fitted as linear in `Signals.features`. A margin is added so that few predictions are too
    low; it depends on the bound that is asked for, since what counts is only on which side of it the KL is. Few or no
    calibration prompts come near a large bound, so its margin is at least that of every smaller one.

    Attributes:
        weights: for each rung, one per feature.
        margins: rising bounds in nats, and the margin of each in log units. In between the larger of both sides
            holds, and beyond them the last.
    """

    weights: tuple[tuple[float, ...], ...]
    margins: tuple[tuple[float, float], ...]

    def predict(self, step: int, signals: Signals, bound: float) -> float:
        """Return the largest KL in nats to expect at rung `step`, counted from 0, where `bound` is asked for."""
        return math.exp(_fitted(self.weights[step], signals) + self._margin(bound))

    def _margin(self, bound: float) -> float:
        below = [margin for at, margin in self.margins if at <= bound][-1:]
        above = [margin for at, margin in self.margins if at >= bound][:1]
        return max(below + above)

    @classmethod
    def fit(cls, prompts: Sequence[GuardOutcomes], bounds: Sequence[float], broken: float = 0.05) -> GuardModel:
        """Fit to calibration prompts.

        Args:
            prompts: what each went through, all with the same number of rungs.
            bounds: bounds that users may ask for, rising, in nats.
            broken: share of prompts at most that may end above their bound, whichever of `bounds` is asked for.
                The share is estimated as (count + 1) / (prompts + 1), as in conformal prediction.
        """
        weights = tuple(_regress([prompt[step] for prompt in prompts]) for step in range(len(prompts[0])))
        logs = [[_fitted(weights[at], signals) for at, (signals, _) in enumerate(p)] for p in prompts]
        allowed = max(0, math.floor(broken * (len(prompts) + 1) - 1 + 1e-9))
        margins: list[tuple[float, float]] = []
        for bound in bounds:
            floor = margins[-1][1] if margins else 0.0
            margins.append((bound, _least_margin(prompts, logs, bound, allowed, floor)))
        return cls(weights, tuple(margins))


def _fitted(weights: Sequence[float], signals: Signals) -> float:
    return sum(weight * x for weight, x in zip(weights, signals.features(), strict=True))


def _least_margin(
    prompts: Sequence[GuardOutcomes], logs: Sequence[Sequence[float]], bound: float, allowed: int, floor: float
) -> float:
    """Return the least margin, of `floor` or more, with which at most `allowed` prompts end above `bound`.

    A larger one need not do as well: what it rejects at one rung may end above the bound at the next.
    """
    limit = math.log(bound) - floor
    heights = sorted({floor, *(math.log(bound) - log + 1e-9 for row in logs for log in row if log < limit)})
    return next(margin for margin in heights if _broken(prompts, logs, margin, bound) <= allowed)


def _regress(pairs: GuardOutcomes) -> tuple[float, ...]:
    """Return the weights of a ridge regression of log KL; the intercept is not shrunk."""
    x = np.array([signals.features() for signals, _ in pairs])
    y = np.log(np.maximum([kl for _, kl in pairs], LEAST))
    ridge = RIDGE * len(pairs) * np.diag([0.0, *np.ones(x.shape[1] - 1)])
    return tuple(np.linalg.solve(x.T @ x + ridge, x.T @ y).tolist())


def _broken(prompts: Sequence[GuardOutcomes], logs: Sequence[Sequence[float]], margin: float, bound: float) -> int:
    """Return how many prompts are accepted at some rung though their KL is above `bound`."""
    count = 0
    for steps, predicted in zip(prompts, logs, strict=True):
        accepted = (kl for (_, kl), log in zip(steps, predicted, strict=True) if log + margin <= math.log(bound))
        count += next(accepted, 0.0) > bound
    return count


@dataclass(frozen=True)
class Guarded:
    """What a guard did.

    Attributes:
        bound: what the user accepts, KL of the first token in nats.
        passes: partial recomputations tried.
        predicted: the predicted bound of the one that was accepted; 0 after full prefill.
        full: whether none was accepted, and the whole prompt was prefilled.
        selected: positions `[n]` that each pass recomputed.
    """

    bound: float
    passes: int
    predicted: float
    full: bool
    selected: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)


class GuardedSelection:
    """Selects the rows of a guarded prefill (`select_rows`): recomputes until the predicted KL is within the bound.

    Args:
        model: predicts.
        bound: in nats.

    Attributes:
        model: as given.
        outcome: what was done; None before the prefill, and where nothing inexact was reused.
    """

    def __init__(self, model: GuardModel, bound: float) -> None:
        self.model, self._bound = model, bound
        self.outcome: Guarded | None = None

    def __call__(self, decoder: Decoder, plan: Plan, prompt_tokens: int, cache: FusedCache, policy: Policy) -> Tensor:
        """Return the positions `[rows]` that are still to be computed, by the forward that follows.

        These are those from the prompt's last token on, whose logits are wanted, or all that is not exact. The
        arguments are those of `select_rows`.
        """
        if not len(plan.inexact):
            return plan.fresh
        outcome = self.decide(guard_steps(decoder, plan, prompt_tokens, cache, policy.escalation()))
        if outcome.full:
            return torch.cat((plan.fresh, plan.inexact)).sort().values
        return torch.arange(prompt_tokens - 1, len(plan))

    def decide(self, steps: Generator[GuardStep, None, None]) -> Guarded:
        """Take passes until one is accepted; return what was done, which is `outcome` then."""
        passes, tried = 0, []
        with closing(steps):
            for step in steps:
                predicted = self.model.predict(passes, step.signals, self._bound)
                passes += 1
                tried.append(step.selected)
                if predicted <= self._bound:
                    self.outcome = Guarded(self._bound, passes, predicted, full=False, selected=tuple(tried))
                    return self.outcome
        self.outcome = Guarded(self._bound, passes, 0.0, full=True)
        return self.outcome


def guard_steps(
    decoder: Decoder, plan: Plan, prompt: int, cache: FusedCache, policies: Sequence[Policy]
) -> Generator[GuardStep, None, None]:
    """Yield one rung per policy, each recomputing what its policy selects, over what the one before left in `cache`.

    Args:
        decoder: a decoder over the shadow that serves the request.
        plan: what is reused.
        prompt: tokens of the plan that are the prompt's, whose last gives the signals.
        cache: the request's cache, untouched so far.
        policies: policies with scout layers, in rising order of what they select; all look at the same layers.
    """
    attention: list[Tensor] = []
    first = policies[0]
    watches = [
        Watch(decoder.attentions[layer], prompt - plan.end, lambda w, _: attention.append(first.pool(w.float())))
        for layer in scout_layers(decoder, first)
    ]
    cache.scouting = True
    try:
        fresh = plan.fresh[plan.fresh < prompt]
        before = _log_probs(decoder, plan, cache, fresh)
        for watch in watches:
            watch.remove()
        cache.seen = torch.stack(attention)
        for policy in policies:
            selected = policy.select_by_attention(plan, cache.seen)
            log_probs = _log_probs(decoder, plan, cache, torch.cat((fresh, selected)).sort().values)
            yield GuardStep(selected, log_probs, Signals.between(before, log_probs))
            before = log_probs
    finally:
        cache.scouting = False
        for watch in watches:
            watch.remove()


@torch.no_grad()
def _log_probs(decoder: Decoder, plan: Plan, cache: FusedCache, rows: Tensor) -> Tensor:
    """Compute `rows` over the cache; return the log-probabilities `[vocab]` of the next token."""
    cache.go_on_with(rows)
    on_device = cache.rows_on(decoder.device)
    model: Any = decoder.model
    keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    output = model(
        input_ids=cache.ids_on(decoder.device),
        position_ids=on_device[None],
        attention_mask=decoder.masks(on_device, len(plan)),
        past_key_values=cache,
        use_cache=True,
        **keep,
    )
    log_probs: Tensor = output.logits[0, -1].float().log_softmax(-1)
    return log_probs
