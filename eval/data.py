"""Data sets in, cases out: a question, its chunks and the accepted answers.

A file's format is told by the fields of its first row, not by its name:

    format      fields                      chunks
    CacheBlend  question, ctxs, answers     ctxs[].title and text
    HotpotQA    question, context, answer   paragraphs [title, [sentences]]; 2WikiMultihopQA too
    MuSiQue     question, paragraphs        paragraphs[].title and paragraph_text
    LongBench   input, context, answers     "Passage N:" sections
    MTRAG       input, contexts, targets    contexts[].text
    SQuAD       question, context, answers  the one context

A case of MTRAG (IBM mt-rag-benchmark), whose rows are turns of a conversation, asks the last user turn. What was said
before stands in front of it, a line for each turn: `user: ...` or `agent: ...`. What is marked as unanswerable has no
accepted answers. Questions over no context at all are in these data, too; `select` leaves them out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunkcache.errors import DocumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

MERGED_WORDS = 380  # short paragraphs are merged to chunks of about 512 tokens


@dataclass(frozen=True)
class Case:
    """One question over its chunks; `answers` are all accepted, and may be empty."""

    question: str
    chunks: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """All cases of one file."""

    path: Path
    cases: list[Case]

    def chunks(self) -> tuple[str, ...]:
        """Return the chunks of all cases, each once, in the order in which they first come."""
        return _distinct(self.cases)

    @classmethod
    def read(cls, path: str | Path, merge: bool = True) -> DataSet:
        """Read a JSON or JSON Lines file.

        Args:
            path: the file.
            merge: join the paragraphs of HotpotQA and MuSiQue to chunks of about 512 tokens; else each is a chunk.

        Raises:
            DocumentError: the file cannot be read or is in no known format.
        """
        rows = _read_rows(Path(path))
        reader = _reader(rows[0], path)
        cases = [reader(row) for row in rows]
        if merge and reader in (_hotpotqa, _musique):
            cases = [replace(case, chunks=_merge(case.chunks)) for case in cases]
        return cls(Path(path), cases)

    def select(
        self, chunks: int | None = None, limit: int | None = None, least: int = 1, fill: bool = False
    ) -> list[Case]:
        """Return cases with enough chunks.

        Args:
            chunks: use the first so many chunks of each case, and leave out cases that have fewer.
            limit: return at most so many cases.
            least: leave out cases that have fewer chunks than this.
            fill: give cases that have fewer than `chunks` some of other cases, at random places (always the same);
                not to cases that have none of their own.

        Raises:
            DocumentError: no case has enough chunks.
        """
        cases = self.cases if chunks is None or not fill else _filled_up(self.cases, chunks, self.chunks())
        cases = [case for case in cases if len(case.chunks) >= max(least, chunks or 0)][:limit]
        if not cases:
            raise DocumentError(f"no case of {self.path} has {chunks or least} chunks; ask for fewer")
        return [replace(case, chunks=case.chunks[:chunks]) for case in cases]


def load_cases(
    path: str | Path,
    chunks: int | None = None,
    limit: int | None = None,
    least: int = 1,
    merge: bool = True,
    fill: bool = False,
) -> list[Case]:
    """Read the cases of a JSON or JSON Lines file: `DataSet.read` and `DataSet.select`."""
    return DataSet.read(path, merge).select(chunks, limit, least, fill)


def _distinct(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chunk for case in cases for chunk in case.chunks))


def _filled_up(cases: Iterable[Case], chunks: int, pool: Sequence[str]) -> list[Case]:
    """Return the cases that have chunks, with at least so many each, where there are enough in the pool."""
    found = []
    for case in cases:
        if not case.chunks:
            continue
        draw = random.Random(case.question)
        others = [chunk for chunk in draw.sample(pool, min(len(pool), 2 * chunks)) if chunk not in case.chunks]
        mixed = [*case.chunks, *others[: max(0, chunks - len(case.chunks))]]
        if len(mixed) > len(case.chunks):
            draw.shuffle(mixed)
        found.append(replace(case, chunks=tuple(mixed)))
    return found


def _read_rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = (line for line in text.split("\n") if line.strip())
        data = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
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
    if {"input", "contexts", "targets"} <= fields:
        return _mtrag
    if {"question", "context"} <= fields:
        return _hotpotqa if isinstance(row["context"], list) else _squad
    raise DocumentError(
        f"{path} is in no known format: its rows have the fields {', '.join(sorted(fields))}; the known formats are "
        "CacheBlend, HotpotQA/2WikiMultihopQA, MuSiQue, LongBench, MTRAG and SQuAD"
    )


def _cacheblend(row: Row) -> Case:
    texts = (f"{ctx['title']}\n{ctx['text']}".strip() for ctx in row["ctxs"])
    return Case(row["question"], tuple(texts), tuple(row["answers"]))


def _hotpotqa(row: Row) -> Case:
    paragraphs = (f"{title}\n{' '.join(sentences)}" for title, sentences in row["context"])
    return Case(row["question"], tuple(paragraphs), (row["answer"],))


def _musique(row: Row) -> Case:
    paragraphs = (f"{p['title']}\n{p['paragraph_text']}" for p in row["paragraphs"])
    return Case(row["question"], tuple(paragraphs), (row["answer"], *row.get("answer_aliases", ())))


def _longbench(row: Row) -> Case:
    passages = re.split(r"(?m)^Passage \d+:\n", row["context"])
    question = row["input"] or "Write a summary of all the passages."
    return Case(question, tuple(p.strip() for p in passages if p.strip()), tuple(row["answers"]))


def _mtrag(row: Row) -> Case:
    *before, last = row["input"]
    lines = [f"{turn['speaker']}: {turn['text']}" for turn in before]
    answerable = "UNANSWERABLE" not in (row.get("answerability") or row.get("Answerability") or ())
    answers = (target["text"] for target in row["targets"] if answerable and target["text"].strip())
    chunks = (context["text"].strip() for context in row["contexts"])
    return Case("\n".join([*lines, last["text"]]), tuple(filter(None, chunks)), tuple(answers))


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


def prompts_of_lengths(
    cases: Sequence[Case], lengths: Sequence[int], repeats: int, tokenizer: PreTrainedTokenizerBase
) -> list[Case]:
    """Make prompts of given lengths out of the chunks of many cases.

    Args:
        cases: their chunks are used in turn, each in one prompt at most until all have been; the questions as well.
        lengths: of the chunks of a prompt together, in tokens; the last chunk is cut to fit.
        repeats: prompts of each length.
        tokenizer: counts.
    """
    wanted = [length for length in lengths for _ in range(repeats)]
    random.Random(0).shuffle(wanted)  # so that a drift of the machine is no growth
    pool = cycle(_distinct(cases))
    questions = cycle(case.question for case in cases)
    return [Case(next(questions), _filled(pool, length, tokenizer)) for length in wanted]


def cut(cases: Sequence[Case], chunk_tokens: int | None, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    """Return the cases with their chunks cut to so many tokens; None leaves them as they are."""
    if chunk_tokens is None:
        return list(cases)
    return [
        replace(case, chunks=tuple(_filled(iter([chunk]), chunk_tokens, tokenizer)[0] for chunk in case.chunks))
        for case in cases
    ]


def tokens_in(case: Case, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the chunks of a case have together."""
    return sum(len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in case.chunks)


def _filled(pool: Iterator[str], length: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    chunks: list[str] = []
    while length > 0 and (text := next(pool, None)) is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        chunks.append(str(tokenizer.decode(ids)))
        length -= len(ids)
    return tuple(chunks)


def checksum(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files, which tells one data set from another."""
    found = hashlib.sha256()
    for each in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
        if each.is_file():
            found.update(each.read_bytes())
    return found.hexdigest()
