"""Chunks prefilled many in one forward: each as the model computes it with nothing else there."""

from __future__ import annotations

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blend import decoder, layers_of, own_prefill, random_ids
from support.llm import snapshot

from chunkcache.kv import ChunkKV
from chunkcache.kv.quantised import QuantisedLayer, dense
from chunkcache.library import encoder as encoder_module
from chunkcache.library.encoder import NAME, Encoder

SIZES = (1, 5, 90, 17, 64, 2)  # shorter and longer than a window, than a block of rows, than the context
CHUNKS = tuple(random_ids(size, seed=size) for size in SIZES)
CONTEXTS = (0, 3, 100)


def context_of(model, tokens):
    """Return the KV of a context of so many tokens, or None for none."""
    ids = random_ids(tokens, seed=99)
    return ChunkKV.of(ids, 0, layers_of(own_prefill(model, ids)[1])) if tokens else None


def assert_as_alone(model, context, kv):
    """Compare chunk KV with those of the model's own prefill of context and chunk."""
    before = () if context is None else context.token_ids
    expected = layers_of(own_prefill(model, (*before, *kv.token_ids))[1], len(before))
    assert kv.position == len(before)
    for layer, wanted in zip(kv.layers, expected, strict=True):
        torch.testing.assert_close(layer, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", CONTEXTS)
@pytest.mark.parametrize(("name", "attention"), zoo.SERVED)
def test_a_packed_chunk_is_what_the_model_computes_alone(name, attention, tokens):
    served = decoder(name, attention)
    context = context_of(served.model, tokens)
    computed = list(Encoder(served).encode(context, CHUNKS))
    assert [kv.token_ids for kv in computed] == list(CHUNKS)
    for kv in computed:
        assert_as_alone(served.model, context, kv)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), tokens=st.integers(0, 30), bound=st.integers(1, 90)
)
def test_any_lengths_and_packs(sizes, tokens, bound):
    served = decoder("gemma3")
    context = context_of(served.model, tokens)
    chunks = [random_ids(size, seed) for seed, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "PACK_TOKENS", bound)
        computed = list(Encoder(served).encode(context, chunks))
    assert [kv.token_ids for kv in computed] == chunks
    for kv in computed:
        assert_as_alone(served.model, context, kv)


def test_in_bfloat16_as_near_as_bfloat16_is():
    served = decoder("llama", dtype=torch.bfloat16)
    context = context_of(served.model, 20)
    for kv in Encoder(served).encode(context, CHUNKS):
        expected = layers_of(own_prefill(served.model, (*context.token_ids, *kv.token_ids))[1], 20)
        for layer, wanted in zip(kv.layers, expected, strict=True):
            assert layer.dtype == torch.bfloat16
            assert (layer - wanted).float().norm() < 0.05 * wanted.float().norm()


def test_the_layers_of_a_context_may_be_quantised():
    served = decoder("llama")
    context = context_of(served.model, 20)
    quantised = context.of_layers([QuantisedLayer.of(layer, bits=8) for layer in context.layers])
    rounded = context.of_layers([dense(layer) for layer in quantised.layers])
    pairs = zip(Encoder(served).encode(quantised, CHUNKS), Encoder(served).encode(rounded, CHUNKS), strict=True)
    for kv, wanted in pairs:
        torch.testing.assert_close(list(kv.layers), list(wanted.layers))


def test_a_context_is_left_as_it_is():
    served = decoder("llama")
    context = context_of(served.model, 20)
    before = [layer.clone() for layer in context.layers]
    list(Encoder(served).encode(context, CHUNKS))
    assert all(map(torch.equal, context.layers, before))


@pytest.mark.parametrize(
    ("bound", "packs"),
    [
        (1, [[1], [5], [90], [17], [64], [2]]),
        (66, [[1, 5], [90], [17], [64, 2]]),
        (96, [[1, 5, 90], [17, 64, 2]]),
        (10_000, [list(SIZES)]),
    ],
)
def test_a_pack_of_several_keeps_within_its_bound(bound, packs, monkeypatch):
    monkeypatch.setattr(encoder_module, "PACK_TOKENS", bound)
    served = decoder("llama")
    rows = []
    handle = served.model.model.embed_tokens.register_forward_hook(lambda _, args, output: rows.append(args[0].shape))
    list(Encoder(served).encode(None, CHUNKS))
    handle.remove()
    assert rows == [(1, sum(pack)) for pack in packs]


def test_packs_are_computed_as_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(encoder_module, "PACK_TOKENS", 96)
    served = decoder("llama")
    forwards = []
    handle = served.model.model.embed_tokens.register_forward_hook(lambda *_: forwards.append(1))
    counts = [len(forwards) for _ in Encoder(served).encode(None, CHUNKS)]
    handle.remove()
    assert counts == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("tokens", CONTEXTS)
def test_what_is_yielded_is_no_view_of_the_pack(tokens):
    served = decoder("llama")
    for kv in Encoder(served).encode(context_of(served.model, tokens), CHUNKS):
        assert all(layer.untyped_storage().nbytes() == layer.nbytes for layer in kv.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(attention):
    served = decoder("llama", attention)
    before = snapshot(served.model)
    list(Encoder(served).encode(None, CHUNKS))
    assert snapshot(served.model) == before
    assert served.config._attn_implementation != NAME


def test_eager_attention_that_cannot_be_found_is_not_packed(monkeypatch):
    monkeypatch.setattr(encoder_module, "_own_attention", lambda module: None)
    served = decoder("llama", "eager")
    context = context_of(served.model, 20)
    for kv in Encoder(served).encode(context, CHUNKS):
        assert kv.context is None
        assert_as_alone(served.model, context, kv)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_recorded_chunks_are_the_same_and_say_what_they_looked_at(name):
    served = decoder(name)
    context = context_of(served.model, 20)
    for kv in Encoder(served).encode(context, CHUNKS, record=True):
        assert_as_alone(served.model, context, kv)
        assert kv.context.outside.shape == (len(kv),)


def test_nothing_to_encode():
    assert list(Encoder(decoder("llama")).encode(None, [])) == []
