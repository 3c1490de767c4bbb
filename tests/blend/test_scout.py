"""The scout: what the question looks at over the stored KV, seen by a pass that leaves no other trace."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import FusedCache, Plan, SelectivePrefill
from chunkcache.blend.fusionrag import FusionRAG
from chunkcache.blend.policy import Policy
from chunkcache.blend.reuse import Reuse
from chunkcache.blend.scout import scout
from chunkcache.kv import ChunkKV, Span

IDS = h.random_ids()
QUESTION = h.CHUNKS[-1][1]

models = pytest.mark.parametrize(
    ("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED]
)


def mean(weights):
    return weights.mean(dim=(0, 1))


def scouted(decoder, plan, layers, pool=mean, blind=False):
    cache = FusedCache(decoder.config, plan, decoder.rotaries)
    return scout(decoder.shadow(), plan, cache, layers, pool, blind=blind), cache


@models
def test_over_right_kv_it_sees_the_attention_of_the_models_own_prefill(name, attention):
    _, cache = h.own_prefill(zoo.build(name, attention), IDS)
    seen, _ = scouted(h.decoder(name, attention), h.right_plan(IDS, cache), range(zoo.LAYERS))
    with torch.no_grad():
        output = zoo.new(name, "eager")(torch.tensor([IDS]), output_attentions=True)
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


def prefixed(model):
    """The plan of `chunk_plan`, with its first span for what it is: the prefix."""
    prefix, *chunks = h.chunk_plan(model, IDS).chunks
    return Plan.of(IDS, chunks, prefix)


OUTSIDE = [at for at in range(h.TOKENS) if not any(start <= at < end for start, end in h.CHUNKS)]


class BlindCache(h.FrozenCache):
    """Gives the chunks' stored KV in the layers looked at; a mask hides them in all others."""

    def __init__(self, stored):
        super().__init__(stored, dict.fromkeys(range(zoo.LAYERS), torch.tensor(OUTSIDE)))


@torch.no_grad()
def looked_by_hand(model, plan, layer):
    """Attention of each chunk's tokens at `layer`, by transformers alone: chunks are hidden in the layers below."""
    stored = [torch.zeros(2, 2, h.TOKENS, part.shape[3]) for part in plan.reused[0].kv.layers]
    for start, end in h.CHUNKS:
        for target, part in zip(stored, h.alone(model, IDS[start:end], start).layers, strict=True):
            target[:, :, start:end] = part
    causal = torch.ones(h.TOKENS, h.TOKENS, dtype=torch.bool).tril()
    hidden = causal.clone()
    for start, end in h.CHUNKS:
        hidden[:, start:end] = torch.eye(h.TOKENS, dtype=torch.bool)[:, start:end]
    masks = [torch.zeros(1, 1, *mask.shape).masked_fill_(~mask, -1e30) for mask in (hidden, causal)]
    weights = []

    def look(module, args, kwargs):
        return args, {**kwargs, "attention_mask": masks[1]}

    decoder = model.model.layers[layer]
    handles = [
        decoder.register_forward_pre_hook(look, with_kwargs=True),
        decoder.self_attn.register_forward_hook(lambda *call: weights.append(call[2][1][0])),
    ]
    try:
        positions = torch.arange(h.TOKENS)[None]
        cache = BlindCache(stored)
        model(input_ids=torch.tensor([IDS]), position_ids=positions, attention_mask=masks[0], past_key_values=cache)
    finally:
        for handle in handles:
            handle.remove()
    [seen] = weights
    chunks = [seen[:, QUESTION:, start:end] for start, end in h.CHUNKS]
    return [mean(chunk / chunk.sum(-1, keepdim=True)) for chunk in chunks]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen2", "qwen3", "olmo2", "granite"])
@pytest.mark.parametrize("layer", [0, 2, zoo.LAYERS - 1])
def test_a_blind_question_is_computed_alone_and_meets_each_chunk_by_itself(name, attention, layer):
    plan = prefixed(zoo.build(name, attention))
    [seen], cache = scouted(h.decoder(name, attention), plan, [layer], blind=True)
    for (start, end), expected in zip(h.CHUNKS, looked_by_hand(zoo.build(name, "eager"), plan, layer), strict=True):
        torch.testing.assert_close(seen[start:end], expected, atol=1e-5, rtol=1e-4)
    assert cache.shown is None
    assert not cache.scouting


def with_other(plan, change):
    """The plan, with the KV of its chunks changed layer by layer."""
    spans = []
    for one in plan.chunks:
        layers = [change(index, layer.clone()) for index, layer in enumerate(one.kv.layers)]
        spans.append(span(one.start, ChunkKV.of(one.kv.token_ids, one.kv.position, layers)))
    return Plan.of(plan.token_ids, spans, plan.prefix)


@models
def test_a_blind_question_minds_only_the_keys_of_the_last_layer(name, attention):
    decoder = h.decoder(name, attention)
    plan = prefixed(decoder.model)

    def all_but_those_keys(index, layer):
        kept = layer[0].clone()
        layer.normal_()
        if index == zoo.LAYERS - 1:
            layer[0] = kept
        return layer

    def those_keys(index, layer):
        if index == zoo.LAYERS - 1:
            layer[0].normal_()
        return layer

    last = FusionRAG().attention_layers(zoo.LAYERS)
    seen, other, another = (
        scouted(decoder, each, last, blind=True)[0]
        for each in (plan, with_other(plan, all_but_those_keys), with_other(plan, those_keys))
    )
    torch.testing.assert_close(other, seen, atol=1e-6, rtol=1e-5)
    assert seen.isfinite().all()
    if "sliding" not in name and name != "starcoder2":  # their windows do not reach a chunk
        assert (another - seen).abs().amax() > 1e-3


def test_a_blind_question_minds_no_chunk_that_is_not_stored():
    decoder = h.decoder("llama")
    plan = prefixed(decoder.model)
    a, b = plan.chunks
    missing = Plan.of(IDS, [a, Span(b.start, b.stop, b.token_ids)], plan.prefix)
    one, both = (scouted(decoder, each, [zoo.LAYERS - 1], blind=True)[0] for each in (missing, plan))
    torch.testing.assert_close(one[0, a.start : a.stop], both[0, a.start : a.stop])
    assert one.isfinite().all()


@models
@pytest.mark.parametrize("layers", [[zoo.LAYERS - 1], [1, 2]], ids=str)
def test_a_blind_look_leaves_no_trace_in_the_prefill_that_follows(name, attention, layers):
    class Blind(Looking):
        def blind(self):
            return True

        def attention_layers(self, _):
            return layers

    decoder = h.decoder(name, attention)
    plan = prefixed(decoder.model)
    looked, plain = h.Selective(decoder, plan, Blind()), h.Selective(decoder, plan, Reuse())
    torch.testing.assert_close(looked.logits, plain.logits, atol=1e-5, rtol=0)
    for layer, expected in zip(looked.layers, plain.layers, strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-5, rtol=0)
