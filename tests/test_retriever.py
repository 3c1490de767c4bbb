"""The retriever: a question finds the chunk that answers it, wherever in the chunk the answer is."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_tokenizer import tiny_tokenizer

import chunkcache.retriever
from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever.documents import Document
from chunkcache.retriever.embedder import Embedder
from chunkcache.retriever.retriever import Retriever

FERRY = "The ferry sails to the islands twice a day and carries forty cars."
BREAD = "Knead flour, water, salt and yeast, then bake the loaf for an hour."
COMET = "The comet was first seen by an astronomer through her new telescope."
DOCUMENTS = [Document(name, name, text) for name, text in (("a", FERRY), ("b", BREAD), ("c", COMET))]


@pytest.fixture(scope="module")
def embedder():
    return Embedder()


def build(documents, embedder, **options):
    return Retriever.build(documents, tiny_tokenizer(), embedder=embedder, **options)


def test_the_chunk_that_answers_comes_first(embedder):
    retriever = build(DOCUMENTS, embedder)
    assert [chunk.document_id for chunk in retriever.chunks] == ["a", "b", "c"]
    hits = retriever.search("How is bread made?", k=2)
    assert len(hits) == 2
    assert hits[0].chunk == retriever.chunks[1]
    assert 1 >= hits[0].score > hits[1].score
    assert retriever.search("Who discovered the comet?", k=1)[0].chunk.text == COMET


def test_an_answer_at_the_end_of_a_long_chunk_is_found(embedder):
    filler = "Nothing much happened in the town that year, and the harvest was neither good nor bad. " * 30
    documents = [Document("long", "", filler + COMET), Document("short", "", filler + BREAD)]
    [first, _] = build(documents, embedder, size=4000).search("Who discovered the comet?")
    assert first.chunk.document_id == "long"


def test_every_chunk_is_ranked_once_when_k_is_large(embedder):
    documents = [Document("many", "", f"{FERRY} " * 60), *DOCUMENTS]
    retriever = build(documents, embedder, size=300)
    hits = retriever.search("Where does the ferry go?", k=1000)
    assert len(hits) == len({hit.chunk for hit in hits}) == len(retriever.chunks)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for k in range(1, len(hits)):
        assert retriever.search("Where does the ferry go?", k=k) == hits[:k]


class EqualEmbedder:
    """Gives every text the same vector."""

    dim = 2

    def passages(self, text):
        return text.split()

    def embed(self, texts, *, on_progress=None):
        return np.ones((len(texts), 2), dtype=np.float32)

    def embed_query(self, query):
        return np.ones((1, 2), dtype=np.float32)


def test_equal_scores_keep_the_order_of_the_chunks():
    documents = [Document(str(i), "", "word " * (1 + i % 3)) for i in range(30)]
    retriever = build(documents, EqualEmbedder())
    assert [hit.chunk.document_id for hit in retriever.search("any", k=7)] == list("0123456")


def test_options_and_progress_are_passed_on(embedder):
    seen = []
    retriever = build(
        DOCUMENTS, embedder, size=16, overlap=4, on_progress=lambda done, total: seen.append((done, total))
    )
    assert max(chunk.tokens for chunk in retriever.chunks) <= 16
    assert seen[-1] == (len(retriever.chunks), len(retriever.chunks))


def test_the_default_embedder_is_the_packaged_model():
    assert Retriever.build(DOCUMENTS, tiny_tokenizer()).search("ferry", k=1)[0].chunk.document_id == "a"


@pytest.mark.parametrize("documents", [[], [Document("a", "a", " \n")]])
def test_documents_without_text_are_refused(documents, embedder):
    with pytest.raises(DocumentError, match="no text"):
        build(documents, embedder)


def test_an_empty_query_and_a_k_below_one_are_refused(embedder):
    retriever = build(DOCUMENTS, embedder)
    with pytest.raises(InputError, match=r"query ' ' is empty"):
        retriever.search(" ")
    with pytest.raises(InputError, match="k = 0"):
        retriever.search("ferry", k=0)


def test_the_public_names_are_listed_and_there():
    for name in chunkcache.retriever.__all__:
        assert hasattr(chunkcache.retriever, name)
