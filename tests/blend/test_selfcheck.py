"""The self-check passes on every family served, and fails on whatever would garble the output."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo
from support import blend as h
from transformers import AutoModelForCausalLM

from chunkcache.blend import Decoder, SelfCheck, cache, prefill, self_check
from chunkcache.blend.hydragen import can_share
from chunkcache.blend.rotary import Rotary
from chunkcache.blend.selfcheck import TOKENS, Judged, relative_error
from chunkcache.errors import SelfCheckError, UnsupportedModelError


@pytest.mark.parametrize(("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_passes_in_every_dtype(name, attention, dtype):
    result = self_check(Decoder(zoo.build(name, attention, dtype)))
    assert result.passed
    errors = [judged.error for judged in (result.logits, result.cache, result.rotation)]
    assert max(errors) < (1e-5 if dtype == torch.float32 else result.tolerance)


@pytest.mark.parametrize(("name", "without"), [("llama", []), ("smollm3", [1, 3]), ("cohere2", [1, 3])])
def test_layers_without_rope_are_found(name, without):
    decoder = Decoder(zoo.build(name))
    result = self_check(decoder)
    assert [i for i, rotary in enumerate(decoder.rotaries) if rotary is None] == without
    assert result.layers_without_rope == len(without)


def test_it_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    self_check(Decoder(zoo.build("llama")))
    assert torch.equal(torch.get_rng_state(), before)


def test_its_figures_go_into_json():
    result = self_check(Decoder(zoo.build("llama")))
    parts = {"logits": result.logits, "cache": result.cache, "rotation": result.rotation}
    assert result.as_dict() == {
        **{f"{name}_error": judged.error for name, judged in parts.items()},
        **{f"{name}_noise": judged.noise for name, judged in parts.items()},
        **{f"{name}_limit": judged.limit for name, judged in parts.items()},
        "layers_without_rope": 0,
        "tolerance": 1e-3,
        "passed": True,
    }


@pytest.mark.parametrize("field", ["logits", "cache", "rotation"])
@pytest.mark.parametrize("value", [0.01, 0.02, torch.inf, torch.nan])
def test_one_figure_at_or_over_its_limit_or_not_a_number_fails(field, value):
    figures = dict.fromkeys(("logits", "cache", "rotation"), Judged(0.0, 0.0, 0.01))
    assert SelfCheck(**figures, layers_without_rope=0, tolerance=0.01).passed
    figures[field] = Judged(value, 0.0, 0.01)
    assert not SelfCheck(**figures, layers_without_rope=0, tolerance=0.01).passed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_deep_model_is_judged_by_its_own_noise(attention):
    """Rounding grows with the layers and the weights, here to several times the tolerance."""
    model = zoo.new("llama", attention, torch.bfloat16, num_hidden_layers=32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)
    values = [h.own_prefill(model, h.random_ids(24), start)[1].layers[-1].values for start in (0, 37)]
    result = self_check(Decoder(model))
    assert relative_error(*values) > 2 * result.tolerance
    assert can_share(Decoder(model))


def fails(decoder, figure):
    with pytest.raises(SelfCheckError, match=rf"LlamaForCausalLM failed its self-check.*\({figure}\).*reused right"):
        self_check(decoder)
    return True


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_turned_the_wrong_way_are_noticed(attention, monkeypatch):
    shift = Rotary.shift
    monkeypatch.setattr(Rotary, "shift", lambda self, keys, delta, out: shift(self, keys, -delta, out))
    assert fails(Decoder(zoo.build("llama", attention)), "re-rotation")


def test_keys_turned_by_one_position_too_far_are_noticed(monkeypatch):
    shift = Rotary.shift
    monkeypatch.setattr(Rotary, "shift", lambda self, keys, delta, out: shift(self, keys, delta + 1, out))
    assert fails(Decoder(zoo.build("llama")), "re-rotation")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_that_hides_a_token_is_noticed(attention, monkeypatch):
    masks = Decoder.masks
    monkeypatch.setattr(Decoder, "masks", lambda self, rows, length: masks(self, rows.sub(1).clamp(min=0), length))
    assert fails(Decoder(zoo.build("llama", attention)), "logits")


def test_stored_kv_left_where_fresh_ones_belong_are_noticed(monkeypatch):
    monkeypatch.setattr(cache.FusedCache, "_scatter", lambda self, both, key, value: None)
    assert fails(Decoder(zoo.build("llama")), "KV")


def test_rows_at_the_wrong_positions_are_noticed(monkeypatch):
    cut = prefill.SelectivePrefill._cut

    def shifted(self, *args):
        rows = cut(self, *args)
        return {**rows, "position_ids": rows["position_ids"] + 1}

    monkeypatch.setattr(prefill.SelectivePrefill, "_cut", shifted)
    assert fails(Decoder(zoo.build("llama")), "KV")


def test_a_model_that_normalises_keys_after_rotating_them_is_refused():
    """No rotation of such keys gives those of another position."""
    config = transformers.HunYuanDenseV1Config(**zoo.BASE, head_dim=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    zoo.randomise(model)
    with pytest.raises(SelfCheckError, match=r"HunYuanDenseV1ForCausalLM.*re-rotation"):
        self_check(Decoder(model))


def test_weights_that_are_not_numbers_fail():
    model = zoo.new("llama")
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(SelfCheckError, match=r"nan \(logits\)"):
        self_check(Decoder(model))


def test_values_that_depend_on_the_position_are_noticed():
    """Latent attention caches its rotated part as values; here both parts happen to have one size."""
    model = zoo.new("deepseek-v3", "eager", kv_lora_rank=8, qk_rope_head_dim=8)
    with pytest.raises(UnsupportedModelError, match=r"DeepseekV3ForCausalLM"):
        self_check(Decoder(model))


def test_a_result_that_is_not_a_number_is_noticed_in_whichever_trial_it_comes(monkeypatch):
    probe = cache.FusedCache.probe

    def spoiled(self, layer, layer_idx, args, kwargs):
        found = probe(self, layer, layer_idx, args, kwargs)
        self.assemble(layer_idx, found[0][:1]).fill_(torch.nan)
        return found

    monkeypatch.setattr(cache.FusedCache, "probe", spoiled)
    assert fails(Decoder(zoo.build("llama")), "logits")


@pytest.mark.parametrize("failure", [RuntimeError, KeyError, TypeError])
def test_a_layer_that_fails_on_scattered_rows_is_refused_by_name(failure):
    model = zoo.new("llama")

    def need_the_whole_prompt(module, args):
        if args[0].shape[1] != TOKENS:
            raise failure("rows")

    model.model.layers[2].mlp.register_forward_pre_hook(need_the_whole_prompt)
    with pytest.raises(SelfCheckError, match=rf"LlamaForCausalLM.*{failure.__name__}.*rows"):
        self_check(Decoder(model))


def test_a_model_of_one_layer_passes():
    assert self_check(Decoder(zoo.new("llama", num_hidden_layers=1))).passed


def test_a_vocabulary_of_any_size_will_do():
    assert self_check(Decoder(zoo.new("llama", vocab_size=5))).passed


def test_the_model_is_left_as_it_was():
    model = zoo.build("llama")
    expected, _ = h.own_prefill(model, range(4, 30))
    self_check(Decoder(model))
    assert model.config._attn_implementation == "sdpa"
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    torch.testing.assert_close(h.own_prefill(model, range(4, 30))[0], expected)
