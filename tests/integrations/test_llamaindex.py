"""The LlamaIndex plug-in: query engines as they are get reuse, and answer as the direct call does."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from contextlib import aclosing, contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from llama_index.core import (
    Document,
    PromptHelper,
    PromptTemplate,
    Settings,
    VectorStoreIndex,
    get_response_synthesizer,
)
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from pydantic import ValidationError
from support.llm import QUESTION, TEXTS, own_model, saved_model, wrapped
from transformers import GenerationConfig

from chunkcache.errors import (
    ChunkCacheError,
    ContextLengthError,
    InputError,
    PolicyError,
    PromptError,
    ServingError,
)
from chunkcache.integrations import llamaindex as plugin
from chunkcache.integrations.llamaindex import CHUNK_KEY, ChunkCacheEmbedding, ChunkCacheLLM, ChunkCachePostprocessor
from chunkcache.retriever import Embedder

LONG = 4096  # LlamaIndex keeps 500 tokens of the context free, more than the tiny model has


@cache
def roomy_model():
    return own_model(max_position_embeddings=LONG)


@cache
def shared():
    """Return a wrapped model that no test changes, with TEXTS precomputed."""
    llm = wrapped(roomy_model())
    llm.precompute(TEXTS)
    return llm


def answering(llm=None, **fields):
    return ChunkCacheLLM(llm=llm or shared(), **{"temperature": 0, "max_tokens": 12, **fields})


def scored(texts=TEXTS, **fields):
    return [
        NodeWithScore(node=TextNode(text=text, id_=f"n{i}", **fields), score=0.5 - i) for i, text in enumerate(texts)
    ]


def stored(llm, texts=TEXTS):
    return [key in llm.store for key in llm.keys(texts)]


@contextmanager
def serving_error(cause, message):
    """Expect an error that LlamaIndex lets through, with the message of its cause."""
    with pytest.raises(ServingError, match=message) as raised:
        yield
    assert not isinstance(raised.value, ValueError | TypeError)
    assert isinstance(raised.value.__cause__, cause)
    assert str(raised.value) == str(raised.value.__cause__)


@cache
def embedding():
    return ChunkCacheEmbedding()


@pytest.fixture
def index(monkeypatch):
    """An index of three documents; LlamaIndex counts in the tiny tokenizer's tokens."""
    llm = answering()
    monkeypatch.setattr(Settings, "_tokenizer", None)
    monkeypatch.setattr(Settings, "_llm", llm)
    Settings.tokenizer = llm.token_ids
    documents = [
        Document(text=text, id_=f"{i}.md", metadata={"file": f"{i}.md"}, excluded_embed_metadata_keys=["file"])
        for i, text in enumerate(TEXTS)
    ]
    yield VectorStoreIndex.from_documents(documents, embed_model=embedding())
    monkeypatch.undo()
    importlib.import_module("llama_index.core").global_tokenizer = None


@pytest.fixture
def requests(monkeypatch):
    """What `chat` of a fresh wrapped model was asked, and what it did: messages and Generation of each call."""
    llm = wrapped(roomy_model())
    answer, seen = llm.chat, []

    def chat(messages, **options):
        seen.append((messages, answer(messages, **options)))
        return seen[-1][1]

    monkeypatch.setattr(llm, "chat", chat)
    return llm, seen


# --- nodes


def test_nodes_come_back_in_order_and_unchanged_but_for_their_key():
    llm = wrapped()
    nodes = scored(metadata={"author": "A. Trewold"}, excluded_llm_metadata_keys=["author"])
    before = [found.model_copy(deep=True) for found in nodes]
    ready = ChunkCachePostprocessor(llm).postprocess_nodes(nodes, query_str=QUESTION)
    assert [found.node.metadata.pop(CHUNK_KEY) for found in ready] == [key.digest for key in llm.keys(TEXTS)]
    for found in ready:
        assert found.node.excluded_llm_metadata_keys.pop() == CHUNK_KEY
        assert found.node.excluded_embed_metadata_keys.pop() == CHUNK_KEY
    assert ready == before
    assert stored(llm) == [True] * 3


def test_the_nodes_that_the_index_holds_are_left_alone():
    nodes = scored()
    before = [found.model_copy(deep=True) for found in nodes]
    ready = ChunkCachePostprocessor(wrapped()).postprocess_nodes(nodes)
    assert nodes == before
    assert ready[0].node is not nodes[0].node


