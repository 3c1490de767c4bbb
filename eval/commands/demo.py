"""`chunkcache demo`: the main job on the example documents, and a comparison of policies on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.markup import escape

from chunkcache.cli.console import err, progress
from chunkcache.cli.inputs import answer, indexed
from chunkcache.defaults import DEFAULT_POLICY
from chunkcache.eval.commands.inputs import EXAMPLES, draw_questions
from chunkcache.eval.commands.options import AsJson, ModelOptions, command, count, option
from chunkcache.eval.commands.requests import COMPARED
from chunkcache.eval.commands.show import show_json, show_report


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Questions over example documents."""

    docs: Annotated[Path | None, option(help="Documents; the packaged ones by default.")] = None
    questions: Annotated[Path | None, option(help="JSON Lines with question and answers; the packaged ones by "
                                             "default.")] = None  # fmt: skip
    count: Annotated[int, count("Questions to ask.")] = 4
    seed: Annotated[int, option(help="Which questions are drawn.")] = 1
    model: ModelOptions
    top_k: Annotated[int, count("Chunks per prompt.")] = 4
    chunk_tokens: Annotated[int, count("Length of a chunk at most.", least=32)] = 256
    policy: Annotated[str, option(help="The policy that answers.")] = DEFAULT_POLICY
    as_json: AsJson = False


@command("demo")
def demo(options: DemoOptions) -> None:
    """Answer questions over the example documents, then compare policies on the same prompts."""
    from chunkcache.blend import parse_policy
    from chunkcache.eval import Case, Comparison, compare
    from chunkcache.eval.report import build_report
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents

    policy = parse_policy(options.policy)
    rows = draw_questions(options.questions or EXAMPLES / "questions.jsonl", options.count, options.seed)
    documents = load_documents(options.docs or EXAMPLES / "corpus")
    model, tokenizer = options.model.load()
    retriever = indexed(documents, tokenizer, options.chunk_tokens)
    hits = [retriever.search(row["question"], options.top_k) for row in rows]
    cases = [
        Case(row["question"], tuple(hit.chunk.text for hit in found)) for row, found in zip(rows, hits, strict=True)
    ]
    llm = wrap(model, tokenizer, store="memory://?max_bytes=2GiB", policy=policy)
    with progress("precomputing chunks") as on_progress:
        llm.precompute([text for case in cases for text in case.chunks], on_progress=on_progress)
    answers = []
    for row, case, found in zip(rows, cases, hits, strict=True):
        begin = partial(llm.stream, case.question, case.chunks, max_new_tokens=48)
        answers.append(answer(case.question, found, begin, quiet=options.as_json))
        if not options.as_json:
            full = llm.generate(case.question, case.chunks, policy="full", max_new_tokens=48)
            err.print(f"  [dim]full prefill, first token after {full.ttft_s:.2f} s: {escape(full.text)}[/]")
            err.print(f"  [dim]expected: {escape(' / '.join(row['answers']))}[/]\n")
    comparison = Comparison(list(dict.fromkeys((*COMPARED, options.policy))))
    about = {"data": "example documents", "chunks": options.top_k, "tokens": None}
    with progress("comparing policies") as on_prompt:
        compared = {"demo": compare(model, tokenizer, cases, comparison, about=about, on_prompt=on_prompt)}
    if options.as_json:
        show_json({"answers": answers, "comparison": build_report(compared)})
    else:
        show_report(compared)
