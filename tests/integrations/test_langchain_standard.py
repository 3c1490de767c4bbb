"""LangChain's own standard tests, with tiny models and with the real small one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from support.llm import QUESTION, TEXTS, real_model, wrapped

import chunkcache
from chunkcache.integrations.langchain import ChatChunkCache, ChunkCacheRetriever, ChunkRetriever, document_block
from chunkcache.retriever import Document as OurDocument
from chunkcache.retriever import Embedder, Retriever

NAME = "smollm2-135m-instruct"
CORPUS = Path(__file__).parents[2] / "examples" / "corpus"


@cache
def tiny_llm() -> chunkcache.CachedLLM:
    return wrapped()


@cache
def real_llm() -> chunkcache.CachedLLM:
    return chunkcache.wrap(*real_model(NAME), lead_in="")


@cache
def vectors() -> InMemoryVectorStore:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store.add_documents([Document(page_content=text) for text in TEXTS])
    return store


@cache
def our_retriever() -> Retriever:
    documents = [OurDocument(f"{number}.md", "", text) for number, text in enumerate(TEXTS)]
    return Retriever.build(documents, tiny_llm().tokenizer, embedder=Embedder())


class TestChunkCacheRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[ChunkCacheRetriever]:
        return ChunkCacheRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": vectors().as_retriever(search_kwargs={"k": 3}), "llm": tiny_llm()}

    @property
    def retriever_query_example(self) -> str:
        return QUESTION


class TestChunkRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[ChunkRetriever]:
        return ChunkRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": our_retriever()}

    @property
    def retriever_query_example(self) -> str:
        return QUESTION


class TestChatUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatChunkCache]:
        return ChatChunkCache

    @property
    def has_tool_calling(self) -> bool:
        return False  # `bind_tools` is there to say so

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": tiny_llm(), "model_name": "tiny"}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Those that a model has that runs in the process: no key, no time-out and no retries."""
        return {"temperature": 0, "max_tokens": 100, "stop": []}


@pytest.mark.model
class TestChatIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatChunkCache]:
        return ChatChunkCache

    @property
    def has_tool_calling(self) -> bool:
        return False  # `bind_tools` is there to say so

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": real_llm(), "model_name": NAME, "temperature": 0, "max_tokens": 8}

    @property
    def supports_model_override(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[Any, Any]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        """Ask about passages that were precomputed."""
        text = (CORPUS / "hexel-light.md").read_text().split("\n\n")[1]
        real_llm().precompute([text])
        model = self.chat_model_class(**self.chat_model_params)
        messages = [{"role": "user", "content": [document_block(Document(page_content=text)), "Who designed it?"]}]
        pieces = list(model.stream(messages)) if stream else [model.invoke(messages)]
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += piece
        assert whole.usage_metadata["input_token_details"]["cache_read"] > 20
        return whole