def test_neither_llm_nor_embedding_sees_the_key_also_when_it_comes_twice():
    post = ChunkCachePostprocessor(wrapped())
    (found,) = nodes = scored(TEXTS[:1], metadata={"title": "Bridges"})
    (once,) = post.postprocess_nodes(nodes)
    (twice,) = post.postprocess_nodes([once])
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert "Bridges" in found.node.get_content(mode)
        assert twice.node.get_content(mode) == once.node.get_content(mode) == found.node.get_content(mode)
    assert twice == once


def test_what_is_stored_is_the_text_that_the_llm_gets_to_see():
    llm = wrapped()
    (found,) = nodes = scored(TEXTS[:1], metadata={"title": "Bridges"})
    ChunkCachePostprocessor(llm).postprocess_nodes(nodes)
    assert stored(llm, [TEXTS[0], found.node.get_content(MetadataMode.LLM)]) == [False, True]


def test_a_node_without_text_comes_back_as_it_is():
    nodes = scored(["  ", TEXTS[0]])
    post = ChunkCachePostprocessor(wrapped())
    empty, full = post.postprocess_nodes(nodes)
    assert empty is nodes[0]
    assert CHUNK_KEY in full.node.metadata
    assert post.ahead.skipped == 1


def test_background_and_never():
    llm = wrapped()
    never, background = (ChunkCachePostprocessor(llm=llm, precompute=how) for how in ("never", "background"))
    never.postprocess_nodes(scored())
    assert stored(llm) == [False] * 3
    background.postprocess_nodes(scored())
    background.ahead.flush()
    assert stored(llm) == [True] * 3


def test_nodes_are_prepared_in_another_thread_of_an_async_engine():
    llm = wrapped()
    threads = []
    register = llm.register
    llm.register = lambda *args, **options: threads.append(threading.current_thread()) or register(*args, **options)
    ready = asyncio.run(ChunkCachePostprocessor(llm).apostprocess_nodes(scored()))
    assert [found.node.metadata[CHUNK_KEY] for found in ready] == [key.digest for key in llm.keys(TEXTS)]
    assert threads
    assert threading.main_thread() not in threads


def test_the_policy_is_the_llms_unless_it_is_given():
    llm = wrapped(roomy_model())
    keys = {policy: llm.keys(TEXTS[:1], policy=policy)[0].digest for policy in ("query", "cacheblend")}
    assert keys["query"] != keys["cacheblend"]

    def key(**fields):
        return ChunkCachePostprocessor(**fields).postprocess_nodes(scored())[0].node.metadata[CHUNK_KEY]

    assert key(llm=llm) == keys["query"]
    assert key(llm=answering(llm, policy="cacheblend")) == keys["cacheblend"]
    assert key(llm=answering(llm, policy="cacheblend"), policy="query") == keys["query"]


