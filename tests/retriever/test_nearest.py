"""Which chunks are most like which: exact, over whole chunks, whatever kind of index holds the vectors."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_tokenizer import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import InputError
from chunkcache.retriever import Chunk, Document, Embedder, Retriever
from chunkcache.retriever.nearest import nearest_rows, nearest_texts

ABOUT = {
    "boats": "The harbour had {} boats, and fishermen mended their nets on the quay.",
    "bread": "Knead the dough {} times, let it rise, and bake the bread at noon.",
    "stars": "The telescope showed {} stars that nobody had seen in the night sky.",
}
DOCUMENTS = [Document(f"{topic}{n}", topic, said.format(n)) for n in range(3) for topic, said in ABOUT.items()]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(seed=st.integers(0, 999), n=st.integers(1, 40), k=st.integers(1, 50))
def test_rows_are_ranked_as_a_full_sort_ranks_them(seed, n, k):
    vectors = unit(np.random.default_rng(seed).integers(-2, 3, (n, 3)).astype(np.float32) + 0.5)
    found = nearest_rows(vectors, vectors, list(range(n)), k)
    scores = vectors @ vectors.T
    for row, near in enumerate(found):
        others = [other for other in range(n) if other != row]
        assert near == sorted(others, key=lambda other: -scores[row, other])[:k]


@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
@pytest.mark.parametrize("index", ["flat", "hnsw", "ivf"])
def test_the_nearest_are_about_the_same(index, mode, embedder):
    retriever = Retriever.build(DOCUMENTS, tiny_tokenizer(), embedder=embedder, size=256, index=index, mode=mode)
    for chunk, near in zip(retriever.chunks, retriever.nearest(retriever.chunks, 2), strict=True):
        assert {other.document_id[:5] for other in near} == {chunk.document_id[:5]}
        assert chunk not in near


def test_equal_texts_are_one_and_what_has_gone_is_embedded(embedder):
    copies = [*DOCUMENTS, Document("copy", "copy", DOCUMENTS[0].text)]
    retriever = Retriever.build(copies, tiny_tokenizer(), embedder=embedder, size=256)
    found = retriever.nearest(retriever.chunks, 20)
    assert all(len({chunk.text for chunk in near}) == len(near) == len(DOCUMENTS) - 1 for near in found)
    assert found[0] == found[-1]
    [gone] = [chunk for chunk in retriever.chunks if chunk.document_id == "bread1"]
    before = retriever.nearest([gone], 3)
    retriever.delete("bread1")
    assert retriever.nearest([gone], 3) == before
    assert retriever.nearest([], 3) == []


def test_long_chunks_count_as_a_whole(embedder):
    long = Document("long", "long", " ".join(ABOUT["stars"].format(n) for n in range(40)) + " " + DOCUMENTS[0].text)
    retriever = Retriever.build([*DOCUMENTS, long], tiny_tokenizer(), embedder=embedder, size=5000)
    [near] = retriever.nearest([chunk for chunk in retriever.chunks if chunk.document_id == "long"], 3)
    assert {chunk.document_id[:5] for chunk in near} == {"stars"}


def test_an_empty_index_and_a_single_chunk_have_none(embedder):
    retriever = Retriever(tiny_tokenizer(), embedder=embedder)
    asked = [Chunk("a", 0, "A text.", 2)]
    assert retriever.nearest(asked, 3) == [[]]
    retriever.add(DOCUMENTS[:1])
    assert retriever.nearest(retriever.chunks, 3) == [[]]
    with pytest.raises(InputError, match="k = 0"):
        retriever.nearest(retriever.chunks, 0)


def test_a_saved_index_says_the_same(embedder, tmp_path):
    made = Retriever.build(DOCUMENTS, tiny_tokenizer(), embedder=embedder, size=256)
    made.save(tmp_path)
    loaded = Retriever.load(tmp_path, tiny_tokenizer(), embedder)
    assert loaded.nearest(loaded.chunks, 4) == made.nearest(made.chunks, 4)


def test_texts_are_compared_without_an_index():
    texts = [document.text for document in DOCUMENTS]
    found = nearest_texts(texts, texts[:3], 2)
    assert [{texts[place].split()[0] for place in near} for near in found] == [
        {text.split()[0]} for text in texts[:3]
    ]
