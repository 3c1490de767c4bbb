"""Retrieval: how much of what supports an answer is found, how fast that is, and how fast documents are indexed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chunkcache.errors import DocumentError
from chunkcache.retriever import Document, Embedder, Retriever, VectorIndex, split
from chunkcache.retriever.embedder import OnProgress
from chunkcache.retriever.index import Vectors
from chunkcache.retriever.keywords import Keywords, words

MODES = ("dense", "keyword", "hybrid")


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
class ModeResult:
    """What one search mode found.

    Attributes:
        mode: the mode.
        recall: by k, the share of a question's supporting documents that have a chunk among the best k, averaged over
            the questions.
        found: by k, how many supporting documents were found, over all questions.
        query_ms: median milliseconds of a search, the embedding of the query included.
    """

    mode: str
    recall: dict[int, float]
    found: dict[int, int]
    query_ms: float


@dataclass(frozen=True)
class RetrievalBench:
    """Recall and speed over one corpus.

    Attributes:
        documents: documents indexed.
        added: of these, such as came from the questions' own context.
        chunks: their chunks.
        passages: vectors of these.
        index: kind of the vector index.
        questions: questions that count: at least one of their supporting documents is in the corpus.
        questions_whole: of these, such as have all of them there.
        questions_given: all questions.
        facts: supporting documents that are in the corpus, over all questions.
        facts_given: all of them.
        split_per_s: documents split in a second.
        embed_per_s: documents whose chunks are cut to passages and embedded in a second.
        index_per_s: documents entered in the vector and the keyword index in a second.
        build_per_s: documents a second, all of it together, as `Retriever.build` does it.
        modes: what each mode found.
    """

    documents: int
    added: int
    chunks: int
    passages: int
    index: str
    questions: int
    questions_whole: int
    questions_given: int
    facts: int
    facts_given: int
    split_per_s: float
    embed_per_s: float
    index_per_s: float
    build_per_s: float
    modes: tuple[ModeResult, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        return asdict(self)


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
    documents: Sequence[Document],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    ks: Sequence[int] = (5, 10),
    modes: Sequence[str] = MODES,
    embedder: Embedder | None = None,
    index: str = "auto",
    size: int = 512,
    add_context: bool = False,
    on_progress: OnProgress | None = None,
) -> RetrievalBench:
    """Index documents, ask questions, and measure both.

    Only supporting documents that are in the corpus count, by title or id.

    Args:
        documents: the corpus.
        questions: what is asked.
        tokenizer: bounds the chunks.
        ks: how many chunks are looked at.
        modes: search modes to compare.
        embedder: as in `Retriever.build`.
        index: kind of the vector index.
        size: tokens of a chunk, at most.
        add_context: also index the documents that came with the questions and have titles that are not there yet.
        on_progress: called with (passages embedded, passages in all).

    Raises:
        DocumentError: no question has a supporting document in the corpus.
    """
    corpus = [*documents, *(_context(documents, questions) if add_context else ())]
    names = {name for document in corpus for name in (document.id, document.title)}
    wanted = [(question, {name for name in question.documents if name in names}) for question in questions]
    asked = [(question, facts) for question, facts in wanted if facts]
    if not asked:
        raise DocumentError(
            f"none of {len(questions)} questions is supported by the documents: give those it is about"
        )

    timed = _Timed(embedder or Embedder())
    split_s = sum(_seconds(split, document, tokenizer, size=size) for document in corpus)
    started = time.perf_counter()
    retriever = Retriever.build(corpus, tokenizer, embedder=timed, size=size, index=index, on_progress=on_progress)
    retriever.search(questions[0].text, mode="keyword")  # the keyword index is made at the first search
    build_s = time.perf_counter() - started
    embed_s, vectors = timed.seconds, timed.vectors
    kind = VectorIndex(timed.dim, index)
    index_s = _seconds(kind.add, np.arange(len(vectors)), vectors)
    index_s += _seconds(lambda: Keywords([words(chunk.text) for chunk in retriever.chunks]))

    titles = {document.id: document.title for document in corpus}
    return RetrievalBench(
        documents=len(corpus),
        added=len(corpus) - len(documents),
        chunks=len(retriever.chunks),
        passages=len(vectors),
        index=kind.kind,
        questions=len(asked),
        questions_whole=sum(len(facts) == len(question.documents) for question, facts in asked),
        questions_given=len(questions),
        facts=sum(len(facts) for _, facts in asked),
        facts_given=sum(len(question.documents) for question in questions),
        split_per_s=len(corpus) / split_s,
        embed_per_s=len(corpus) / embed_s,
        index_per_s=len(corpus) / index_s,
        build_per_s=len(corpus) / build_s,
        modes=tuple(_ask(retriever, mode, asked, ks, titles) for mode in modes),
    )


def _ask(
    retriever: Retriever,
    mode: str,
    asked: Sequence[tuple[Question, set[str]]],
    ks: Sequence[int],
    titles: dict[str, str],
) -> ModeResult:
    found: dict[int, list[int]] = {k: [] for k in ks}
    times = []
    for question, facts in asked:
        started = time.perf_counter()
        hits = retriever.search(question.text, max(ks), mode=mode)
        times.append(time.perf_counter() - started)
        for k in ks:
            ids = {hit.chunk.document_id for hit in hits[:k]}
            found[k].append(len(facts & (ids | {titles[name] for name in ids})))
    sizes = [len(facts) for _, facts in asked]
    return ModeResult(
        mode=mode,
        recall={k: statistics.mean(n / size for n, size in zip(found[k], sizes, strict=True)) for k in ks},
        found={k: sum(found[k]) for k in ks},
        query_ms=1000 * statistics.median(times),
    )


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
    found: dict[str, str] = {}
    for question in questions:
        for title, text in question.context:
            if title not in titles and text.strip():
                found.setdefault(title, text)
    added = []
    for title, text in found.items():
        name = title
        while name in ids:
            name += "'"
        ids.add(name)
        added.append(Document(name, title, text))
    return added


def _seconds(work: Any, *args: Any, **options: Any) -> float:
    started = time.perf_counter()
    work(*args, **options)
    return time.perf_counter() - started
