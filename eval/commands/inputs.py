"""What several commands read first: a data set, questions over a corpus."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

import chunkcache
from chunkcache.cli.console import err, progress
from chunkcache.errors import DocumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chunkcache.eval import Case


EXAMPLES = Path(chunkcache.__file__).parent / "examples"


def read_cases(
    data: Path, chunks: int, prompts: int, skip: int, fill: bool = False, quiet: bool = False
) -> list[Case]:
    from chunkcache.eval.data import load_cases

    cases = load_cases(data, chunks or None, skip + prompts, least=chunks or 2, fill=fill)[skip:]
    if not cases:
        raise DocumentError(f"{data} has no prompts after the first {skip}; lower --skip")
    if len(cases) < prompts and not quiet:
        err.print(f"[yellow]only {len(cases)} prompts of {escape(str(data))} can be used, not {prompts}[/]")
    return cases


def retrieved_cases(
    corpus: Path,
    questions: Path,
    chunks: int,
    chunk_tokens: int,
    prompts: int,
    skip: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Case]:
    """Return questions with the chunks of a corpus that are found for them."""
    from chunkcache.eval import Case
    from chunkcache.retriever import Retriever, load_documents

    with progress("indexing documents") as on_progress:
        retriever = Retriever.build(load_documents(corpus), tokenizer, size=chunk_tokens, on_progress=on_progress)
    asked = draw_questions(questions, skip + prompts, 0)[skip:]
    found = [(row, retriever.search(row["question"], chunks)) for row in asked]
    return [
        Case(row["question"], tuple(hit.chunk.text for hit in hits), tuple(row["answers"])) for row, hits in found
    ]


def draw_questions(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [{"question": str(row["question"]), "answers": list(row.get("answers", ()))} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is not JSON Lines with a question in each: {error!r}") from None
    return random.Random(seed).sample(rows, min(count, len(rows)))
