"""Inputs for a plain `generate()`: with a cache of fixed size it gives the answer that the growing one gives."""

from __future__ import annotations

import pytest
import torch
import zoo
from support.llm import QUESTION, TEXTS, own_model, tiny_model, wrapped
from transformers import CompileConfig, StaticCache

from chunkcache.errors import InputError

CONFIGS = {"llama": {}, "gemma3": {}, "gemma3-wide": {"sliding_window": 64}, "gemma3-all": {"sliding_window": 4000}}


def model_of(name):
    return own_model(name.partition("-")[0], **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("policy", ["full", "link:k=4", "query:ratio=0.2"])
def test_a_static_cache_gives_the_answer_of_a_dynamic_one(name, policy):
    with wrapped(model_of(name), policy=policy) as llm:
        options = {"do_sample": False, "pad_token_id": 3}
        dynamic = llm.prepare_inputs(QUESTION, TEXTS)
        wanted = llm.model.generate(**dynamic, max_new_tokens=24, **options)
        static = llm.prepare_inputs(QUESTION, TEXTS, cache="static", max_new_tokens=24)
        assert isinstance(static["past_key_values"], StaticCache)
        assert torch.equal(llm.model.generate(**static, **options), wanted)


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 2])
def test_a_window_that_the_prompt_just_fills_moves_on(more):
    with wrapped() as llm:
        tokens = len(llm.prompts.build(QUESTION, TEXTS).token_ids)
    with wrapped(own_model("mistral-sliding", sliding_window=tokens + more)) as llm:
        wanted = llm.model.generate(**llm.prepare_inputs(QUESTION, TEXTS), max_new_tokens=12, pad_token_id=3)
        static = llm.prepare_inputs(QUESTION, TEXTS, cache="static", max_new_tokens=12)
        assert torch.equal(llm.model.generate(**static, pad_token_id=3), wanted)


def test_decoding_steps_are_compiled_over_it():
    torch._dynamo.reset()
    compiled = CompileConfig(backend="eager", fullgraph=True)  # traced as on a GPU, and run as it is
    compiled._compile_all_devices = True
    with wrapped(own_model()) as llm:
        wanted = llm.model.generate(**llm.prepare_inputs(QUESTION, TEXTS), max_new_tokens=6, pad_token_id=3)
        static = llm.prepare_inputs(QUESTION, TEXTS, cache="static", max_new_tokens=6)
        torch._dynamo.utils.counters.clear()
        got = llm.model.generate(**static, pad_token_id=3, compile_config=compiled)
        assert torch.equal(got, wanted)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_it_has_room_for_the_answer_and_no_more():
    with wrapped() as llm:
        for options, room in (({}, 64), ({"max_new_tokens": 5}, 5)):
            inputs = llm.prepare_inputs(QUESTION, TEXTS, cache="static", **options)
            assert inputs["max_new_tokens"] == room
            assert inputs["past_key_values"].get_max_length() == inputs["input_ids"].shape[1] + room
        assert "max_new_tokens" not in llm.prepare_inputs(QUESTION, TEXTS, max_new_tokens=5)
        with pytest.raises(InputError, match="max_length=3 leaves no answer"):
            llm.prepare_inputs(QUESTION, TEXTS, cache="static", max_length=3)


@pytest.mark.parametrize("policy", ["link:k=4"])
def test_it_holds_the_kv_of_the_dynamic_one(policy):
    with wrapped(tiny_model(), policy=policy) as llm:
        dynamic = llm.prepare_inputs(QUESTION, TEXTS)["past_key_values"]
        static = llm.prepare_inputs(QUESTION, TEXTS, cache="static")["past_key_values"]
        tokens = dynamic.get_seq_length()
        assert int(static.get_seq_length()) == tokens
        for index in range(zoo.LAYERS):
            for name in ("keys", "values"):
                ours, theirs = (getattr(cache.layers[index], name) for cache in (static, dynamic))
                assert torch.equal(ours[:, :, :tokens], theirs)


def test_another_cache_is_refused_by_name():
    with wrapped() as llm, pytest.raises(InputError, match="cache='quantized' is not known; pass one of dynamic"):
        llm.prepare_inputs(QUESTION, TEXTS, cache="quantized")
