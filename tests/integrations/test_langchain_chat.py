"""ChatChunkCache: chains as they are get reuse, and answer as the direct call does."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import aclosing
from functools import cache

import pytest
import torch
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError
from support.langchain import ListRetriever
from support.llm import QUESTION, TEXTS, own_model, plain, tiny_model, wrapped
from transformers import GenerationConfig, StoppingCriteria

from chunkcache.errors import InputError, PromptError
from chunkcache.integrations.langchain import ChatChunkCache, ChunkCacheRetriever, document_block
from chunkcache.integrations.langchain_messages import as_chat
from chunkcache.prompt.messages import PromptChunk
from chunkcache.store import open_store

DOCUMENTS = [Document(page_content=text, metadata={"source": f"{n}.md"}) for n, text in enumerate(TEXTS)]
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "You answer in few words."), ("human", "Read this.\n\n{context}\n\nQuestion: {input}")]
)
LONG = {"temperature": 0, "max_tokens": 300}


@cache
def shared():
    """Return a wrapped model that no test changes, with TEXTS precomputed."""
    llm = wrapped()
    llm.precompute(TEXTS)
    return llm


def chat(llm=None, **fields):
    return ChatChunkCache(llm=llm or shared(), **{"temperature": 0, "max_tokens": 12, **fields})


def rendered():
    return PROMPT.invoke({"context": "\n\n".join(TEXTS), "input": QUESTION}).to_messages()


def blocks(documents=DOCUMENTS, question=QUESTION):
    return [HumanMessage([*map(document_block, documents), question])]


def cache_read(message):
    return message.usage_metadata["input_token_details"]["cache_read"]


def chunk_tokens(llm, texts=TEXTS):
    return sum(len(llm.prompts.chunk(text)) for text in texts)


def generating():
    """Return whether an answer is being generated in a thread of its own."""
    return any(thread.name == "chunkcache-stream" for thread in threading.enumerate())


# --- reuse


def test_an_unchanged_prompt_and_model_get_reuse():
    llm = wrapped()
    llm.precompute(TEXTS)
    chain = PROMPT | chat(llm)
    first, second, third = (chain.invoke({"context": "\n\n".join(TEXTS), "input": QUESTION}) for _ in range(3))
    direct = llm.chat(as_chat(rendered()), do_sample=False, max_new_tokens=12)
    assert first.content == second.content == third.content == direct.text
    assert cache_read(third) == direct.stats.reused_tokens > cache_read(first) >= chunk_tokens(llm)
    created = second.usage_metadata["input_token_details"]["cache_creation"]
    assert cache_read(second) + created == cache_read(third)  # what both prompts began with
    assert first.response_metadata["chunkcache"]["hits"] == 3


def test_nothing_known_is_nothing_read_from_the_cache():
    out = chat(wrapped()).invoke("A question, and no documents at all.")
    assert out.response_metadata["chunkcache"]["chunks"] == 0


def test_document_blocks_are_the_direct_call_over_chunks():
    llm = shared()
    for system in (None, "You answer in few words."):
        messages = [*([SystemMessage(system)] if system else []), *blocks()]
        out = chat().invoke(messages)
        direct = llm.generate(QUESTION, TEXTS, system=system, do_sample=False, max_new_tokens=12)
        assert out.content == direct.text
        prompt, expected = llm.chat_prompt(as_chat(messages)), llm.prompts.build(QUESTION, TEXTS, system)
        assert prompt == expected


def test_full_prefill_is_plain_transformers():
    llm = shared()
    for messages in (blocks(), rendered()):
        ids = torch.tensor([llm.chat_prompt(as_chat(messages)).token_ids])
        expected = plain(tiny_model(), ids, do_sample=False, max_new_tokens=12)
        out = chat(policy="full").invoke(messages)
        assert out.content == llm.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert cache_read(out) == 0


def vector_store():
    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    vectors.add_documents(DOCUMENTS)
    return vectors


@pytest.mark.parametrize("precompute", ["now", "background", "never"])
def test_the_retrieval_chain_gets_reuse(precompute):
    llm = wrapped()
    retriever = ChunkCacheRetriever(retriever=vector_store().as_retriever(), llm=llm, precompute=precompute)
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(chat(llm), PROMPT))
    for _ in range(2):
        out = chain.invoke({"input": QUESTION})
        retriever.ahead.flush()
    context = "\n\n".join(document.page_content for document in out["context"])
    messages = as_chat(PROMPT.invoke({"context": context, "input": QUESTION}).to_messages())
    direct = llm.chat(messages, do_sample=False, max_new_tokens=12)
    assert out["answer"] == direct.text
    assert (direct.stats.hits, direct.stats.misses) == (3, 0)


async def test_a_chain_streams_batches_and_runs_async():
    llm = wrapped()
    retriever = ChunkCacheRetriever(retriever=ListRetriever(documents=DOCUMENTS), llm=llm)
    both = {"context": retriever | joined, "input": RunnablePassthrough()}
    chain = both | PROMPT | chat(llm) | StrOutputParser()
    expected = chain.invoke(QUESTION)
    assert "".join(chain.stream(QUESTION)) == expected
    assert chain.batch([QUESTION] * 3) == [expected] * 3
    assert await chain.ainvoke(QUESTION) == expected
    assert await chain.abatch([QUESTION] * 2) == [expected] * 2
    assert "".join([piece async for piece in chain.astream(QUESTION)]) == expected


def joined(documents):
    return "\n\n".join(document.page_content for document in documents)


# --- messages


def test_roles_are_the_chat_templates():
    messages = [
        SystemMessage("s"),
        HumanMessage("h", name="example"),
        AIMessage("a"),
        ToolMessage("t", tool_call_id="1"),
        ChatMessage(role="critic", content="c"),
        HumanMessage("h").__class__(content="last"),
    ]
    assert [message["role"] for message in as_chat(messages)] == [
        "system", "user", "assistant", "tool", "critic", "user"
    ]  # fmt: skip


def test_chunks_of_messages_count_as_messages():
    chunks = [piece.message for piece in chat()._stream(rendered())]
    said = chunks[0]
    for chunk in chunks[1:]:
        said += chunk
    assert as_chat([said])[0] == {"role": "assistant", "content": chat().invoke(rendered()).content}


def test_blocks_become_texts_and_passages():
    document = Document(page_content="a passage", metadata={"source": "x"})
    content = [
        document_block(document),
        {"type": "text-plain", "text": "another", "mime_type": "text/plain", "title": "not said"},
        {"type": "text", "text": "asked"},
        document_block(Document(page_content=" \n")),
        "and asked",
    ]
    expected = [PromptChunk("a passage"), PromptChunk("another"), "asked", "and asked"]
    assert as_chat([HumanMessage(content)])[0]["content"] == expected
    wrapped_by_langchain = HumanMessage(content).content_blocks
    assert as_chat([HumanMessage(content_blocks=wrapped_by_langchain[:3])])[0]["content"] == expected[:3]
    assert (
        as_chat(ChatPromptTemplate.from_messages([HumanMessage(content)]).invoke({}).to_messages())[0]["content"]
        == expected
    )


def test_of_what_a_model_said_only_what_it_said_aloud_is_read():
    call = {"name": "find", "args": {}, "id": "1", "type": "tool_call"}
    said = AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "yes"}, call])
    assert as_chat([said])[0]["content"] == ["yes"]
    messages = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), ToolMessage(TEXTS[0], tool_call_id="1")]
    assert cache_read(chat().invoke(messages)) >= chunk_tokens(shared(), TEXTS[:1]) - 2


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "url": "https://example.org/x.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "audio", "base64": "AAAA", "mime_type": "audio/wav"},
        {"type": "text-plain", "url": "https://example.org/x.txt", "mime_type": "text/plain"},
        {"type": "document", "document": "a string"},
        {"type": "reasoning", "reasoning": "hm"},
        {"text": "no type"},
    ],
)
def test_what_is_not_text_is_refused(block):
    with pytest.raises(InputError, match=r"content block .* document_block"):
        chat().invoke([HumanMessage([block, QUESTION])])


def test_messages_that_are_nothing_to_a_chat_template_are_refused():
    with pytest.raises(InputError, match="'function'"):
        chat().invoke([FunctionMessage("x", name="f")])
    with pytest.raises(PromptError):
        chat().invoke([HumanMessage(" ")])


# --- the answer and what is told about it


def test_usage_and_metadata_say_what_was_done():
    llm = shared()
    out = chat().invoke(rendered())
    usage, told = out.usage_metadata, out.response_metadata
    assert usage["input_tokens"] == len(llm.chat_prompt(as_chat(rendered())).token_ids)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < cache_read(out) <= usage["input_tokens"]
    assert told["model_name"] == chat().model_name == "llama"
    assert told["ttft_s"] == told["chunkcache"]["ttft_s"] > 0
    json.dumps(told)


def test_a_stream_tells_what_invoke_tells():
    pieces = list(chat(max_tokens=40).stream(rendered()))
    whole, out = sum(pieces[1:], pieces[0]), chat(max_tokens=40).invoke(rendered())
    assert len(pieces) > 2
    assert whole.content == out.content
    assert whole.usage_metadata == out.usage_metadata
    assert whole.response_metadata.keys() == out.response_metadata.keys()
    assert [piece.usage_metadata is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (pieces[-1].chunk_position, pieces[-1].content) == ("last", "")


def test_the_reason_of_the_end_is_told():
    assert chat(max_tokens=3).invoke("Hello").response_metadata["finish_reason"] == "length"
    llm = shared()
    long = llm.chat([{"role": "user", "content": "Hello"}], do_sample=False, max_new_tokens=12).token_ids
    for end in (long[5], [1, long[5]]):
        config = GenerationConfig(eos_token_id=end, do_sample=False, max_new_tokens=12, pad_token_id=3)
        ended = chat(max_tokens=None).invoke("Hello", generation_config=config)
        assert ended.response_metadata["finish_reason"] == "stop"
        assert ended.usage_metadata["output_tokens"] == long.index(long[5]) + 1


def stop_of(text):
    """Return a stop string that is met in the middle of `text`, or behind it: of bytes that are text."""
    windows = (text[at : at + 4] for at in range(len(text) // 2, len(text) - 4))
    return next(window for window in windows if "\ufffd" not in window)


@pytest.mark.parametrize("how", ["invoke", "stream", "astream", "ainvoke"])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(how):
    text = chat(max_tokens=40).invoke(rendered()).content
    stop = stop_of(text)
    expected = text[: text.index(stop)].strip()
    assert expected
    model = chat(max_tokens=40, stop=["not met", stop])
    for out in (ask(model, how), ask(chat(max_tokens=40), how, stop=[stop])):
        assert out.content == expected
        assert out.response_metadata["finish_reason"] == "stop"
        assert out.usage_metadata["output_tokens"] < 40
    assert ask(model, how, stop=[]).content == text  # a call's own go before the field


def ask(model, how, **options):
    """Return the whole answer to `rendered()`, got in one of four ways."""

    async def pieces():
        return [piece async for piece in model.astream(rendered(), **options)]

    if how == "invoke":
        return model.invoke(rendered(), **options)
    if how == "ainvoke":
        return asyncio.run(model.ainvoke(rendered(), **options))
    found = list(model.stream(rendered(), **options)) if how == "stream" else asyncio.run(pieces())
    return sum(found[1:], found[0])


def test_a_stop_string_of_white_space_is_a_stop(monkeypatch):
    text = shared().chat(as_chat(rendered()), do_sample=False, max_new_tokens=40).text
    space = next(char for char in text if char.isspace())
    out = chat(max_tokens=40).invoke(rendered(), stop=[space])
    assert out.content == text.split(space)[0]
    assert out.response_metadata["finish_reason"] == "stop"


# --- settings


def options_of(monkeypatch, model, **given):
    """Return the keywords that the wrapped model is called with."""
    seen = {}
    real = model.llm.chat

    def noted(messages, **options):
        seen.update(options)
        return real(messages, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model.llm, "chat", noted)
        model.invoke("Hello", **given)
    return seen


def test_temperature_top_p_and_length_are_what_they_say(monkeypatch):
    llm = wrapped()
    none = ChatChunkCache(llm=llm)
    assert options_of(monkeypatch, none) == {"policy": None}
    greedy = ChatChunkCache(llm=llm, temperature=0, top_p=0.9, max_tokens=3)
    assert options_of(monkeypatch, greedy) == {"policy": None, "do_sample": False, "max_new_tokens": 3}
    assert options_of(monkeypatch, greedy, temperature=0.5) == {
        "policy": None, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 3
    }  # fmt: skip
    assert options_of(monkeypatch, none, top_p=0.5, max_tokens=2)["do_sample"] is True
    assert options_of(monkeypatch, greedy, max_new_tokens=2, policy="full", stream=False) == {
        "policy": "full", "do_sample": False, "max_new_tokens": 2
    }  # fmt: skip


def test_sampling_samples():
    def answers(**options):
        torch.manual_seed(0)
        return {chat(**options).invoke("Hello").content for _ in range(4)}

    assert len(answers()) == 1
    assert len(answers(temperature=1.5)) > 1


def test_bound_settings_and_config_apply():
    model = chat()
    assert model.bind(max_tokens=2).invoke("Hello").usage_metadata["output_tokens"] == 2
    assert model.bind(stop=["x"]).invoke("Hello")
    noted = Noted()
    model.with_config(tags=["ours"], callbacks=[noted], metadata={"user": "u1"}).invoke("Hello")
    assert noted.started["tags"] == ["ours"]
    assert noted.started["metadata"]["user"] == "u1"


def test_what_the_fields_cannot_be_is_refused():
    for wrong in (
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"stop": [""]},
        {"policy": "nosuch"},
        {"temprature": 0},
        {"llm": "a string"},
    ):
        with pytest.raises(ValidationError, match=next(iter(wrong.values())) if "policy" in wrong else None):
            ChatChunkCache(**{"llm": shared(), **wrong})


@pytest.mark.parametrize("wrong", [{"tools": []}, {"max_token": 3}, {"input_ids": []}])
def test_keywords_that_nobody_knows_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        chat().invoke("Hello", **wrong)


def test_tools_are_refused_in_words():
    with pytest.raises(NotImplementedError, match="tools are not served"):
        chat().bind_tools([])
    with pytest.raises(NotImplementedError, match="tools are not served"):
        chat().with_structured_output({"title": "depth", "type": "object", "properties": {}})
    given = [{"type": "function", "function": {"name": "depth"}}]
    for name, value in (("tools", given), ("tool_choice", "any"), ("functions", given)):
        for how in ("invoke", "stream", "astream", "ainvoke"):
            with pytest.raises(InputError, match=f"{name}=: tools are not served"):
                ask(chat(), how, **{name: value})


def test_traces_have_the_model_and_no_secret():
    llm = wrapped(store="memory://?max_bytes=1MB", tenant="hush")
    model = chat(llm, stop=["x"], policy="link:k=8")
    params = model._get_ls_params()
    assert params["ls_provider"] == "chunkcache"
    assert params["ls_model_name"] == "llama"
    assert (params["ls_temperature"], params["ls_max_tokens"], params["ls_stop"]) == (0, 12, ["x"])
    traced = json.dumps([model.asdict(), model._serialized, repr(model)])
    assert "link:k=8" in traced
    assert "memory://" not in traced
    assert "hush" not in traced


def test_tokens_are_counted_by_the_models_tokenizer():
    model = chat()
    assert model.get_num_tokens(TEXTS[0]) == len(shared().tokenizer(TEXTS[0]).input_ids)
    count = model.get_num_tokens_from_messages(rendered())
    assert count == model.invoke(rendered()).usage_metadata["input_tokens"]
    assert trim_messages(rendered(), max_tokens=count, token_counter=model) == rendered()
    with pytest.raises(InputError, match="tools"):
        model.get_num_tokens_from_messages(rendered(), tools=[{}])


def test_langchains_own_cache_tells_settings_apart():
    cached = InMemoryCache()
    long, short = (chat(cache=cached, max_tokens=n) for n in (12, 2))
    first = long.invoke(blocks())
    assert long.invoke(blocks()).content == first.content
    assert len(cached._cache) == 1
    assert short.invoke(blocks()).usage_metadata["output_tokens"] == 2


def test_a_model_is_loaded_and_wrapped_by_its_name(monkeypatch):
    loaded = {}

    def load_model(name, **options):
        loaded.update(options, name=name)
        return shared().model, shared().tokenizer

    monkeypatch.setattr("chunkcache.models.load_model", load_model)
    store = open_store("memory://?max_bytes=9MB")
    model = ChatChunkCache.from_model("tiny", policy="full", store=store, temperature=0, max_tokens=2)
    assert loaded == {"name": "tiny", "device": None, "dtype": "auto", "on_status": None}
    assert (model.model_name, str(model.llm.policy), model.temperature) == ("tiny", "full", 0)
    assert model.llm.store is store


# --- callbacks, and leaving early


class Noted(BaseCallbackHandler):
    """Notes what a chat model's run reports."""

    def __init__(self):
        self.started = self.ended = self.error = None
        self.tokens = []

    def on_chat_model_start(self, serialized, messages, **about):
        self.started = about

    def on_llm_new_token(self, token, **about):
        self.tokens.append(token)

    def on_llm_end(self, response, **about):
        self.ended = response

    def on_llm_error(self, error, **about):
        self.error = error


