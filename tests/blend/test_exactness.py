"""The promise of the blend room, on every model family: what is recomputed is what the model would have computed.

Each model of the zoo, with each attention it has, under each policy there is; in bfloat16, for decoding and for the
rows that are left as they are, each model under one policy and each policy on two models. The prompt is longer than
the sliding windows and than one block of rows. float32 results may differ by 1e-4 at most. In bfloat16, which keeps
8 bits of mantissa, kernels that add in another order round differently in every layer: there the bound is
relative to the norm of the whole tensor, and 4 %; a model's own bfloat16 and float32 results are 1 to 3 % apart.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import POLICIES, FusedCache, Plan, SelectivePrefill
from chunkcache.blend.link import Link
from chunkcache.blend.query import Query
from chunkcache.blend.reuse import Reuse

IDS = h.random_ids()
RELATIVE_BOUND = 0.04
SELECT_ALL = {
    "k": 999,
    "ratio": 1.0,
    "alpha": 2.0,
    "focus": 1.0,
}  # a new policy's option goes here, so that it selects every token

models = pytest.mark.parametrize(
    ("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED]
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EVERY = [kind() for kind in POLICIES.values()]
FEW_MODELS = [("llama", "sdpa"), ("gemma3", "sdpa")]


def matrix(policies, *more, few=True):
    """Return every model under every policy; if `few`, under one of them, and every policy on two models."""
    return [
        pytest.param(*served, *more, policy, id="-".join((*served, *map(str, more), policy.name)))
        for served in zoo.SERVED
        for policy in policies
        if not few or served in FEW_MODELS or policy.name == Link.name
    ]


def in_both_dtypes(policies):
    cases = matrix(policies, torch.float32, few=False) + matrix(policies, torch.bfloat16)
    return pytest.mark.parametrize(("name", "attention", "dtype", "policy"), cases)


def in_float32(policies):
    return pytest.mark.parametrize(("name", "attention", "policy"), matrix(policies))


def selecting_all(kind):
    return kind(**{field.name: SELECT_ALL[field.name] for field in fields(kind) if field.name in SELECT_ALL})


@cache
def own(name, attention, dtype=torch.float32):
    return h.own_prefill(zoo.build(name, attention, dtype), IDS)


def assert_same(value, expected):
    assert value.shape == expected.shape
    if value.dtype == torch.float32:
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)
    else:
        value, expected = value.float(), expected.float()
        assert (value - expected).norm() <= RELATIVE_BOUND * expected.norm()


def assert_same_layers(layers, expected):
    for layer, wanted in zip(layers, expected, strict=True):
        assert_same(layer, wanted)


@in_both_dtypes([selecting_all(kind) for kind in POLICIES.values() if kind is not Reuse])
def test_with_every_token_selected_wrong_kv_leave_no_trace(name, attention, dtype, policy):
    logits, cache = own(name, attention, dtype)
    plan = h.wrong_plan(IDS, cache)
    prefill = h.Selective(h.decoder(name, attention, dtype), plan, policy)
    assert prefill.rows.tolist() == list(range(h.PREFIX, h.TOKENS))
    assert_same(prefill.logits, logits[h.PREFIX :])
    assert_same_layers(prefill.layers, h.layers_of(cache))


@in_both_dtypes(EVERY)
def test_over_right_kv_any_selection_gives_the_models_own_prefill(name, attention, dtype, policy):
    logits, cache = own(name, attention, dtype)
    prefill = h.Selective(h.decoder(name, attention, dtype), h.right_plan(IDS, cache), policy)
    assert_same(prefill.logits, logits[prefill.rows])
    assert_same_layers(prefill.layers, h.layers_of(cache))


@in_float32([*(policy for policy in EVERY if policy.shift() is None), Query(window=20, words=40, most=1.0)])
def test_rows_that_are_not_recomputed_keep_the_kv_of_their_chunk_in_place(name, attention, policy):
    """Chunks prefilled alone elsewhere, against a full forward whose KV are overwritten by hand, layer by layer."""
    model = zoo.build(name, attention)
    prefill = h.Selective(h.decoder(name, attention), h.chunk_plan(model, IDS), policy)
    frozen = [torch.zeros_like(layer) for layer in prefill.layers]
    for start, end in ((0, h.PREFIX), *h.CHUNKS):
        for layer, stored in zip(frozen, h.alone(model, IDS[start:end], start).layers, strict=True):
            layer[:, :, start:end] = stored
    logits, reference = h.own_prefill(model, IDS, cache=h.FrozenCache(frozen, prefill.rows_at))
    assert_same(prefill.logits, logits[prefill.rows])
    assert_same_layers(prefill.layers, h.layers_of(reference))


@pytest.mark.parametrize("wanted", [1, 3])
@in_float32(EVERY)
def test_of_rows_whose_logits_are_not_wanted_the_last_layer_gives_keys_and_values_alone(
    name, attention, policy, wanted
):
    decoder = h.decoder(name, attention)
    plan = h.chunk_plan(decoder.model, IDS)
    whole = h.Selective(decoder, plan, policy)
    part = h.Selective(decoder, plan, policy, logits_to_keep=wanted)
    assert_same(part.logits, whole.logits[-wanted:])
    assert_same_layers(part.layers, whole.layers)
    assert list(map(len, part.cache.computed_rows)) == list(map(len, whole.cache.computed_rows))
    if policy.shift() is None:
        assert part.rows.tolist() == list(range(len(IDS) - wanted, len(IDS)))


@models
@dtypes
@pytest.mark.parametrize(("old", "new"), [(0, 100), (100, 0), (7, 8)])
def test_a_chunk_moved_to_another_position_equals_the_chunk_prefilled_there(name, attention, dtype, old, new):
    decoder = h.decoder(name, attention, dtype)
    chunk = h.random_ids(30)
    prompt = (*h.random_ids(new, seed=2), *chunk, 5)
    stored = h.alone(decoder.model, chunk, old)
    fused = FusedCache(decoder.config, Plan.of(prompt, [span(new, stored, 0, 30)]), decoder.rotaries)
    moved = [fused.assemble(i, layer[:1])[:, :, new : new + 30] for i, layer in enumerate(stored.layers)]
    assert_same_layers(moved, h.alone(decoder.model, chunk, new).layers)


@models
def test_a_wrong_kv_shows(name, attention):
    """The tests above could not fail if the model did not mind its chunks, or where their keys stand."""
    logits, cache = own(name, attention)
    decoder = h.decoder(name, attention)
    wrong = h.Selective(decoder, h.wrong_plan(IDS, cache), Reuse())
    assert (wrong.logits - logits[wrong.rows]).abs().amax() > 0.1
    unmoved, moved = (h.alone(decoder.model, IDS[:30], position) for position in (0, 7))
    assert max((a - b).abs().amax() for a, b in zip(unmoved.layers, moved.layers, strict=True)) > 0.1


def greedy(generate):
    prompt = torch.tensor([IDS])
    output = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=12,
        max_new_tokens=12,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(IDS) :].tolist(), torch.cat(output.logits)


@cache
def own_greedy(name, attention):
    return greedy(zoo.build(name, attention).generate)


def assert_goes_on_as_the_model_itself(name, attention, plan, policy):
    tokens, logits = greedy(SelectivePrefill(h.decoder(name, attention), plan, policy).generate)
    own_tokens, own_logits = own_greedy(name, attention)
    assert tokens == own_tokens
    assert_same(logits, own_logits)


@in_float32(EVERY)
def test_generate_goes_on_from_right_kv_as_the_model_itself_does(name, attention, policy):
    plan = h.right_plan(IDS, own(name, attention)[1], exact=True)
    assert_goes_on_as_the_model_itself(name, attention, plan, policy)


@models
def test_generate_goes_on_from_recomputed_kv_as_the_model_itself_does(name, attention):
    plan = h.wrong_plan(IDS, own(name, attention)[1])
    assert_goes_on_as_the_model_itself(name, attention, plan, Link(k=999))