@pytest.mark.parametrize("field", [{"precompute": "later"}, {"llm": "smollm2"}])
def test_what_a_postprocessor_cannot_be_made_of(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        ChunkCachePostprocessor(**{"llm": wrapped(), **field})


def test_an_unknown_policy_is_refused_at_once():
    with pytest.raises(PolicyError):
        ChunkCachePostprocessor(llm=wrapped(), policy="nonsense")
    with pytest.raises(PolicyError):
        answering(policy="nonsense")


# --- answers


def test_a_completion_is_a_chat_of_one_user_message():
    prompt = f"{TEXTS[0]}\n\n{QUESTION}"
    direct = shared().chat([{"role": "user", "content": prompt}], do_sample=False, max_new_tokens=12)
    llm = answering()
    assert direct.stats.hits == 1
    assert llm.complete(prompt).text == direct.text
    chat = llm.chat([ChatMessage(prompt)])
    assert (chat.message.role, chat.message.content, chat.delta) == (MessageRole.ASSISTANT, direct.text, None)


def test_answers_count_tokens_and_say_what_the_request_did():
    answer = answering().complete(f"{TEXTS[0]}\n\n{QUESTION}")
    usage = answer.additional_kwargs
    tokens = len(shared().chat_prompt([{"role": "user", "content": f"{TEXTS[0]}\n\n{QUESTION}"}]).token_ids)
    assert usage["prompt_tokens"] == tokens
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == tokens + 12
    assert len(shared().prompts.chunk(TEXTS[0])) <= usage["cached_tokens"] < tokens
    assert answer.raw["usage"] == usage
    assert answer.raw["stats"]["hits"] == 1
    assert answer.raw["ttft_s"] == answer.raw["stats"]["ttft_s"] > 0


def test_a_token_counter_sees_them():
    counter = TokenCountingHandler()
    llm = answering(callback_manager=CallbackManager([counter]))
    answer = llm.chat([ChatMessage(QUESTION)])
    *_, last = llm.stream_complete(QUESTION)
    assert counter.prompt_llm_token_count == (
        answer.additional_kwargs["prompt_tokens"] + last.additional_kwargs["prompt_tokens"]
    )
    assert counter.completion_llm_token_count == 24


def test_roles_and_blocks():
    messages = [
        ChatMessage("Be brief.", role=MessageRole.DEVELOPER),
        ChatMessage(blocks=[TextBlock(text="Hello."), CachePoint(cache_control={"type": "ephemeral"})]),
        ChatMessage(role=MessageRole.MODEL, blocks=[ThinkingBlock(content="Hm."), TextBlock(text="Good day.")]),
        ChatMessage(blocks=[TextBlock(text=TEXTS[0]), TextBlock(text=QUESTION)]),
    ]
    direct = shared().chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Good day."},
            {"role": "user", "content": f"{TEXTS[0]}\n{QUESTION}"},
        ],
        do_sample=False,
        max_new_tokens=12,
    )
    answer = answering().chat(messages)
    assert answer.message.content == direct.text
    assert answer.raw["stats"]["tokens"] == direct.stats.tokens


def test_what_is_not_text_is_refused():
    image = ChatMessage(blocks=[TextBlock(text="What is this?"), ImageBlock(image=b"x", image_mimetype="image/png")])
    with serving_error(PromptError, "a message has a ImageBlock, and this model reads text"):
        answering().chat([image])
    with serving_error(PromptError, "have no text"):
        answering().complete(" ")
    with serving_error(InputError, "num_return_sequences=2"):
        answering().complete(QUESTION, num_return_sequences=2)
    with serving_error(ContextLengthError, "lower max_new_tokens"):
        answering().complete("word " * 5000)


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_a_stream_is_the_same_answer_in_pieces(kind):
    llm = answering()
    asked = QUESTION if kind == "complete" else [ChatMessage(QUESTION)]
    whole, pieces = getattr(llm, kind)(asked), list(getattr(llm, f"stream_{kind}")(asked))
    text = str(whole) if kind == "complete" else whole.message.content
    so_far = [piece.text if kind == "complete" else piece.message.content for piece in pieces]
    assert len(pieces) > 2
    assert "".join(piece.delta for piece in pieces) == text == so_far[-1]
    assert all(
        after == before + piece.delta for before, after, piece in zip(["", *so_far], so_far, pieces, strict=False)
    )
    assert all(not piece.additional_kwargs for piece in pieces[:-1])
    assert pieces[-1].additional_kwargs["completion_tokens"] == whole.additional_kwargs["completion_tokens"]
    assert pieces[-1].raw["stats"]["tokens"] == whole.raw["stats"]["tokens"]


def streams():
    return [thread for thread in threading.enumerate() if thread.name == "chunkcache-stream"]


def test_who_stops_listening_ends_the_generation():
    pieces = answering(max_tokens=3000).stream_complete(QUESTION)
    next(pieces)
    assert streams()
    pieces.close()
    assert not streams()


def test_a_stream_that_nobody_listens_to_is_not_begun():
    answering().stream_complete(QUESTION)
    assert not streams()


@pytest.mark.parametrize("given", ["field", "call"])
def test_stop_strings_end_an_answer_and_are_no_part_of_it(given):
    text = answering(max_tokens=40).complete(QUESTION).text
    stop = text[9:12]
    before = text[: text.index(stop)].strip()
    fields, keywords = ({"stop": [stop]}, {}) if given == "field" else ({"stop": ["never"]}, {"stop": [stop]})
    llm = answering(max_tokens=40, **fields)
    answer = llm.complete(QUESTION, **keywords)
    assert answer.text == before
    assert answer.additional_kwargs["completion_tokens"] < 40
    *_, last = pieces = list(llm.stream_complete(QUESTION, **keywords))
    assert "".join(piece.delta for piece in pieces) == last.text == before


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="a stop string is ''"):
        answering(stop=[""])
    with serving_error(InputError, "a stop string is ''"):
        answering().complete(QUESTION, stop=[""])


