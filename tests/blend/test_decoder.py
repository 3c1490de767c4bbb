"""What a decoder finds in a model, and every model it refuses, by name and with the reason."""

from __future__ import annotations

import gc
import weakref

import accelerate
import pytest
import torch
import zoo
from support import blend as h
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chunkcache.blend import Decoder, Full, Link, Plan, SelectivePrefill, self_check
from chunkcache.blend.attention import NAME
from chunkcache.blend.decoder import ROWLESS
from chunkcache.errors import InputError, UnsupportedModelError


@pytest.mark.parametrize(("name", "attention"), zoo.SERVED, ids=lambda value: value)
def test_every_family_is_accepted_with_its_layers_in_order(name, attention):
    decoder = Decoder(zoo.build(name, attention))
    assert [attention.layer_idx for attention in decoder.attentions] == list(range(zoo.LAYERS))
    assert len(decoder.rotaries) == zoo.LAYERS


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", [None] * 4),
        ("mistral-sliding", [8] * 4),
        ("starcoder2", [8] * 4),
        ("gemma3", [8, None] * 2),
        ("cohere2", [8, None] * 2),
    ],
)
def test_rows_see_as_far_as_the_window_of_their_layer(name, windows):
    decoder = Decoder(zoo.build(name))
    masks = decoder.masks(torch.tensor([20]), 30)
    seen = [decoder.mask(index, masks)[0, 0, 0].tolist() for index in range(zoo.LAYERS)]
    assert seen == [[0 if window is None else 20 - window + 1, 20] for window in windows]
    assert decoder.narrowest_window == (8 if 8 in windows else 0)


def test_an_eager_model_gets_an_additive_mask_of_its_dtype():
    decoder = Decoder(zoo.build("llama", "eager", torch.bfloat16))
    mask = decoder.masks(torch.tensor([1, 3]), 5)
    assert mask.dtype == torch.bfloat16
    assert (mask == 0).int().tolist() == [[[[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]]]


def test_dtype_and_device_are_the_models():
    decoder = Decoder(zoo.build("llama", dtype=torch.bfloat16))
    assert (decoder.dtype, decoder.device) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "cohere"])
