"""`chunkcache demo`: the main job on the example documents, and a comparison of policies on the same prompts."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.markup import escape

from chunkcache.cli.console import err, progress
from chunkcache.cli.inputs import answer, indexed, load
from chunkcache.cli.options import json_option, model_options, retrieval_options
from chunkcache.eval.commands.inputs import EXAMPLES, draw_questions
from chunkcache.eval.commands.requests import COMPARED, show


@click.command()
@click.option("--docs", type=click.Path(path_type=Path), help="Documents; the packaged ones by default.")
@click.option(
    "--questions",
    "questions_file",
    type=click.Path(path_type=Path),
    help="JSON Lines with question and answers; the packaged ones by default.",
)
@click.option("--count", default=4, show_default=True, type=click.IntRange(1), help="Questions to ask.")
@click.option("--seed", default=1, show_default=True, help="Which questions are drawn.")
@model_options
@retrieval_options
@click.option("--policy", default="query", show_default=True, help="The policy that answers.")
@json_option
def demo(
    docs: Path | None,
    questions_file: Path | None,
    count: int,
    seed: int,
    model_name: str,
    device: str | None,
    dtype: str,
    top_k: int,
    chunk_tokens: int,
    policy: str,
    as_json: bool,
) -> None:
    """Answer questions over the example documents, then compare policies on the same prompts."""
    from chunkcache.blend import parse_policy
    from chunkcache.eval import Case, compare
    from chunkcache.eval.report import build_report
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents

    chosen = parse_policy(policy)
    asked = draw_questions(questions_file or EXAMPLES / "questions.jsonl", count, seed)
    documents = load_documents(docs or EXAMPLES / "corpus")
    model, tokenizer = load(model_name, device, dtype)
    retriever = indexed(documents, tokenizer, chunk_tokens)
    found = [retriever.search(row["question"], top_k) for row in asked]
    llm = wrap(model, tokenizer, store="memory://?max_bytes=2GiB", policy=chosen)
    with progress("precomputing chunks") as on_progress:
        llm.precompute([hit.chunk.text for hits in found for hit in hits], on_progress=on_progress)
    answers = []
    for row, hits in zip(asked, found, strict=True):
        chunks = [hit.chunk.text for hit in hits]
        answers.append(answer(llm, row["question"], hits, chunks, None, 48, quiet=as_json))
        if not as_json:
            full = llm.generate(row["question"], chunks, policy="full", max_new_tokens=48)
            err.print(f"  [dim]full prefill, first token after {full.ttft_s:.2f} s: {escape(full.text)}[/]")
            err.print(f"  [dim]expected: {escape(' / '.join(row['answers']))}[/]\n")
    cases = [
        Case(row["question"], tuple(hit.chunk.text for hit in hits)) for row, hits in zip(asked, found, strict=True)
    ]
    policies = list(dict.fromkeys((*COMPARED, policy)))
    about = {"data": "example documents", "chunks": top_k, "tokens": None}
    with progress("comparing policies") as on_prompt:
        compared = {"demo": compare(model, tokenizer, cases, policies, about, on_prompt=on_prompt)}
    if as_json:
        click.echo(json.dumps({"answers": answers, "comparison": build_report(compared)}, indent=2))
    else:
        show(compared)