def test_temperature():
    def said(llm, **keywords):
        torch.manual_seed(1)
        return llm.complete(QUESTION, **keywords).text

    greedy = said(answering())
    direct = {}
    for name, options in {"sampled": {"do_sample": True, "temperature": 5.0}, "configured": {}}.items():
        torch.manual_seed(1)
        message = [{"role": "user", "content": QUESTION}]
        direct[name] = shared().chat(message, max_new_tokens=12, **options).text
    assert said(answering(temperature=5.0)) == said(answering(), temperature=5.0) == direct["sampled"] != greedy
    assert said(answering(temperature=None)) == direct["configured"]
    with pytest.raises(ValidationError, match="temperature"):
        answering(temperature=-1)


def test_keywords_of_generate_come_as_options_or_with_a_call():
    config = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=3)

    def tokens(llm, **keywords):
        torch.manual_seed(1)
        return llm.complete(QUESTION, **keywords).additional_kwargs["completion_tokens"]

    assert tokens(answering(temperature=None, max_tokens=None, options={"generation_config": config})) == 3
    assert tokens(answering(options={"min_new_tokens": 5}), max_tokens=5) == 5
    assert tokens(answering(max_tokens=None)) == 64
    with serving_error(ValueError, "nonsense"):
        answering().complete(QUESTION, nonsense=1)


def test_beams_answer_alike_with_and_without_async():
    llm = answering(options={"num_beams": 2})
    answer = llm.complete(QUESTION)
    assert asyncio.run(llm.acomplete(QUESTION)).text == answer.text
    assert asyncio.run(llm.achat([ChatMessage(QUESTION)])).message.content == answer.text


def test_a_policy_per_call():
    prompt = f"{TEXTS[0]}\n\n{QUESTION}"
    assert answering().complete(prompt, policy="full").additional_kwargs["cached_tokens"] == 0
    assert answering(policy="full").complete(prompt).raw["stats"]["policy"] == "full"


def test_metadata_and_what_is_written_down():
    llm = answering(model_name="tiny")
    framing = len(shared().chat_prompt([{"role": "user", "content": "x"}]).token_ids)  # by the chat template
    assert (llm.metadata.context_window, llm.metadata.num_output) == (LONG - framing, 12)
    assert llm.metadata.is_chat_model
    assert answering(max_tokens=None).metadata.num_output == 64
    assert llm.to_payload()["model_name"] == "tiny"
    assert answering().metadata.model_name == "llama"
    assert "llm" not in llm.model_dump()
    assert llm.token_ids(QUESTION) == list(shared().prompts.encode(QUESTION))


def test_from_model(tmp_path):
    llm = ChunkCacheLLM.from_model(
        saved_model(tmp_path), store="memory://?max_bytes=7MiB", policy="reuse", tenant="a", max_tokens=3
    )
    assert llm.llm.store.stats().max_bytes == 7 * 2**20
    assert llm.complete(QUESTION).additional_kwargs["completion_tokens"] <= 3
    assert llm.complete(QUESTION).raw["stats"]["policy"] == "reuse"
    assert llm.metadata.model_name == str(tmp_path)


# --- async


def test_async_answers_are_the_same():
    async def ask(llm):
        return (
            await llm.acomplete(QUESTION),
            await llm.achat([ChatMessage(QUESTION)]),
            [piece async for piece in await llm.astream_complete(QUESTION)],
            [piece async for piece in await llm.astream_chat([ChatMessage(QUESTION)])],
        )

    llm = answering()
    completion, chat, pieces, chat_pieces = asyncio.run(ask(llm))
    text = llm.complete(QUESTION).text
    assert completion.text == chat.message.content == text
    assert completion.delta is chat.delta is None
    assert completion.additional_kwargs["completion_tokens"] == chat.additional_kwargs["completion_tokens"] == 12
    assert "".join(piece.delta for piece in pieces) == "".join(piece.delta for piece in chat_pieces) == text
    assert pieces[-1].additional_kwargs["completion_tokens"] == 12


