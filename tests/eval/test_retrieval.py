"""The retrieval benchmark: questions of each format, and recall that counts what it says."""

from __future__ import annotations

import json

import pytest
from support.tokenizer import tiny_tokenizer

from chunkcache.errors import DocumentError
from chunkcache.eval.retrieval import Question, bench_retrieval, load_questions
from chunkcache.retriever import Document, Embedder

FERRY, BREAD, COMET = (
    "The ferry sails to the islands.",
    "Knead flour and bake the loaf.",
    "The comet was seen in 1811.",
)
DOCUMENTS = [Document("a.md", "Ferry", FERRY), Document("b.md", "Bread", BREAD)]
HOTPOT = {
    "question": "When was the comet seen?",
    "supporting_facts": [["Comet", 0], ["Comet", 1], ["Ferry", 0]],
    "context": [["Comet", ["The comet was seen", "in 1811."]], ["Ferry", ["Another text."]]],
}
OURS = {"question": "How is bread made?", "documents": ["b.md", "b.md"]}


@pytest.fixture(scope="module")
def embedder():
    return Embedder()


def bench(questions, embedder, **options):
    return bench_retrieval(DOCUMENTS, questions, tiny_tokenizer(), ks=(1, 2), embedder=embedder, **options)


@pytest.mark.parametrize("lines", [True, False])
def test_both_formats_are_read(tmp_path, lines):
    rows = [HOTPOT, OURS]
    path = tmp_path / "q"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    assert load_questions(path) == [
        Question("When was the comet seen?", ("Comet", "Ferry"), (("Comet", COMET), ("Ferry", "Another text."))),
        Question("How is bread made?", ("b.md",)),
    ]


@pytest.mark.parametrize("text", ["{", "[]", "", "[1]", '[{"question": "q"}]', '{"documents": ["a"]}'])
def test_what_is_no_list_of_questions_is_refused(tmp_path, text):
    (tmp_path / "q").write_text(text)
    with pytest.raises(DocumentError, match="give"):
        load_questions(tmp_path / "q")
    with pytest.raises(DocumentError, match="nowhere"):
        load_questions(tmp_path / "nowhere")


def test_only_facts_that_are_in_the_corpus_count(embedder):
    questions = [
        Question("How is bread baked?", ("b.md",)),
        Question("Where does the ferry sail to?", ("Bread", "Comet")),  # the ferry comes first, the bread second
        Question("When was the comet seen?", ("Comet",)),
    ]
    found = bench(questions, embedder)
    assert (found.questions, found.questions_whole, found.questions_given) == (2, 1, 3)
    assert (found.facts, found.facts_given) == (2, 4)
    assert (found.documents, found.added, found.chunks, found.passages, found.index) == (2, 0, 2, 2, "flat")
    dense = found.modes[0]
    assert (dense.mode, dense.recall, dense.found) == ("dense", {1: 0.5, 2: 1.0}, {1: 1, 2: 2})
    assert [mode.mode for mode in found.modes] == ["dense", "keyword", "hybrid"]
    assert min(found.split_per_s, found.embed_per_s, found.index_per_s, found.build_per_s, dense.query_ms) > 0
    assert json.loads(json.dumps(found.as_dict()))["modes"][0]["recall"] == {"1": 0.5, "2": 1.0}


def test_the_questions_own_context_is_added_where_titles_are_missing(tmp_path, embedder):
    (tmp_path / "q").write_text(json.dumps([HOTPOT]))
    questions = load_questions(tmp_path / "q")
    seen = []
    found = bench(questions, embedder, add_context=True, modes=["keyword"], on_progress=lambda *at: seen.append(at))
    assert (found.documents, found.added, found.facts, found.facts_given) == (3, 1, 2, 2)
    assert found.modes[0].recall == {1: 0.5, 2: 1.0}
    assert seen[-1] == (3, 3)
    assert bench(questions, embedder).facts == 1


def test_questions_about_other_documents_are_refused(embedder):
    with pytest.raises(DocumentError, match="none of 1 questions is supported"):
        bench([Question("Who?", ("Nobody",))], embedder)
