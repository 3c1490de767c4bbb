"""ChunkCacheRetriever and ChunkRetriever: the inner retriever's Documents, and their KV ready for the prompt."""

from __future__ import annotations

import asyncio
import builtins
import importlib
import logging
import sys
import threading
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError
from support.langchain import ListRetriever
from support.llm import QUESTION, TEXTS, wrapped

import chunkcache.integrations.langchain as plugin
from chunkcache.errors import InputError
from chunkcache.integrations.langchain import CHUNK_KEY, ChunkCacheRetriever, ChunkRetriever
from chunkcache.retriever import Document as OurDocument
from chunkcache.retriever import Embedder, Retriever

DOCUMENTS = tuple(
    Document(page_content=text, metadata={"source": f"{number}.md", "tags": ["kept"]}, id=f"id-{number}")
    for number, text in enumerate(TEXTS)
)


class Noted(BaseCallbackHandler):
    """Notes each run of a retriever: its id, its parent's, its tags and metadata."""

    def __init__(self):
        self.runs: list[dict[str, Any]] = []

    def on_retriever_start(self, serialized, query, *, run_id, parent_run_id=None, **about):
        self.runs.append({"id": run_id, "parent": parent_run_id, **about})


def over(llm, documents=DOCUMENTS, **fields):
    return ChunkCacheRetriever(retriever=ListRetriever(documents=list(documents)), llm=llm, **fields)


def stored(llm, texts=TEXTS):
    return [key in llm.store for key in llm.keys(texts)]


def test_documents_come_unchanged_but_for_the_key_of_their_kv():
    llm = wrapped()
    before = [document.model_copy(deep=True) for document in DOCUMENTS]
    found = over(llm).invoke(QUESTION)
    assert [document.metadata[CHUNK_KEY] for document in found] == [key.digest for key in llm.keys(TEXTS)]
    for document in found:
        del document.metadata[CHUNK_KEY]
    assert found == before


def test_the_inner_retrievers_own_objects_are_left_alone():
    retriever = over(wrapped())
    retriever.invoke(QUESTION)
    assert all(set(document.metadata) == {"source", "tags"} for document in retriever.retriever.documents)
    assert retriever.retriever.documents[0] is DOCUMENTS[0]


@pytest.mark.parametrize("how", ["now", "background", "never"])
def test_what_is_missing_is_computed_when_the_option_says(how):
    llm = wrapped()
    retriever = over(llm, precompute=how)
    retriever.invoke(QUESTION)
    if how == "now":
        assert all(stored(llm))
    retriever.ahead.flush()
    assert stored(llm) == [how != "never"] * 3
    out = llm.chat([{"role": "user", "content": f"Read this. {TEXTS[0]} And this: {TEXTS[2]} {QUESTION}"}])
    assert (out.stats.hits, out.stats.misses) == ((0, 2) if how == "never" else (2, 0))


def test_the_request_does_not_compute_again_what_the_thread_is_computing():
    llm = wrapped()
    retriever = over(llm, precompute="background")
    content = " ".join(document.page_content for document in retriever.invoke(QUESTION))
    llm.chat([{"role": "user", "content": f"{content} {QUESTION}"}], policy="query", max_new_tokens=1)
    retriever.ahead.flush()
    written = llm.store.stats().writes
    kinds = {entry.key for entry in llm.store.entries()}
    assert all(stored(llm))
    assert written == len(kinds)  # nothing twice


def test_stored_kv_are_prefetched(tmp_path):
    disk = f"disk://{tmp_path}/kv?sync=no"
    wrapped(store=disk).precompute(TEXTS)
    llm = wrapped(store=f"tiered:memory://|{disk}")
    over(llm, precompute="never").invoke(QUESTION)
    llm.store.flush()
    memory = llm.store.tiers()["memory"]
    assert all(key in memory for key in llm.keys(TEXTS))


def test_a_document_can_be_forgotten_by_its_source_or_its_id():
    llm = wrapped()
    documents = [DOCUMENTS[0], Document(page_content=TEXTS[1], id="no source"), Document(page_content=TEXTS[2])]
    over(llm, documents).invoke(QUESTION)
    assert llm.delete(document="0.md") == 1
    assert llm.delete(document="no source") == 1
    assert stored(llm) == [False, False, True]
    over(llm, document_key="page").invoke(QUESTION)
    assert llm.delete(document="id-0") == 1


