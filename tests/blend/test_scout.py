"""The scout: what the question looks at over the stored KV, seen by a pass that leaves no other trace."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import FusedCache, Plan, SelectivePrefill
from chunkcache.blend.policy import Policy
from chunkcache.blend.reuse import Reuse
from chunkcache.blend.scout import scout

IDS = h.random_ids()
QUESTION = h.CHUNKS[-1][1]

models = pytest.mark.parametrize(
    ("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED]
)


def mean(weights):
    return weights.mean(dim=(0, 1))


def scouted(decoder, plan, layers, pool=mean):
    cache = FusedCache(decoder.config, plan, decoder.rotaries)
    return scout(decoder.shadow(), plan, cache, layers, pool), cache


@models
def test_over_right_kv_it_sees_the_attention_of_the_models_own_prefill(name, attention):
    _, cache = h.own_prefill(zoo.build(name, attention), IDS)
    seen, _ = scouted(h.decoder(name, attention), h.right_plan(IDS, cache), range(zoo.LAYERS))
    with torch.no_grad():
        output = zoo.build(name, "eager")(torch.tensor([IDS]), output_attentions=True)
    expected = torch.stack([mean(weights[0, :, QUESTION:]) for weights in output.attentions])
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [[0], [2], [1, 3], range(3)], ids=str)
def test_it_looks_at_the_layers_asked_for_and_runs_no_further(attention, layers):
    decoder = h.decoder("llama", attention)
    plan = h.chunk_plan(decoder.model, IDS)
    everything, _ = scouted(decoder, plan, range(zoo.LAYERS))
    ran = []
    handles = [layer.mlp.register_forward_hook(lambda *_: ran.append(1)) for layer in decoder.layers]
    try:
        seen, cache = scouted(decoder, plan, layers)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(seen, everything[list(layers)])
    assert len(ran) == max(layers)
    assert not cache.scouting
    assert cache.computed == 0


def test_it_pools_the_weights_of_the_question_alone():
    decoder, shapes = h.decoder("llama"), []

    def note(weights):
        shapes.append(tuple(weights.shape))
        return weights.amax(dim=(0, 1))

    seen, _ = scouted(decoder, h.chunk_plan(decoder.model, IDS), [1], note)
    assert shapes == [(4, h.TOKENS - QUESTION, h.TOKENS)]
    assert seen.shape == (1, h.TOKENS)


@dataclass(frozen=True)
class Looking(Policy):
    """Looks at some layers and then selects nothing."""

    name = "looking"

    def select(self, plan):
        return plan.inexact

    def attention_layers(self, layers):
        return range(layers - 1)

    def select_by_attention(self, plan, attention):
        return plan.inexact[:0]


@models
def test_it_leaves_no_trace_in_the_prefill_that_follows(name, attention):
    decoder = h.decoder(name, attention)
    plan = h.chunk_plan(decoder.model, IDS)
    looked, plain = h.Selective(decoder, plan, Looking()), h.Selective(decoder, plan, Reuse())
    torch.testing.assert_close(looked.logits, plain.logits, atol=1e-5, rtol=0)
    assert looked.cache.computed == plain.cache.computed
    for layer, expected in zip(looked.layers, plain.layers, strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-5, rtol=0)


def test_a_policy_is_not_asked_to_look_where_there_is_nothing_to_choose():
    class Failing(Looking):
        def select_by_attention(self, plan, attention):
            raise AssertionError("asked")

    decoder = h.decoder("llama")
    own, cache = h.own_prefill(decoder.model, IDS)
    for plan in (Plan.of(IDS), h.right_plan(IDS, cache, exact=True)):
        logits = SelectivePrefill(decoder, plan, Failing()).run()
        torch.testing.assert_close(logits, own[-1], atol=1e-4, rtol=0)


def test_a_failure_while_scouting_is_passed_on():
    def fail(weights):
        raise ZeroDivisionError

    decoder = h.decoder("llama")
    with pytest.raises(ZeroDivisionError):
        scouted(decoder, h.chunk_plan(decoder.model, IDS), [1], fail)


def test_a_chunk_that_ends_the_prompt_leaves_its_last_token_as_the_question():
    decoder = h.decoder("llama")
    plan = Plan.of(IDS, [span(0, h.alone(decoder.model, IDS), 0, h.TOKENS)])
    seen, _ = scouted(decoder, plan, [0])
    torch.testing.assert_close(seen.sum(), torch.tensor(1.0))
