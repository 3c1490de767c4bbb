"""The retrieval benchmark: questions of each format, and recall that counts what it says."""

from __future__ import annotations

import json

import pytest
from helpers_tokenizer import tiny_tokenizer

from chunkcache.errors import DocumentError
from chunkcache.eval import Results
from chunkcache.eval.retrieval import BENCH, Question, Setup, bench_retrieval, load_questions, summary
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


def bench(questions, embedder, on_progress=None, **options):
    """Return the rows of the index and of the searches."""
    results, setup = Results(BENCH, {}, {}), Setup(ks=(1, 2), **options)
    bench_retrieval(results, DOCUMENTS, questions, tiny_tokenizer(), setup, embedder, on_progress)
    sums = summary(results)
    return sums["index"], sums["searches"]


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
    index, searches = bench(questions, embedder)
    assert [index[name] for name in ("questions", "questions_whole", "questions_given")] == [2, 1, 3]
    assert (index["facts"], index["facts_given"]) == (2, 4)
    assert [index[name] for name in ("documents", "added", "chunks", "passages", "index")] == [2, 0, 2, 2, "flat"]
    dense = searches[0]
    assert (dense["mode"], dense["recall"], dense["hits"]) == ("dense", {"1": 0.5, "2": 1.0}, {"1": 1, "2": 2})
    assert [search["mode"] for search in searches] == ["dense", "keyword", "hybrid"]
    assert min(dense["query_ms"], *(index[f"{step}_per_s"] for step in ("split", "embed", "index", "build"))) > 0


def test_it_goes_on_with_the_searches_that_are_missing(embedder):
    results, questions = Results(BENCH, {}, {}), [Question("How is bread baked?", ("b.md",))]
    measure = (results, DOCUMENTS, questions, tiny_tokenizer(), Setup(), embedder)
    bench_retrieval(*measure)
    assert [row["kind"] for row in bench_retrieval(*measure).rows] == ["index", *["search"] * 3]
    del results.rows[2:]
    sums = summary(bench_retrieval(*measure))
    assert [search["mode"] for search in sums["searches"]] == ["dense", "keyword", "hybrid"]
    speed, searches = sums["tables"]
    assert [row[0] for row in searches["rows"]] == ["dense", "keyword", "hybrid"]
    assert searches["columns"] == ["search", "recall@5", "recall@10", "ms"]
    assert speed["rows"][0][0] == "2"


def test_the_questions_own_context_is_added_where_titles_are_missing(tmp_path, embedder):
    (tmp_path / "q").write_text(json.dumps([HOTPOT]))
    questions = load_questions(tmp_path / "q")
    seen = []
    index, [search] = bench(questions, embedder, lambda *at: seen.append(at), add_context=True, modes=["keyword"])
    assert [index[name] for name in ("documents", "added", "facts", "facts_given")] == [3, 1, 2, 2]
    assert search["recall"] == {"1": 0.5, "2": 1.0}
    assert seen[-1] == (3, 3)
    assert bench(questions, embedder)[0]["facts"] == 1


def test_questions_about_other_documents_are_refused(embedder):
    with pytest.raises(DocumentError, match="none of 1 questions is supported"):
        bench([Question("Who?", ("Nobody",))], embedder)
