"""Data sets in, cases out: a question, its chunks and the accepted answers.

A file's format is told by the fields of its first row, not by its name:

    format      fields                      chunks
    CacheBlend  question, ctxs, answers     ctxs[].title and text
    HotpotQA    question, context, answer   paragraphs [title, [sentences]], merged; 2WikiMultihopQA too
    MuSiQue     question, paragraphs        paragraphs[].title and paragraph_text, merged
    LongBench   input, context, answers     "Passage N:" sections
    SQuAD       question, context, answers  the one context
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunkcache.errors import DocumentError

Row = dict[str, Any]

MERGED_WORDS = 380  # short paragraphs are merged to chunks of about 512 tokens


@dataclass(frozen=True)
class Case:
    """One question over its chunks; `answers` are all accepted, and may be empty."""

    question: str
    chunks: tuple[str, ...]
    answers: tuple[str, ...] = ()


def load_cases(path: str | Path, chunks: int | None = None, limit: int | None = None, least: int = 1) -> list[Case]:
    """Read the cases of a JSON or JSON Lines file.

    Args:
        path: the file.
        chunks: use the first so many chunks of each case, and leave out cases that have fewer.
        limit: return at most so many cases.
        least: leave out cases that have fewer chunks than this.

    Raises:
        DocumentError: the file cannot be read, is in no known format, or no case has enough chunks.
    """
    rows = _read_rows(Path(path))
    reader = _reader(rows[0], path)
    cases = []
    for row in rows:
        case = reader(row)
        if len(case.chunks) < max(least, chunks or 0):
            continue
        if chunks is not None:
            case = Case(case.question, case.chunks[:chunks], case.answers)
        cases.append(case)
        if limit is not None and len(cases) == limit:
            break
    if not cases:
        raise DocumentError(f"no case of {path} has {chunks or least} chunks; ask for fewer")
    return cases


def _read_rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DocumentError(f"{path} cannot be read as JSON or JSON Lines: {error}") from None
    if not data or not isinstance(data[0], dict):
        raise DocumentError(f"{path} holds no rows; a data set is a list of objects, or one object a line")
    return data


def _reader(row: Row, path: str | Path) -> Callable[[Row], Case]:
    fields = row.keys()
    if {"question", "ctxs"} <= fields:
        return _cacheblend
    if {"question", "paragraphs"} <= fields:
        return _musique
    if {"input", "context", "answers"} <= fields:
        return _longbench
    if {"question", "context"} <= fields:
        return _hotpotqa if isinstance(row["context"], list) else _squad
    raise DocumentError(
        f"{path} is in no known format: its rows have the fields {', '.join(sorted(fields))}; the known formats are "
        "CacheBlend, HotpotQA/2WikiMultihopQA, MuSiQue, LongBench and SQuAD"
    )


def _cacheblend(row: Row) -> Case:
    texts = (f"{ctx['title']}\n{ctx['text']}".strip() for ctx in row["ctxs"])
    return Case(row["question"], tuple(texts), tuple(row["answers"]))


def _hotpotqa(row: Row) -> Case:
    paragraphs = (f"{title}\n{' '.join(sentences)}" for title, sentences in row["context"])
    return Case(row["question"], _merge(paragraphs), (row["answer"],))


def _musique(row: Row) -> Case:
    paragraphs = (f"{p['title']}\n{p['paragraph_text']}" for p in row["paragraphs"])
    return Case(row["question"], _merge(paragraphs), (row["answer"], *row.get("answer_aliases", ())))


def _longbench(row: Row) -> Case:
    passages = re.split(r"(?m)^Passage \d+:\n", row["context"])
    question = row["input"] or "Write a summary of all the passages."
    return Case(question, tuple(p.strip() for p in passages if p.strip()), tuple(row["answers"]))


def _squad(row: Row) -> Case:
    answers = row.get("answers", {})
    return Case(row["question"], (row["context"],), tuple(dict.fromkeys(answers.get("text", ()))))


def _merge(paragraphs: Iterable[str]) -> tuple[str, ...]:
    """Join short paragraphs, in order, to chunks of about `MERGED_WORDS` words."""
    chunks: list[list[str]] = [[]]
    words = 0
    for paragraph in paragraphs:
        size = len(paragraph.split())
        if words and words + size > MERGED_WORDS:
            chunks.append([])
            words = 0
        chunks[-1].append(paragraph)
        words += size
    return tuple("\n\n".join(chunk) for chunk in chunks)
