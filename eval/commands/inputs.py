"""Prompts of a data set, and questions over a corpus, as several commands read them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

import chunkcache
from chunkcache.cli.console import err
from chunkcache.errors import DocumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chunkcache.eval import Case
    from chunkcache.eval.data import DataSet
    from chunkcache.retriever import Retriever

EXAMPLES = Path(chunkcache.__file__).parent / "examples"


def read_cases(
    data: Path | DataSet, chunks: int, prompts: int, skip: int, fill: bool = False, quiet: bool = False
) -> list[Case]:
    """Return so many prompts of a data set behind the first `skip`; `chunks` of each, or with 0 all, two or more."""
    from chunkcache.eval.data import DataSet

    source = data if isinstance(data, DataSet) else DataSet.read(data)
    cases = source.select(chunks or None, skip + prompts, least=chunks or 2, fill=fill)[skip:]
    if not cases:
        raise DocumentError(f"{source.path} has no prompts after the first {skip}; lower --skip")
    if len(cases) < prompts and not quiet:
        err.print(f"[yellow]only {len(cases)} prompts of {escape(str(source.path))} can be used, not {prompts}[/]")
    return cases


def cut_with_all(
    source: DataSet, cases: Sequence[Case], chunk_tokens: int | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Case], list[str]]:
    """Return cases, and all chunks of their data set, with chunks cut to so many tokens; None leaves them whole."""
    from chunkcache.eval.data import Case, cut

    *shortened, everything = cut([*cases, Case("", source.chunks())], chunk_tokens, tokenizer)
    return shortened, list(everything.chunks)


def about(data: Path) -> dict[str, Any]:
    """Return the settings that tell one data file from others."""
    from chunkcache.eval.data import checksum

    return {"data": data.stem, "data_sha256": checksum(data)}


def retrieved_cases(retriever: Retriever, questions: Iterable[dict[str, Any]], chunks: int) -> list[Case]:
    """Return questions, as `draw_questions` returns them, with the chunks that are found for each."""
    from chunkcache.eval import Case

    cases = []
    for row in questions:
        texts = tuple(hit.chunk.text for hit in retriever.search(row["question"], chunks))
        cases.append(Case(row["question"], texts, tuple(row["answers"])))
    return cases


def draw_questions(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Draw questions, each with its accepted answers, from a file of JSON Lines."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [{"question": str(row["question"]), "answers": list(row.get("answers", ()))} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is not JSON Lines with a question in each: {error!r}") from None
    return random.Random(seed).sample(rows, min(count, len(rows)))
