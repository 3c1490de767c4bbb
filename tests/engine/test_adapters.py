"""Adapters of peft, and quantised weights; runs where the packages are: `make test-adapters`."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
import zoo
from support.changing import OPTIONS, error_of, fill_lora, tokenizer, warm
from support.llm import QUESTION, TEXTS, VOCAB
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import chunkcache
from chunkcache.errors import InputError, SelfCheckError, UnsupportedModelError

peft = pytest.importorskip("peft", reason="needs peft: run make test-adapters")

pytestmark = pytest.mark.filterwarnings("ignore")  # what these packages warn of is theirs


def lora(alpha: int = 32, **options: Any) -> Any:
    modules = ["q_proj", "k_proj", "v_proj"]
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=alpha, target_modules=modules, **options)


def adapted(alpha: int = 32) -> Any:
    """Return a PeftModel with two adapters, legal and medical; legal is active."""
    model = peft.get_peft_model(zoo.new("llama", vocab_size=VOCAB), lora(alpha), adapter_name="legal")
    model.add_adapter("medical", lora(alpha))
    return fill_lora(model)


def decoded(model: Any, ids: torch.Tensor, count: int = 5) -> list[int]:
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **OPTIONS)
    return out[0, ids.shape[1] :].tolist()


def switch(model: Any) -> None:
    model.set_adapter("medical")


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


def merge(model: Any) -> None:
    model.merge_adapter()


def add(model: Any) -> None:
    model.add_adapter("third", lora())
    model.set_adapter("third")


@pytest.mark.parametrize("change", [switch, disable, rescale, merge, add])
@pytest.mark.parametrize("anew", [False, True], ids=["the same wrapper", "wrapped anew"])
def test_a_change_of_adapters_is_another_model(change, anew):
    model = adapted()
    llm = warm(model)
    change(model)
    if anew:
        llm = chunkcache.wrap(model, tokenizer(), store=llm.store, policy="prefix")
    assert error_of(llm, model) < 1e-4


def test_an_adapter_that_comes_back_finds_its_kv():
    model = adapted()
    llm = warm(model)
    cached = llm.prefill(QUESTION, TEXTS).stats.cached_tokens
    with model.disable_adapter():
        assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens == 0
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens == cached > 0


def test_another_scaling_of_the_same_tensors_is_another_model(tmp_path):
    store = f"disk://{tmp_path}"
    with warm(adapted(alpha=8), store=store):
        pass
    other = adapted(alpha=64)
    llm = chunkcache.wrap(other, tokenizer(), store=store, policy="prefix")
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens == 0
    assert error_of(llm, other) < 1e-4


def test_two_processes_with_the_same_adapters_share(tmp_path):
    store = f"disk://{tmp_path}"
    with warm(adapted(), store=store) as llm:
        cached = llm.prefill(QUESTION, TEXTS).stats.cached_tokens
    other = chunkcache.wrap(adapted(), tokenizer(), store=store, policy="prefix")
    assert other.prefill(QUESTION, TEXTS).stats.cached_tokens == cached


def test_every_way_to_ask_works_on_a_peft_model():
    model = adapted()
    llm = warm(model)
    ids = llm.prefill(QUESTION, TEXTS).input_ids
    expected = decoded(model, ids)
    options = {"max_new_tokens": 5, **OPTIONS}
    assert llm.generate(QUESTION, TEXTS, **options).token_ids == expected
    stream = llm.stream(QUESTION, TEXTS, **options)
    assert "".join(stream).strip() == llm.tokenizer.decode(expected, skip_special_tokens=True).strip()
    with llm.attached():
        assert decoded(model, ids) == expected
        assert llm.last_stats is not None
        assert llm.last_stats.fallbacks == 0
    assert llm.conversation().generate(QUESTION, TEXTS, **options).token_ids == expected
    batch = llm.generate_batch([(QUESTION, TEXTS), (QUESTION, TEXTS)], **options)
    assert [answer.token_ids for answer in batch] == [expected, expected]
    inputs = llm.prepare_inputs(QUESTION, TEXTS)
    output = model.generate(**inputs, max_new_tokens=5, **OPTIONS)
    assert output[0, ids.shape[1] :].tolist() == expected


def test_an_adapter_is_active_for_one_call():
    model = adapted()
    llm = chunkcache.wrap(model, tokenizer(), policy="prefix")
    ids = llm.prefill(QUESTION, TEXTS).input_ids
    answers = {}
    for name in ("medical", "legal"):
        llm.precompute(TEXTS, adapter=name)
        answers[name] = llm.generate(QUESTION, TEXTS, adapter=name, max_new_tokens=5, **OPTIONS).token_ids
        assert model.active_adapters == ["legal"]
    assert answers["legal"] == decoded(model, ids)
    assert llm.keys(TEXTS, adapter="medical") != llm.keys(TEXTS, adapter="legal") == llm.keys(TEXTS)
    model.set_adapter("medical")
    assert answers["medical"] == decoded(model, ids)
    with pytest.raises(InputError, match=r"adapter='tax': the model has no such adapter .*'legal', 'medical'"):
        llm.generate(QUESTION, TEXTS, adapter="tax")


def test_calls_with_different_adapters_wait_for_one_another():
    model = adapted()
    llm = chunkcache.wrap(model, tokenizer(), policy="prefix")
    names = ["legal", "medical"] * 3
    expected = {
        name: llm.generate(QUESTION, TEXTS, adapter=name, max_new_tokens=4, **OPTIONS).token_ids for name in names
    }
    found: list[bool] = []

    def ask(name: str) -> None:
        answer = llm.generate(QUESTION, TEXTS, adapter=name, max_new_tokens=4, **OPTIONS)
        found.append(answer.token_ids == expected[name])

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * len(names)
    assert model.active_adapters == ["legal"]


def test_an_adapter_inside_a_call_with_another_is_refused():
    model = adapted()
    llm = chunkcache.wrap(model, tokenizer())

    def ask(_: Any) -> None:
        llm.generate(QUESTION, TEXTS, adapter="medical", max_new_tokens=1)

    with pytest.raises(InputError, match=r"adapter='medical' inside a call with adapter='legal'"):
        llm.generate_batch([(QUESTION, TEXTS)], adapter="legal", max_new_tokens=1, on_batch=ask)


def test_adapters_of_transformers_itself():
    model = zoo.new("llama", vocab_size=VOCAB)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=32, target_modules=["k_proj", "v_proj"]), "x")
    llm = warm(fill_lora(model))
    model.disable_adapters()
    assert error_of(llm, model) < 1e-4


def test_virtual_tokens_are_refused_by_name():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(zoo.new("llama", vocab_size=VOCAB), config, adapter_name="soft").eval()
    with pytest.raises(UnsupportedModelError, match=r"'soft' .* virtual tokens"):
        chunkcache.wrap(model, tokenizer())


@pytest.mark.parametrize(
    "scheme", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_torchao_is_exact_against_itself_or_refused(scheme):
    quantization = pytest.importorskip("torchao.quantization")
    config = getattr(quantization, scheme)()
    models = []
    for seed in (0, 9):
        model = zoo.new("llama", vocab_size=VOCAB)
        zoo.randomise(model, seed=seed)
        quantization.quantize_(model, config)
        models.append(model)
    try:
        llm = warm(models[0])
    except SelfCheckError:  # named, and before any request
        return
    assert error_of(llm, models[0]) < 1e-3
    other = chunkcache.wrap(models[1], tokenizer(), store=llm.store, policy="prefix")
    assert other.prefill(QUESTION, TEXTS).stats.cached_tokens == 0
    assert error_of(other, models[1]) < 1e-3


def test_scales_alone_tell_quantised_models_apart():
    quantization = pytest.importorskip("torchao.quantization")
    prints = set()
    for factor in (1.0, 2.0):
        model = zoo.new("llama", vocab_size=VOCAB)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(factor)  # the same codes, other scales
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        prints.add(chunkcache.wrap(model, tokenizer()).fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_is_exact_against_itself_or_refused(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = zoo.new("llama", vocab_size=VOCAB)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module.in_features % 64 == 0 and name != "lm_head":  # its block
            if kind == "nf4":
                new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.eval()
    try:
        llm = warm(model)
    except SelfCheckError:  # named, and before any request
        return
    before = llm.fingerprint
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens > 0
    assert error_of(llm, model) < 5e-2
    with contextlib.suppress(AttributeError):
        model.model.layers[0].mlp.up_proj.weight.quant_state.absmax.mul_(2)
        assert llm.refresh() != before


def test_a_quantised_checkpoint_is_loaded_by_its_name(tmp_path):
    """Its model cannot be moved to a device: it is made there."""
    pytest.importorskip("bitsandbytes")
    zoo.new("llama", vocab_size=VOCAB).save_pretrained(tmp_path / "whole")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    for part in (quantised, tokenizer()):
        part.save_pretrained(tmp_path / "quantised")
    model, own_tokenizer = chunkcache.load_model(str(tmp_path / "quantised"), device="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert chunkcache.wrap(model, own_tokenizer).self_check.passed
