"""The length of an answer, and what a checkpoint's own generation config may and may not decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from llama_index.core.base.llms.types import ChatMessage
from support.llm import QUESTION, TEXTS, chat_tokenizer, own_model, plain, prompt_ids, wrapped
from transformers import GenerationConfig

import chunkcache
from chunkcache.errors import ContextLengthError, InputError
from chunkcache.integrations.langchain import ChatChunkCache
from chunkcache.integrations.llamaindex import ChunkCacheLLM

CONTEXT = 512
MESSAGES = [{"role": "user", "content": QUESTION}]
NEVER_ENDS = {"eos_token_id": None, "pad_token_id": 3, "do_sample": False}


def streamed(stream: Any) -> chunkcache.Generation:
    list(stream)
    return stream.result


WAYS: dict[str, Callable[..., int]] = {
    "generate": lambda llm, **options: len(llm.generate(QUESTION, TEXTS, **options).token_ids),
    "stream": lambda llm, **options: len(streamed(llm.stream(QUESTION, TEXTS, **options)).token_ids),
    "chat": lambda llm, **options: len(llm.chat(MESSAGES, **options).token_ids),
    "chat_stream": lambda llm, **options: len(streamed(llm.chat_stream(MESSAGES, **options)).token_ids),
    "conversation": lambda llm, **options: len(llm.conversation().generate(QUESTION, **options).token_ids),
    "generate_batch": lambda llm, **options: len(llm.generate_batch([(QUESTION, TEXTS)] * 2, **options)[1].token_ids),
    "LangChain": lambda llm, **options: (
        ChatChunkCache(llm=llm).invoke([HumanMessage(QUESTION)], **options).usage_metadata["output_tokens"]
    ),
    "LlamaIndex": lambda llm, **options: (
        ChunkCacheLLM(llm=llm).chat([ChatMessage(QUESTION)], **options).raw["usage"]["completion_tokens"]
    ),
}


def shipped_with(**config: Any) -> chunkcache.CachedLLM:
    """Return a wrapped model that came with this generation config."""
    model = own_model()
    model.generation_config = GenerationConfig(**{**NEVER_ENDS, **config})
    return wrapped(model)


@pytest.mark.parametrize("way", WAYS)
def test_the_checkpoints_length_goes_before_the_librarys_and_the_callers_before_both(way):
    llm, ask = shipped_with(max_new_tokens=70), WAYS[way]
    assert ask(llm) == 70
    assert ask(llm, generation_config=GenerationConfig(max_new_tokens=5)) == 5
    assert ask(llm, generation_config=GenerationConfig(max_new_tokens=5), max_new_tokens=3) == 3
    assert ask(llm, generation_config=GenerationConfig()) == 70
    assert ask(shipped_with()) == 64


@pytest.mark.parametrize("way", WAYS)
def test_max_length_counts_the_prompt_wherever_it_is_said(way):
    ask = WAYS[way]
    room = ask(shipped_with(max_length=160))
    assert room > 0
    llm = shipped_with(max_new_tokens=7)
    assert ask(llm, generation_config=GenerationConfig(max_length=161)) == room + 1
    assert ask(llm, max_length=162) == room + 2
    assert ask(llm, generation_config=GenerationConfig(max_new_tokens=5), max_length=162) == room + 2


@pytest.mark.parametrize("way", [way for way in WAYS if way != "LlamaIndex"])
def test_max_length_past_the_context_is_refused_wherever_it_is_said(way):
    ask = WAYS[way]
    with pytest.raises(ContextLengthError, match="512"):
        ask(shipped_with(), max_length=CONTEXT + 1)
    with pytest.raises(ContextLengthError, match="512"):
        ask(shipped_with(), generation_config=GenerationConfig(max_length=CONTEXT + 1))
    with pytest.raises(ContextLengthError, match="512"):
        ask(shipped_with(max_length=CONTEXT + 1))
    assert ask(shipped_with(max_length=CONTEXT + 1), max_new_tokens=2) == 2


def test_the_context_may_be_filled_by_max_length():
    llm = shipped_with()
    assert len(llm.generate(QUESTION, TEXTS, max_length=CONTEXT).token_ids) == CONTEXT - prompt_ids(llm).shape[1]


def test_a_length_that_nobody_chose_does_not_count():
    llm = shipped_with(max_length=20)  # what a generation config says that was written with its defaults
    assert WAYS["generate"](llm) == 64
    assert WAYS["generate"](llm, generation_config=GenerationConfig(max_length=20)) == 64


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_length": -1}, {"max_length": 100}], ids=str)
def test_a_length_that_leaves_no_answer_is_refused(options):
    for way in ("generate", "stream", "generate_batch"):
        with pytest.raises(InputError, match=f"{next(iter(options))}.* leaves no answer"):
            WAYS[way](shipped_with(), **options)


def test_a_batch_of_questions_of_any_length_ends_each_at_max_length():
    llm = shipped_with(max_length=150)
    requests = [(question, TEXTS) for question in (QUESTION, "Who wrote?", "When is it?", "And who did?", QUESTION)]
    answers = llm.generate_batch(requests, policy="full")
    assert [each.token_ids for each in answers] == [
        llm.generate(*request, policy="full").token_ids for request in requests
    ]
    assert {llm.prompts.build(*request).end for request in requests} == {llm.prompts.build(*requests[0]).end}
    assert max(each.stats.batched for each in answers) > 1


def test_llamaindex_keeps_the_checkpoints_length_free():
    assert ChunkCacheLLM(llm=shipped_with(max_new_tokens=70)).metadata.num_output == 70
    assert ChunkCacheLLM(llm=shipped_with(max_new_tokens=70), max_tokens=9).metadata.num_output == 9
    assert ChunkCacheLLM(llm=shipped_with(max_length=400)).metadata.num_output == 64


@pytest.mark.parametrize(
    "config",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"prefill_chunk_size": 16},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_what_a_checkpoint_may_not_decide_is_overridden(config):
    llm = shipped_with(max_new_tokens=6, **config)
    want = plain(own_model(), prompt_ids(llm), max_new_tokens=6, eos_token_id=None, do_sample=False)
    asked = {
        "generate": llm.generate(QUESTION, TEXTS, policy="full"),
        "stream": streamed(llm.stream(QUESTION, TEXTS, policy="full")),
        "conversation": llm.conversation().generate(QUESTION, TEXTS, policy="full"),
        "generate_batch": llm.generate_batch([(QUESTION, TEXTS)] * 2, policy="full")[0],
    }
    assert {way: answer.token_ids for way, answer in asked.items()} == dict.fromkeys(asked, want)
    inputs = llm.prepare_inputs(QUESTION, TEXTS, policy="full")
    assert llm.model.generate(**inputs, max_new_tokens=6)[0, -6:].tolist() == want


def test_beams_of_a_checkpoint_are_refused_where_there_can_be_none():
    llm = shipped_with(num_beams=2, max_new_tokens=3)
    want = plain(own_model(), prompt_ids(llm), max_new_tokens=3, eos_token_id=None, num_beams=2, do_sample=False)
    assert llm.generate(QUESTION, TEXTS, policy="full").token_ids == want
    for way in ("stream", "chat_stream", "conversation"):
        with pytest.raises(InputError, match="num_beams"):
            WAYS[way](llm)
    assert WAYS["stream"](llm, num_beams=1) == 3


@pytest.mark.parametrize("config", [{"stop_strings": ["x"]}, {"num_beams": 3}, {"guidance_scale": 2.0}], ids=str)
def test_the_check_of_a_model_does_not_go_by_its_generation_config(config):
    assert shipped_with(**config).self_check == shipped_with().self_check


# --- keywords that nobody knows


@pytest.mark.parametrize("name", ["enable_thinking", "chat_template_kwargs", "max_token", "tools"])
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("LangChain", "LlamaIndex")])
def test_an_unknown_keyword_is_refused_by_name_before_any_work(way, name):
    llm = wrapped(own_model())
    llm.model.register_forward_pre_hook(_fail)
    with pytest.raises(InputError, match=rf"{name}= is no keyword of generate\(\): .*template_options"):
        WAYS[way](llm, **{name: {}})


def _fail(*_: Any) -> None:
    raise AssertionError("the model was run")


def test_what_generate_knows_is_let_pass():
    llm = shipped_with(max_new_tokens=3, taste="sweet")  # a generation config may say what transformers does not know
    known: list[dict[str, Any]] = [
        {"top_k": 3},
        {"streamer": None},
        {"synced_gpus": False},
        {"assistant_tokenizer": None},
        {"tokenizer": chat_tokenizer(), "stop_strings": ["zzz"]},
        {"trust_remote_code": False},
        {"output_attentions": False},
        {"taste": "sour"},
        {"generation_config": GenerationConfig(shape="round"), "shape": "flat"},
        {"reuse": "exact"},
        {"nobody": None},  # as transformers does
    ]
    for options in known:
        assert WAYS["generate"](llm, **options) == 3, options


def test_a_way_to_generate_of_ones_own_takes_keywords_of_its_own():
    def loud(model, input_ids, *, volume, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[volume]])], dim=1)

    chunkcache.engine.generation.check_keywords(own_model(), {"custom_generate": loud, "volume": 11})