def test_prefill_gives_the_last_logits_and_fills_the_cache(name):
    decoder, ids = Decoder(zoo.build(name)), h.random_ids(20)
    cache = DynamicCache()
    logits = decoder.prefill(torch.tensor([ids, ids]), cache)
    expected, _ = h.own_prefill(decoder.model, ids)
    torch.testing.assert_close(logits, expected[[-1, -1]], atol=1e-4, rtol=0)
    assert not logits.requires_grad
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize(
    ("name", "limit"), [("llama", 512), ("llama-yarn", 512), ("llama-dynamic-ntk", 512), ("phi3-longrope", 256)]
)
def test_the_longest_prompt_ends_where_rope_would_switch(name, limit):
    assert Decoder(zoo.build(name)).max_tokens == limit


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", r"GPT2LMHeadModel has no rotary position embedding \(RoPE\)"),
        ("bloom", r"BloomForCausalLM has no rotary position embedding \(RoPE\)"),
        ("mamba", r"layer 0 of MambaForCausalLM is of type 'linear_attention'"),
        ("qwen3-next", r"layer 0 of Qwen3NextForCausalLM is of type 'linear_attention'"),
        ("t5", r"T5ForConditionalGeneration is an encoder-decoder"),
        ("llama4", r"layer 0 of Llama4ForCausalLM is of type 'chunked_attention'"),
        ("deepseek-v3", r"DeepseekV3ForCausalLM"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_reason(name, reason):
    model = zoo.new(name, "eager")
    with pytest.raises(UnsupportedModelError, match=reason):
        self_check(Decoder(model))


def test_every_refused_family_has_its_reason_above():
    [mark] = test_what_cannot_be_right_is_refused_with_the_reason.pytestmark
    assert [name for name, _ in mark.args[1]] == list(zoo.REFUSED)


def test_a_model_in_training_mode_is_refused():
    model = zoo.new("llama").train()
    with pytest.raises(InputError, match=r"LlamaForCausalLM is in training mode.*call model\.eval\(\) first"):
        Decoder(model)
    Decoder(model.eval())


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(zoo.build("llama").config).eval()
    with pytest.raises(InputError, match=r"weights of LlamaForCausalLM are offloaded, or not loaded .*meta device"):
        Decoder(model)


def test_a_model_of_which_one_layer_is_offloaded_is_refused_by_its_name():
    model = zoo.new("llama")
    accelerate.cpu_offload(model.model.layers[3].mlp, execution_device=torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM are offloaded.*model\.layers\.3\.mlp.*without 'cpu' or 'disk'"
    ):
        Decoder(model)


def test_an_unknown_attention_implementation_is_refused_with_the_way_out():
    model = zoo.new("llama")
    model.config._attn_implementation = "sage"
    with pytest.raises(UnsupportedModelError, match=r"'sage'.*attn_implementation='sdpa' \(or 'eager'\)"):
        Decoder(model)


@pytest.mark.parametrize("name", ROWLESS)
def test_a_kernel_without_scattered_rows_runs_where_the_model_itself_would(name, monkeypatch):
    """The kernels are not here: SDPA stands in for them, and says when it is called."""
    calls = []

    def stand_in(module, query, key, value, attention_mask, **options):
        calls.append(query.shape[2])
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, name, stand_in)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, lambda *_, **__: None)
    model = zoo.new("llama")
    wanted = h.own_prefill(model, ids := h.random_ids())[0][-1]
    stored = h.chunk_plan(model, ids)
    model.config._attn_implementation = name
    decoder = Decoder(model)
    assert self_check(decoder).passed
    calls.clear()
    prefill = SelectivePrefill(decoder, stored, Link(k=100))
    torch.testing.assert_close(prefill.run(), wanted, atol=1e-4, rtol=0)
    assert calls == []
    token = torch.tensor([[5]])
    after = prefill.model(token, past_key_values=prefill.cache).logits[0, -1]
    assert calls == [1] * zoo.LAYERS
    torch.testing.assert_close(after, h.own_prefill(model, (*ids, 5))[0][-1], atol=1e-4, rtol=0)
    calls.clear()
    SelectivePrefill(decoder, Plan(ids), Full()).run()
    assert calls == [len(ids)] * zoo.LAYERS
    assert model.config._attn_implementation == name


@pytest.mark.parametrize(("name", "attention"), zoo.SERVED, ids=lambda value: value)
def test_a_shadow_has_layers_and_attentions_of_its_own_and_all_else_of_the_decoder(name, attention):
    decoder = Decoder(zoo.build(name, attention))
    shadow = decoder.shadow()
    for own, theirs in ((shadow.layers, decoder.layers), (shadow.attentions, decoder.attentions)):
        assert [type(module) for module in own] == [type(module) for module in theirs]
        assert not set(own) & set(theirs)
        assert set(own) <= set(shadow.model.modules())
    assert (shadow.rotaries, shadow.max_tokens) == (decoder.rotaries, decoder.max_tokens)


@pytest.mark.parametrize(("attention", "in_shadow"), [("sdpa", NAME), ("eager", "eager")])
def test_sdpa_takes_scattered_rows_in_the_shadow_only(attention, in_shadow):
    decoder = Decoder(zoo.build("llama", attention))
    shadow = decoder.shadow()
    assert shadow.model.config._attn_implementation == in_shadow
    assert {module.config._attn_implementation for module in shadow.attentions} == {in_shadow}
    assert decoder.model.config._attn_implementation == attention
    assert {module.config._attn_implementation for module in decoder.attentions} == {attention}


def test_a_decoder_does_not_keep_a_dropped_model_alive():
    decoder = Decoder(zoo.new("llama"))
    model = weakref.ref(decoder.model)
    del decoder
    gc.collect()
    assert model() is None
