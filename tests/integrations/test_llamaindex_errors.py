"""No error of ours is swallowed by LlamaIndex, whose synthesizers swallow ValueErrors."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import TextNode
from support.llm import QUESTION, TEXTS, own_model, wrapped

import chunkcache
from chunkcache.errors import (
    CalibrationError,
    ContextLengthError,
    InputError,
    PolicyError,
    ServingError,
)
from chunkcache.integrations.llamaindex import ChunkCacheLLM, ChunkCachePostprocessor

MODES = (
    "compact",
    "refine",
    "tree_summarize",
    "compact_accumulate",
    "accumulate",
    "simple_summarize",
    "generation",
)
WAYS = [
    (mode, how)
    for mode in MODES
    for how in ("query", "aquery", "stream", "astream")
    if how.endswith("query") or "accumulate" not in mode  # LlamaIndex does not stream those
]
CONTEXT = 1200


@cache
def shared() -> chunkcache.CachedLLM:
    return wrapped(own_model(max_position_embeddings=CONTEXT))


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    """LlamaIndex counts one token for each word, far fewer than the model's."""
    monkeypatch.setattr(Settings, "_tokenizer", None)
    Settings.tokenizer = str.split
    yield
    monkeypatch.undo()
    import llama_index.core

    llama_index.core.global_tokenizer = None


def answering(**fields: Any) -> ChunkCacheLLM:
    return ChunkCacheLLM(llm=shared(), **{"temperature": 0, "max_tokens": 8, **fields})


def index_of(texts: Any = TEXTS) -> VectorStoreIndex:
    return VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=MockEmbedding(8))


async def ask(index: VectorStoreIndex, how: str, question: str = QUESTION, **fields: Any) -> str:
    engine = index.as_query_engine(similarity_top_k=3, streaming="stream" in how, **fields)
    if how in ("query", "stream"):
        return await asyncio.to_thread(lambda: str(engine.query(question)))
    response = await engine.aquery(question)
    return str(response) if how == "aquery" else "".join([piece async for piece in response.response_gen])


@pytest.mark.parametrize(("mode", "how"), WAYS)
async def test_an_option_that_cannot_be_served_is_an_error_in_every_response_mode(mode, how):
    llm = answering(options={"num_return_sequences": 2})
    with pytest.raises(ServingError, match="num_return_sequences=2") as raised:
        await ask(index_of(), how, llm=llm, response_mode=mode)
    assert isinstance(raised.value.__cause__, InputError)


@pytest.mark.parametrize(("mode", "how"), WAYS)
async def test_a_prompt_that_is_too_long_is_an_error_in_every_response_mode(mode, how):
    question = "-".join(["lighthouse"] * 600)  # one token by the framework's count
    with pytest.raises(ServingError, match="do not fit the model's context") as raised:
        await ask(index_of(), how, question, llm=answering(), response_mode=mode)
    assert isinstance(raised.value.__cause__, ContextLengthError)


@pytest.mark.parametrize("how", ["query", "stream"])
async def test_a_policy_of_a_call_that_is_unknown_or_not_calibrated(how):
    for policy, cause in (("nonsense", PolicyError), ("query:guard=0.1", CalibrationError)):
        llm = answering(options={})
        llm.policy = policy  # as a framework sets a field, past the check of a new one
        with pytest.raises(ServingError) as raised:
            await ask(index_of(), how, llm=llm)
        assert isinstance(raised.value.__cause__, cause)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # LlamaIndex raises it there, too
@pytest.mark.parametrize("mode", ["context", "condense_plus_context", "simple"])
async def test_chat_engines_raise_it_too(mode):
    llm = answering(options={"num_return_sequences": 2})

    def engine() -> Any:
        memory = ChatMemoryBuffer.from_defaults(llm=llm, tokenizer_fn=str.split)
        return index_of().as_chat_engine(chat_mode=mode, llm=llm, memory=memory)

    async def astream() -> str:
        response = await engine().astream_chat(QUESTION)
        return "".join([piece async for piece in response.async_response_gen()])

    ways = (
        lambda: asyncio.to_thread(lambda: engine().chat(QUESTION)),
        lambda: asyncio.to_thread(lambda: list(engine().stream_chat(QUESTION).response_gen)),
        lambda: engine().achat(QUESTION),
        astream,
    )
    for way in ways:
        with pytest.raises(ServingError, match="num_return_sequences=2"):
            await way()


async def test_a_postprocessor_raises_it_too():
    post = ChunkCachePostprocessor(shared())
    post.ahead._policy = "nonsense"  # as if the policy had gone since
    with pytest.raises(ServingError, match="nonsense"):
        await ask(index_of(), "query", llm=answering(), node_postprocessors=[post])


async def test_counted_by_the_models_tokenizer_more_nodes_than_fit_are_answered():
    llm = answering()
    Settings.tokenizer = llm.token_ids
    nodes = [TextNode(text=" ".join(f"{text} It is number {n}." for text in TEXTS)) for n in range(12)]
    index = VectorStoreIndex(nodes, embed_model=MockEmbedding(8))
    for mode in ("compact", "tree_summarize", "compact_accumulate"):
        engine = index.as_query_engine(llm=llm, similarity_top_k=12, response_mode=mode)
        await asyncio.to_thread(lambda engine=engine: engine.query(QUESTION))