def test_others_go_on_while_it_answers(monkeypatch):
    llm = wrapped()
    go, begin = threading.Event(), llm.chat_stream

    def late(*args, **options):
        assert go.wait(20)
        return begin(*args, **options)

    monkeypatch.setattr(llm, "chat_stream", late)

    async def both():
        answer = asyncio.create_task(answering(llm).achat([ChatMessage(QUESTION)]))
        await asyncio.sleep(0)
        go.set()  # never reached if the answer had the loop for itself
        return await answer

    assert asyncio.run(both()).message.content


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_who_cancels_ends_the_generation(kind):
    async def cancel():
        asked = QUESTION if kind == "complete" else [ChatMessage(QUESTION)]
        answer = asyncio.create_task(getattr(answering(max_tokens=3000), f"a{kind}")(asked))
        while not streams():
            await asyncio.sleep(0.001)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        while streams():
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(cancel(), 20))


def test_who_leaves_an_async_stream_ends_the_generation():
    async def leave():
        async with aclosing(await answering(max_tokens=3000).astream_complete(QUESTION)) as pieces:
            await anext(pieces)
        while streams():
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(leave(), 20))


def test_an_error_comes_through_an_async_stream():
    async def ask():
        return [piece async for piece in await answering().astream_complete("word " * 5000)]

    with serving_error(ContextLengthError, "lower max_new_tokens"):
        asyncio.run(ask())


# --- query engines


@pytest.mark.parametrize(
    ("mode", "found"),
    [
        ("compact", [3]),
        ("tree_summarize", [3]),
        ("compact_accumulate", [3]),
        ("refine", [1, 1, 1]),
        ("accumulate", [1, 1, 1]),
        ("simple_summarize", [0]),  # it writes the end of a line, here that of the metadata, as \n
        ("generation", [0]),
    ],
)
def test_each_response_mode(index, requests, mode, found):
    llm, seen = requests
    engine = index.as_query_engine(
        llm=answering(llm),
        similarity_top_k=3,
        node_postprocessors=[ChunkCachePostprocessor(llm)],
        response_mode=mode,
    )
    response = engine.query(QUESTION)
    assert [answer.stats.chunks for _, answer in seen] == found
    assert [answer.stats.hits for _, answer in seen] == found
    assert seen[-1][1].text in str(response)
    assert response.source_nodes[0].node.ref_doc_id == "0.md"
    assert all(source.node.metadata[CHUNK_KEY] for source in response.source_nodes)


def test_a_node_of_one_line_is_found_also_by_simple_summarize(requests):
    llm, seen = requests
    index = VectorStoreIndex(nodes=[TextNode(text=TEXTS[0])], embed_model=embedding())
    post = ChunkCachePostprocessor(llm)
    fields = {"llm": answering(llm), "node_postprocessors": [post], "response_mode": "simple_summarize"}
    index.as_query_engine(**fields).query(QUESTION)
    assert seen[0][1].stats.hits == 1


def test_an_engine_answers_as_the_direct_call_does_from_the_same_kv(index, requests):
    llm, seen = requests
    post = ChunkCachePostprocessor(llm)
    response = index.as_query_engine(llm=answering(llm), node_postprocessors=[post]).query(QUESTION)
    ((messages, answer),) = seen
    assert str(response) == answer.text == llm.chat(messages, do_sample=False, max_new_tokens=12).text
    assert answer.stats.misses == 0
    assert answer.stats.reused_tokens > sum(len(llm.prompts.chunk(text)) for text in TEXTS[:2])


