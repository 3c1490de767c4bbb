"""The guard: its prediction on numbers made up to be predictable, and what it makes of a prefill."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import zoo
from support import blend as h

from chunkcache.blend import FusedCache, SelectivePrefill
from chunkcache.blend.guard import GuardedSelection, GuardModel, Signals, guard_steps
from chunkcache.blend.query import Query
from chunkcache.errors import CalibrationError

IDS = h.random_ids()
ALWAYS = GuardModel(((-99.0, 0.0, 0.0),) * 3, ((0.05, 0.0),))  # predicts next to nothing
NEVER = GuardModel(((99.0, 0.0, 0.0),) * 3, ((0.05, 0.0),))
POLICY = Query(ratio=0.1, guard=0.05)

models = pytest.mark.parametrize(
    ("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED]
)


def prompts(count, noise, seed=0):
    """Climbs whose true KL is 2 moved^0.8, times noise, at each of two rungs."""
    draw = random.Random(seed)

    def step(scale):
        moved = scale * math.exp(draw.gauss(0, 1))
        return Signals(moved, draw.uniform(0.5, 3)), 2 * moved**0.8 * math.exp(draw.gauss(0, noise))

    return [[step(0.02), step(0.004)] for _ in range(count)]


def ended(model, outcomes, bound):
    """The true KL at which each prompt is accepted; 0 after full prefill."""
    return [
        next((kl for at, (signals, kl) in enumerate(steps) if model.predict(at, signals, bound) <= bound), 0.0)
        for steps in outcomes
    ]


def test_it_learns_what_can_be_learned():
    model = GuardModel.fit(prompts(60, noise=0.0), [99.0])  # a bound that nothing breaks needs no margin
    for steps in prompts(20, noise=0.0, seed=1):
        for at, (signals, kl) in enumerate(steps):
            assert model.predict(at, signals, 99.0) == pytest.approx(kl, rel=0.35)  # the ridge shrinks it a little


@pytest.mark.parametrize("bound", [0.02, 0.05, 0.1])
def test_its_bound_holds_on_prompts_it_has_not_seen(bound):
    model = GuardModel.fit(prompts(200, noise=0.7), [0.02, 0.05, 0.1])
    kls = ended(model, prompts(2000, noise=0.7, seed=1), bound)
    assert sum(kl > bound for kl in kls) / len(kls) < 0.08
    assert sum(kl > 0 for kl in kls) / len(kls) > 0.05  # and not by falling back always


def test_noise_costs_a_margin():
    exact, noisy = (GuardModel.fit(prompts(60, noise), [0.05]).margins[0][1] for noise in (0.0, 1.0))
    assert 0 <= exact < noisy


def test_a_bound_that_no_prompt_came_near_has_the_margin_of_the_smaller_ones():
    model = GuardModel.fit(prompts(60, noise=1.0), [0.05, 99.0])
    assert model.margins[1][1] == model.margins[0][1] > 0


@pytest.mark.parametrize("seed", range(20))
def test_each_bound_is_kept_on_the_prompts_it_is_fitted_to(seed):
    """Also where its own least margin is below that of a smaller bound."""
    outcomes, bounds = prompts(10, noise=1.5, seed=seed), [0.01, 0.02, 0.05, 0.1]
    model = GuardModel.fit(outcomes, bounds)
    assert [max(ended(model, outcomes, bound)) <= bound for bound in bounds] == [True] * len(bounds)


def test_between_two_bounds_the_larger_margin_holds():
    model = GuardModel(((0.0, 0.0, 0.0),), ((0.02, 1.0), (0.05, 0.5), (0.1, 0.7)))
    margins = {bound: math.log(model.predict(0, Signals(0.1, 1.0), bound)) for bound in (0.01, 0.03, 0.05, 0.07, 9)}
    assert margins == pytest.approx({0.01: 1.0, 0.03: 1.0, 0.05: 0.5, 0.07: 0.7, 9: 0.7})


@models
def test_an_accepted_pass_is_the_policy_without_a_guard(name, attention):
    decoder = h.decoder(name, attention)
    plan = h.chunk_plan(decoder.model, IDS)
    guarded = SelectivePrefill(decoder, plan, POLICY, select=GuardedSelection(ALWAYS, POLICY.guard))
    logits = guarded.run()
    assert guarded.guarded.passes == 1
    assert not guarded.guarded.full
    plain = h.Selective(decoder, plan, replace(POLICY, guard=None))
    torch.testing.assert_close(logits, plain.logits[-1], atol=1e-4, rtol=0)
    for layer, expected in zip(h.layers_of(guarded.cache), h.layers_of(plain.cache), strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-4, rtol=0)


@models
def test_where_no_pass_is_good_enough_it_is_full_prefill(name, attention):
    decoder = h.decoder(name, attention)
    guarded = SelectivePrefill(
        decoder, h.chunk_plan(decoder.model, IDS), POLICY, select=GuardedSelection(NEVER, POLICY.guard)
    )
    expected, own = h.own_prefill(decoder.model, IDS)
    torch.testing.assert_close(guarded.run(), expected[-1], atol=1e-4, rtol=0)
    assert (guarded.guarded.passes, guarded.guarded.full) == (3, True)
    for layer, wanted in zip(h.layers_of(guarded.cache), h.layers_of(own), strict=True):
        torch.testing.assert_close(layer, wanted[:, :, -layer.shape[2] :], atol=1e-4, rtol=0)


def test_it_stops_at_the_first_step_that_is_good_enough():
    second = GuardModel((NEVER.weights[0], ALWAYS.weights[1], ALWAYS.weights[2]), NEVER.margins)
    decoder = h.decoder("llama")
    prefill = SelectivePrefill(
        decoder, h.chunk_plan(decoder.model, IDS), POLICY, select=GuardedSelection(second, POLICY.guard)
    )
    prefill.run()
    assert prefill.guarded.passes == 2
    assert prefill.guarded.predicted < 0.05


def test_the_signals_are_what_they_say():
    decoder = h.decoder("llama").shadow()
    plan = h.chunk_plan(decoder.model, IDS)
    cache = FusedCache(decoder.config, plan, decoder.rotaries)
    steps = list(guard_steps(decoder, plan, len(plan), cache, POLICY.escalation()))
    assert not cache.scouting
    before = h.Selective(h.decoder("llama"), plan, Query(ratio=0.0, k=0)).logits[-1].log_softmax(-1)
    for step in steps:
        now = step.log_probs
        assert step.signals.moved == pytest.approx(float((now.exp() * (now - before)).sum()), abs=1e-5)
        assert step.signals.entropy == pytest.approx(float(-(now.exp() * now).sum()), rel=1e-4)
        before = now
    assert [len(step.selected) for step in steps] == [6, 9, 24]  # of 60


def test_a_guard_without_a_calibration_is_refused():
    decoder = h.decoder("llama")
    with pytest.raises(CalibrationError, match="chunkcache calibrate"):
        SelectivePrefill(decoder, h.chunk_plan(decoder.model, IDS), POLICY).run()


@pytest.mark.parametrize("model", [ALWAYS, NEVER], ids=["accepted", "full"])
def test_tokens_to_verify_may_stand_behind_the_prompt(model):
    decoder, candidates = h.decoder("llama"), (7, 8, 9)
    plan = h.right_plan(IDS, h.own_prefill(decoder.model, IDS)[1])
    prefill = SelectivePrefill(decoder, plan, POLICY, select=GuardedSelection(model, POLICY.guard))
    ids = torch.tensor([(*IDS, *candidates)])
    with torch.no_grad():
        logits = prefill.model(input_ids=ids, past_key_values=prefill.cache).logits[0]
    expected, _ = h.own_prefill(decoder.model, (*IDS, *candidates))
    torch.testing.assert_close(logits[-4:], expected[-4:], atol=1e-4, rtol=0)
    assert prefill.cache.get_seq_length() == len(IDS) + 3