@pytest.mark.parametrize("how", ["invoke", "stream", "astream", "ainvoke"])
def test_callbacks_see_start_tokens_and_end(how):
    noted = Noted()
    model = chat(callbacks=[noted], max_tokens=16, **({"streaming": True} if "invoke" in how else {}))
    out = ask(model, how)
    assert "".join(noted.tokens) == out.content
    assert len(noted.tokens) > 2
    assert noted.ended.generations[0][0].message.usage_metadata == out.usage_metadata
    assert noted.ended.generations[0][0].generation_info["finish_reason"] == "length"


def test_v3_events_are_the_same_answer():
    stream = chat().stream_events(rendered(), version="v3")
    assert stream.output.text == chat().invoke(rendered()).content


class Counted(StoppingCriteria):
    """Counts the tokens that are generated, and never stops."""

    tokens = 0

    def __call__(self, input_ids, scores, **options):
        self.tokens += 1
        return torch.zeros(1, dtype=torch.bool)


def test_closing_the_stream_ends_the_generation():
    noted, counted = Noted(), Counted()
    stream = chat(callbacks=[noted], **LONG).stream(rendered(), stopping_criteria=[counted])
    assert next(stream).content
    stream.close()
    assert not generating()
    assert 0 < counted.tokens < LONG["max_tokens"]
    assert isinstance(noted.error, GeneratorExit)