def test_only_the_node_on_the_border_of_two_prompts_is_not_reused(requests):
    llm, seen = requests
    chatting = answering(llm)
    texts = [" ".join(f"{text} It is number {n}." for text in TEXTS) for n in range(8)]
    tokens = len(chatting.token_ids("\n\n".join(texts)))
    # The default synthesizer, and beside 500 tokens that it keeps free, and its prompt, room for two thirds.
    window = PromptHelper(context_window=500 + 300 + tokens * 2 // 3, num_output=12, tokenizer=chatting.token_ids)
    synthesizer = get_response_synthesizer(llm=chatting, prompt_helper=window)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    synthesizer.synthesize(QUESTION, ChunkCachePostprocessor(llm).postprocess_nodes(nodes))
    assert len(seen) == 2
    assert sum(answer.stats.hits for _, answer in seen) == 7
    assert sum(answer.stats.misses for _, answer in seen) == 0


def test_a_streaming_engine(index, requests):
    llm, _ = requests
    post = ChunkCachePostprocessor(llm)
    whole = index.as_query_engine(llm=answering(llm), node_postprocessors=[post]).query(QUESTION)
    engine = index.as_query_engine(llm=answering(llm), node_postprocessors=[post], streaming=True)
    assert "".join(engine.query(QUESTION).response_gen) == str(whole)


def test_an_async_engine(index, requests):
    llm, _ = requests
    engine = index.as_query_engine(llm=answering(llm), node_postprocessors=[ChunkCachePostprocessor(llm)])
    assert str(asyncio.run(engine.aquery(QUESTION))) == str(engine.query(QUESTION))


def test_a_chat_engine_finds_the_nodes_in_its_system_message(index, requests):
    llm, seen = requests
    chatting = answering(llm)
    # The default memory is a database, which is never closed.
    memory = ChatMemoryBuffer.from_defaults(llm=chatting, tokenizer_fn=chatting.token_ids)
    post = ChunkCachePostprocessor(llm)
    engine = index.as_chat_engine(chat_mode="context", llm=chatting, memory=memory, node_postprocessors=[post])
    engine.chat(QUESTION)
    engine.chat("And in winter?")
    assert [answer.stats.hits for _, answer in seen] == [2, 2]
    assert [message["role"] for message in seen[-1][0]] == ["system", "user", "assistant", "user"]


def test_a_prompt_of_ones_own_keeps_its_reuse(index, requests):
    llm, seen = requests
    engine = index.as_query_engine(
        llm=answering(llm),
        node_postprocessors=[ChunkCachePostprocessor(llm)],
        text_qa_template=PromptTemplate("Passages:\n{context_str}\nNow answer: {query_str}"),
    )
    engine.query(QUESTION)
    assert seen[0][0][0]["content"].startswith("Passages:\n")
    assert seen[0][1].stats.hits == 2


def test_a_document_is_forgotten_by_the_id_that_the_index_knows_it_by(index):
    llm = wrapped(roomy_model())
    found = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    post = ChunkCachePostprocessor(llm)
    texts = [scored.node.get_content(MetadataMode.LLM) for scored in post.postprocess_nodes(found)]
    assert stored(llm, texts) == [True] * 3
    llm.delete(document=found[0].node.ref_doc_id)
    assert stored(llm, texts) == [False, True, True]
    assert not any(CHUNK_KEY in node.metadata for node in index.docstore.docs.values())


# --- embedding


def test_the_embedding_is_our_embedders():
    embedder = Embedder()
    ours = embedding()
    assert np.allclose(ours.get_text_embedding_batch(list(TEXTS)), embedder.embed(TEXTS), atol=1e-5)
    assert np.allclose(ours.get_query_embedding(QUESTION), embedder.embed_query(QUESTION)[0], atol=1e-5)
    assert np.allclose(ours.get_text_embedding(TEXTS[0]), embedder.embed(TEXTS[:1])[0], atol=1e-5)
    assert all(type(value) is float for value in ours.get_query_embedding(QUESTION))
    assert ours.model_name == "all-MiniLM-L6-v2"


def test_the_embedding_runs_in_another_thread_of_an_async_engine():
    async def embed():
        ours = embedding()
        return await ours.aget_query_embedding(QUESTION), await ours.aget_text_embedding_batch(list(TEXTS))

    query, texts = asyncio.run(embed())
    assert query == embedding().get_query_embedding(QUESTION)
    assert np.allclose(texts, embedding().get_text_embedding_batch(list(TEXTS)), atol=1e-5)


# --- without LlamaIndex


def test_without_llama_index_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("chunkcache.integrations.llamaindex")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_index.core.llms", None)
    with pytest.raises(ChunkCacheError, match=r'needs llama-index-core .*pip install "chunkcache\[llamaindex\]"'):
        importlib.import_module(plugin.__name__)


def test_nodes_go_back_to_an_order_that_was_served_and_say_things_once():
    ready = ChunkCachePostprocessor(wrapped(), reorder=1, distinct=True)
    first = ready.postprocess_nodes(scored())
    again = ready.postprocess_nodes(scored([TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[1]]))
    assert [found.node.text for found in again] == [found.node.text for found in first] == list(TEXTS)
    assert len(ChunkCachePostprocessor(wrapped()).postprocess_nodes(scored([*TEXTS, TEXTS[0]]))) == 4
