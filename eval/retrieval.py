"""Retrieval: how much of what supports an answer is found, how fast that is, and how fast documents are indexed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chunkcache.errors import DocumentError
from chunkcache.eval.measure import seconds_of, table
from chunkcache.eval.results import Results, Row
from chunkcache.retriever import Document, Embedder, Retriever, VectorIndex, split
from chunkcache.retriever.embedder import OnProgress
from chunkcache.retriever.index import Vectors
from chunkcache.retriever.keywords import Keywords, words

BENCH = "retrieval"
MODES = ("dense", "keyword", "hybrid")
KS = (5, 10)


@dataclass(frozen=True)
class Question:
    """A question, and what supports its answer.

    Attributes:
        text: the question.
        documents: titles or ids of the documents that support the answer, each once.
        context: documents that came with the question, as (title, text).
    """

    text: str
    documents: tuple[str, ...]
    context: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Setup:
    """How documents are indexed and searched.

    Attributes:
        ks: how many chunks are looked at.
        modes: search modes to compare.
        index: kind of the vector index.
        size: tokens of a chunk, at most.
        add_context: also index the documents that came with the questions and have titles that are not there yet.
    """

    ks: Sequence[int] = KS
    modes: Sequence[str] = MODES
    index: str = "auto"
    size: int = 512
    add_context: bool = False


def load_questions(path: str | Path) -> list[Question]:
    """Read questions of HotpotQA or 2WikiMultihopQA, or JSON Lines (or a list) of {"question", "documents": [ids]}.

    Raises:
        DocumentError: the file cannot be read, or a row has neither supporting facts nor documents.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        questions = [_question(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DocumentError(
            f"{path} holds no questions ({error!r}): give HotpotQA or 2WikiMultihopQA rows with supporting_facts, or "
            'rows of {"question", "documents": [ids]}'
        ) from error
    if not questions:
        raise DocumentError(f"{path} is empty: give a file with at least one question")
    return questions


def bench_retrieval(
    results: Results,
    documents: Sequence[Document],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    setup: Setup | None = None,
    embedder: Embedder | None = None,
    on_progress: OnProgress | None = None,
) -> Results:
    """Index documents, ask questions, and measure both.

    Only supporting documents that are in the corpus count, by title or id.

    Args:
        results: gets a row of `kind` index and one of `kind` search for each mode; all of them, or none if they are
            there. Of the index: `documents`, those `added` from the questions' context, `chunks`, `passages`
            (vectors), kind of `index`; `questions` that have a supporting document in the corpus, `questions_whole`
            that have all there, `questions_given`; their supporting documents `facts` and `facts_given`; and
            documents per second `split_per_s`, `embed_per_s` (cut to passages, too), `index_per_s` (vectors and
            keywords), `build_per_s` (all of it, by `Retriever.build`). Of a search, by k: `recall`, the mean share of
            a question's supporting documents that have a chunk among the best k, and `hits`, how many these are over
            all questions; and `query_ms`, the median with the query's embedding.
        documents: the corpus.
        questions: what is asked.
        tokenizer: bounds the chunks.
        setup: of index and searches.
        embedder: as in `Retriever.build`.
        on_progress: called with (passages embedded, passages in all).

    Raises:
        DocumentError: no question has a supporting document in the corpus.
    """
    setup = setup or Setup()
    if all(results.done(kind="search", mode=mode) for mode in setup.modes):
        return results
    corpus = [*documents, *(_context(documents, questions) if setup.add_context else ())]
    names = {name for document in corpus for name in (document.id, document.title)}
    wanted = [(question, {name for name in question.documents if name in names}) for question in questions]
    asked = [(question, facts) for question, facts in wanted if facts]
    if not asked:
        raise DocumentError(
            f"none of {len(questions)} questions is supported by the documents: give those it is about"
        )

    timed = _Timed(embedder or Embedder())
    split_s = sum(seconds_of(partial(split, document, tokenizer, size=setup.size)) for document in corpus)
    started = time.perf_counter()
    retriever = Retriever.build(
        corpus, tokenizer, embedder=timed, size=setup.size, index=setup.index, on_progress=on_progress
    )
    retriever.search(questions[0].text, mode="keyword")  # the keyword index is made at the first search
    build_s = time.perf_counter() - started
    embed_s, vectors = timed.seconds, timed.vectors
    index = VectorIndex(timed.dim, setup.index)
    index_s = seconds_of(lambda: index.add(np.arange(len(vectors)), vectors))
    index_s += seconds_of(lambda: Keywords([words(chunk.text) for chunk in retriever.chunks]))

    titles = {document.id: document.title for document in corpus}
    searches = [_search(retriever, mode, asked, setup.ks, titles) for mode in setup.modes]
    results.add(
        {
            "kind": "index",
            "documents": len(corpus),
            "added": len(corpus) - len(documents),
            "chunks": len(retriever.chunks),
            "passages": len(vectors),
            "index": index.kind,
            "questions": len(asked),
            "questions_whole": sum(len(facts) == len(question.documents) for question, facts in asked),
            "questions_given": len(questions),
            "facts": sum(len(facts) for _, facts in asked),
            "facts_given": sum(len(question.documents) for question in questions),
            "split_per_s": len(corpus) / split_s,
            "embed_per_s": len(corpus) / embed_s,
            "index_per_s": len(corpus) / index_s,
            "build_per_s": len(corpus) / build_s,
        }
    )
    for row in searches:
        results.add(row)
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return what was indexed, what each search found, the speed of precomputing if it was measured; and tables."""
    latest: dict[str, Row] = {str(row.get("mode", row["kind"])): row for row in results.rows}
    index, precompute = latest.pop("index"), latest.pop("precompute", None)
    searches = list(latest.values())
    speed = {
        "documents": "{documents}", "split": "{split_per_s:.0f}", "embedded": "{embed_per_s:.0f}",
        "indexed": "{index_per_s:.0f}", "all together": "{build_per_s:.0f}",
    }  # fmt: skip
    shown = [{**row, **{f"at_{k}": share for k, share in row["recall"].items()}} for row in searches]
    recalls = {f"recall@{k}": f"{{at_{k}:.3f}}" for k in searches[0]["recall"]} if searches else {}
    tables = [
        table(
            "{documents} documents, {chunks} chunks, {passages} vectors ({index}): a second".format_map(index),
            speed,
            [index],
        ),
        table(
            "{questions} of {questions_given} questions, {facts} of {facts_given} supporting documents are "
            "there".format_map(index),
            {"search": "{mode}", **recalls, "ms": "{query_ms:.1f}"},
            shown,
        ),
    ]
    if precompute is not None:
        rates = {"packed": precompute["packed_per_s"], "one by one": precompute["one_by_one_per_s"]}
        both = [
            {"way": way, "rate": rate, "both": 1 / (1 / rate + 1 / index["build_per_s"])}
            for way, rate in rates.items()
        ]
        title = "{documents} documents, {chunks} chunks, {tokens} tokens: documents a second".format_map(precompute)
        columns = {"chunks": "{way}", "precomputed": "{rate:.2f}", "with indexing": "{both:.2f}"}
        tables.append(table(title, columns, both))
    return {"index": index, "searches": searches, "precompute": precompute, "tables": tables, "plots": []}


def _search(
    retriever: Retriever,
    mode: str,
    asked: Sequence[tuple[Question, set[str]]],
    ks: Sequence[int],
    titles: dict[str, str],
) -> Row:
    hits: dict[int, list[int]] = {k: [] for k in ks}
    times = []
    for question, facts in asked:
        started = time.perf_counter()
        ranked = retriever.search(question.text, max(ks), mode=mode)
        times.append(time.perf_counter() - started)
        for k in ks:
            ids = {hit.chunk.document_id for hit in ranked[:k]}
            hits[k].append(len(facts & (ids | {titles[name] for name in ids})))
    sizes = [len(facts) for _, facts in asked]
    return {
        "kind": "search",
        "mode": mode,
        "recall": {k: statistics.mean(n / size for n, size in zip(hits[k], sizes, strict=True)) for k in ks},
        "hits": {k: sum(hits[k]) for k in ks},
        "query_ms": 1000 * statistics.median(times),
    }


class _Timed(Embedder):
    """An embedder that notes its seconds and its vectors."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self.name, self.dim = getattr(embedder, "name", ""), embedder.dim
        self.seconds = 0.0
        self.vectors: Vectors = np.empty((0, self.dim), np.float32)

    def passages(self, text: str) -> list[str]:
        started = time.perf_counter()
        try:
            return self._embedder.passages(text)
        finally:
            self.seconds += time.perf_counter() - started

    def embed(self, texts: Sequence[str], *, on_progress: OnProgress | None = None) -> Vectors:
        started = time.perf_counter()
        self.vectors = self._embedder.embed(texts, on_progress=on_progress)
        self.seconds += time.perf_counter() - started
        return self.vectors

    def embed_query(self, query: str) -> Vectors:
        return self._embedder.embed_query(query)


def _question(row: dict[str, Any]) -> Question:
    if "documents" in row:
        return Question(str(row["question"]), tuple(dict.fromkeys(map(str, row["documents"]))))
    titles = tuple(dict.fromkeys(title for title, _ in row["supporting_facts"]))
    context = tuple((title, " ".join(sentences)) for title, sentences in row.get("context", ()))
    return Question(str(row["question"]), titles, context)


def _context(documents: Sequence[Document], questions: Sequence[Question]) -> list[Document]:
    ids, titles = {document.id for document in documents}, {document.title for document in documents}
    texts: dict[str, str] = {}
    for question in questions:
        for title, text in question.context:
            if title not in titles and text.strip():
                texts.setdefault(title, text)
    added = []
    for title, text in texts.items():
        name = title
        while name in ids:
            name += "'"
        ids.add(name)
        added.append(Document(name, title, text))
    return added