def test_what_cannot_be_cached_passes_through_without_a_key(caplog):
    llm = wrapped()
    odd = [Document(page_content=" \n"), Document(page_content="word " * 2000), Document(page_content="word " * 3000)]
    retriever = over(llm, [*odd, DOCUMENTS[0]])
    with caplog.at_level(logging.WARNING):
        found = retriever.invoke(QUESTION)
    assert found[:3] == odd
    assert all(CHUNK_KEY not in document.metadata for document in found[:3])
    assert CHUNK_KEY in found[3].metadata
    assert retriever.ahead.skipped == 3
    assert len(caplog.records) == 1


def test_an_error_in_the_background_is_counted_and_the_documents_come(monkeypatch, caplog):
    llm = wrapped()

    def broken(*args, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(llm, "precompute", broken)
    retriever = over(llm, precompute="background")
    with caplog.at_level(logging.ERROR):
        assert len(retriever.invoke(QUESTION)) == 3
        retriever.ahead.flush()
        retriever.invoke(QUESTION)
        retriever.ahead.flush()
    assert retriever.ahead.errors == 2
    assert len(caplog.records) == 1


def test_an_error_now_is_the_callers(monkeypatch):
    llm = wrapped()
    monkeypatch.setattr(llm, "precompute", lambda *args, **options: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        over(llm).invoke(QUESTION)


async def test_async_asks_the_inner_retriever_asynchronously_and_computes_in_another_thread(monkeypatch):
    llm = wrapped()
    retriever = over(llm)
    threads = set()
    precompute = llm.precompute

    def noted(*args, **options):
        threads.add(threading.current_thread())
        return precompute(*args, **options)

    monkeypatch.setattr(llm, "precompute", noted)
    found = await retriever.ainvoke(QUESTION)
    assert [document.metadata[CHUNK_KEY] for document in found] == [key.digest for key in llm.keys(TEXTS)]
    assert [way for way, _ in retriever.retriever.calls] == ["async"]
    assert threads
    assert threading.current_thread() not in threads


async def test_batches_sync_and_async():
    retriever = over(wrapped())
    expected = retriever.invoke(QUESTION)
    assert retriever.batch([QUESTION] * 3) == [expected] * 3
    assert await retriever.abatch([QUESTION] * 3) == [expected] * 3


@pytest.mark.parametrize("asynchronous", [False, True])
def test_callbacks_tags_and_metadata_reach_the_inner_retriever(asynchronous):
    noted = Noted()
    retriever = over(wrapped()).with_config(
        tags=["ours"], metadata={"user": "u1"}, callbacks=[noted], run_name="outer"
    )
    if asynchronous:
        asyncio.run(retriever.ainvoke(QUESTION))
    else:
        retriever.invoke(QUESTION)
    outer, inner = noted.runs
    assert (outer["parent"], inner["parent"]) == (None, outer["id"])
    assert outer["name"] == "outer"
    assert inner["name"] == "ListRetriever"
    assert inner["tags"].count("ours") == 1
    assert inner["metadata"]["user"] == "u1"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_configurable_inner_retriever_is_configured(asynchronous):
    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    vectors.add_documents(list(DOCUMENTS))
    field = ConfigurableField(id="search")
    inner = vectors.as_retriever(search_kwargs={"k": 3}).configurable_fields(search_kwargs=field)
    retriever = ChunkCacheRetriever(retriever=inner, llm=wrapped())
    one = retriever.with_config(configurable={"search": {"k": 1}})
    found = asyncio.run(one.ainvoke(QUESTION)) if asynchronous else one.invoke(QUESTION)
    assert len(found) == 1
    assert len(retriever.invoke(QUESTION)) == 3


def test_a_vector_stores_documents_stay_as_they_are_stored():
    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    vectors.add_documents(list(DOCUMENTS))
    retriever = ChunkCacheRetriever(retriever=vectors.as_retriever(), llm=wrapped())
    assert len(retriever.invoke(QUESTION)) == 3
    assert all(CHUNK_KEY not in entry["metadata"] for entry in vectors.store.values())


def test_any_runnable_that_returns_documents_will_do():
    retriever = ChunkCacheRetriever(retriever=RunnableLambda(lambda query: list(DOCUMENTS)), llm=wrapped())
    assert [document.id for document in retriever.invoke(QUESTION)] == ["id-0", "id-1", "id-2"]


def test_k_is_how_many_are_passed_on_and_cached():
    llm = wrapped()
    assert len(over(llm, k=2).invoke(QUESTION)) == 2
    assert stored(llm) == [True, True, False]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_documents_go_back_to_an_order_that_was_served(asynchronous):
    retriever = over(wrapped(), reorder=1)
    first = retriever.invoke(QUESTION)
    retriever.retriever.documents = [DOCUMENTS[1], DOCUMENTS[0], DOCUMENTS[2]]
    again = asyncio.run(retriever.ainvoke(QUESTION)) if asynchronous else retriever.invoke(QUESTION)
    assert again == first
    kept = over(wrapped(), retriever.retriever.documents)
    assert [document.id for document in kept.invoke(QUESTION)] == ["id-1", "id-0", "id-2"]


def test_repeats_are_left_out_if_that_is_asked_for():
    part = Document(page_content=TEXTS[0][4:40], id="part")
    documents = [part, *DOCUMENTS, DOCUMENTS[1]]
    assert [document.id for document in over(wrapped(), documents, distinct=True).invoke(QUESTION)] == [
        "id-0",
        "id-1",
        "id-2",
    ]
    assert len(over(wrapped(), documents).invoke(QUESTION)) == 5


def test_what_the_fields_cannot_be_is_refused():
    llm = wrapped()
    with pytest.raises(ValidationError, match="precompute"):
        over(llm, precompute="later")
    with pytest.raises(ValidationError, match="extra"):
        over(llm, precomputed="now")
    with pytest.raises(ValidationError):
        over(llm, k=0)
    with pytest.raises(ValidationError, match="no policy is called 'nosuch'"):
        over(llm, policy="nosuch")
    assert "CachedLLM" not in repr(over(llm))


def test_without_langchain_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **options):
        if name.startswith("langchain_core"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    for name in [name for name in sys.modules if name.startswith("chunkcache.integrations.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r'pip install "chunkcache\[langchain\]"'):
        importlib.import_module(plugin.__name__)


# --- our own retriever


@pytest.fixture(scope="module")
def ours():
    llm = wrapped()
    documents = [OurDocument(f"{number}.md", "", text) for number, text in enumerate(TEXTS)]
    return llm, Retriever.build(documents, llm.tokenizer, embedder=Embedder())


def test_our_chunks_come_as_documents(ours):
    _, retriever = ours
    hits = retriever.search(QUESTION, 2)
    found = ChunkRetriever(retriever=retriever, k=2).invoke(QUESTION)
    assert [(document.page_content, document.id) for document in found] == [(h.chunk.text, h.chunk.id) for h in hits]
    assert [document.metadata for document in found] == [
        {"source": hit.chunk.document_id, "index": hit.chunk.index, "score": hit.score} for hit in hits
    ]


async def test_our_retriever_takes_k_and_mode_from_a_call(ours):
    _, retriever = ours
    found = ChunkRetriever(retriever=retriever, k=1)
    assert len(found.invoke(QUESTION, k=3)) == 3
    assert len(await found.ainvoke(QUESTION, k=2)) == 2
    words = found.invoke("lighthouse keeper", mode="keyword")
    assert words == ChunkRetriever(retriever=retriever, k=1, mode="keyword").invoke("lighthouse keeper")
    assert "lighthouse" in words[0].page_content
    with pytest.raises(InputError):
        found.invoke(" ")


def test_our_chunks_can_be_forgotten_by_their_document(ours):
    llm, retriever = ours
    ChunkCacheRetriever(retriever=ChunkRetriever(retriever=retriever), llm=llm).invoke(QUESTION)
    assert llm.delete(document="1.md") == 1