async def test_closing_an_async_stream_ends_the_generation():
    counted = Counted()
    async with aclosing(chat(**LONG).astream(rendered(), stopping_criteria=[counted])) as stream:
        async for piece in stream:
            assert piece.content
            break
    await ended(counted)


@pytest.mark.parametrize("how", ["astream", "ainvoke"])
async def test_cancelling_ends_the_generation(how):
    model, counted = chat(**LONG), Counted()

    async def listen():
        if how == "ainvoke":
            return await model.ainvoke(rendered(), stopping_criteria=[counted])
        return [piece async for piece in model.astream(rendered(), stopping_criteria=[counted])]

    task = asyncio.create_task(listen())
    while not counted.tokens:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ended(counted)


async def ended(counted):
    """Wait until nothing is being generated any more, which must be before the whole answer is."""
    before = -1
    while generating() or counted.tokens != before:
        before = counted.tokens
        await asyncio.sleep(0.05)
    assert 0 < counted.tokens < LONG["max_tokens"]


def test_beams_answer_alike_with_and_without_async():
    llm = chat(wrapped(own_model()))
    answers = [ask(llm, how, num_beams=2) for how in ("invoke", "ainvoke")]
    assert len({answer.text for answer in answers}) == 1
    assert [answer.usage_metadata["output_tokens"] for answer in answers] == [12, 12]


def test_an_error_of_the_model_is_the_callers_in_every_way():
    for how in ("invoke", "stream", "astream", "ainvoke"):
        with pytest.raises(ValueError, match="nosuch"):
            ask(chat(), how, nosuch=1)
