"""The `chunkcache bench` commands round retrieval: what is found, in which order, what hints help, and LangChain."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from chunkcache.cli.console import err, progress, table, wide
from chunkcache.cli.inputs import load
from chunkcache.cli.options import chunk_tokens_option, data_options, json_file_option, model_options, policy_option
from chunkcache.errors import InputError
from chunkcache.eval.commands.inputs import read_cases


@click.command("retrieval")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("--add-context", is_flag=True, help="Add the questions' own paragraphs that the corpus lacks.")
@click.option(
    "--precompute",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Documents of which the KV are computed as well, packed and one by one.",
)
@chunk_tokens_option
@model_options
@json_file_option
def bench_retrieval(
    corpus: Path,
    questions: Path,
    add_context: bool,
    precompute: int,
    chunk_tokens: int,
    model_name: str,
    device: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Measure how much of what supports the answers to QUESTIONS is found in CORPUS, and how fast it is indexed."""
    from chunkcache.eval.packing import precompute_speed
    from chunkcache.eval.retrieval import bench_retrieval as run
    from chunkcache.eval.retrieval import load_questions
    from chunkcache.retriever import load_documents

    asked, documents = load_questions(questions), load_documents(corpus)
    model, tokenizer = load(model_name, device, dtype)
    with progress("embedding passages") as on_progress:
        found = run(documents, asked, tokenizer, size=chunk_tokens, add_context=add_context, on_progress=on_progress)
    speed = [f"{value:.0f}" for value in (found.split_per_s, found.embed_per_s, found.index_per_s, found.build_per_s)]
    title = f"{found.documents} documents, {found.chunks} chunks, {found.passages} vectors ({found.index}): a second"
    wide(table(title, ["documents", "split", "embedded", "indexed", "all together"], [["", *speed]]))
    rows = [
        [each.mode, *(f"{share:.3f}" for share in each.recall.values()), f"{each.query_ms:.1f}"]
        for each in found.modes
    ]
    title = (
        f"{found.questions} of {found.questions_given} questions, {found.facts} of {found.facts_given} supporting "
        "documents are there"
    )
    wide(table(title, ["search", *(f"recall@{k}" for k in found.modes[0].recall), "ms"], rows))
    results = found.as_dict()
    if precompute:
        with progress("precomputing chunks") as on_round:
            speeds = precompute_speed(model, tokenizer, documents[:precompute], chunk_tokens, on_round)
        results["precompute"] = asdict(speeds)
        rows = [
            [way, f"{rate:.2f}", f"{1 / (1 / rate + 1 / found.build_per_s):.2f}"]
            for way, rate in (("packed", speeds.packed_per_s), ("one by one", speeds.one_by_one_per_s))
        ]
        title = f"{speeds.documents} documents, {speeds.chunks} chunks, {speeds.tokens} tokens: documents a second"
        wide(table(title, ["", "precomputed", "with indexing"], rows))
    _write(json_file, results)


@click.command("chain")
@data_options
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Runs of each prompt.")
@policy_option
@model_options
@json_file_option
def bench_chain(
    data: Path,
    chunks: int,
    prompts: int,
    skip: int,
    rounds: int,
    policy: str,
    model_name: str,
    device: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Measure the time to first token through a LangChain chain, with the plug-in and without, on prompts of DATA."""
    from chunkcache.eval.chain import bench_chain as run

    cases = read_cases(data, chunks, prompts, skip)
    model, tokenizer = load(model_name, device, dtype)
    with progress("running chains") as on_prompt:
        found = run(model, tokenizer, cases, policy, on_prompt, rounds)
    sums: dict[str, Any] = found.summary()
    names = {
        "plain_ttft_s": "plain transformers, s",
        "chain_ttft_s": "the plug-in, s",
        "direct_ttft_s": "direct call, s",
        "retrieve_s": "of the plug-in: its retriever, s",
        "layer_ms": "of the plug-in: outside of llm.chat_stream, ms",
        "overhead_ms": "the plug-in less the direct call, ms",
        "speedup": "plain over plug-in",
        "equal": "answers equal the direct call's",
        "plain_equal": "answers equal plain transformers'",
        "f1": "F1 with the plug-in",
        "plain_f1": "F1 without",
    }
    rows = [[text, "n/a" if sums[name] is None else f"{sums[name]:.3f}"] for name, text in names.items()]
    wide(table(f"{len(cases)} prompts: medians of times, means of the rest", ["first token", ""], rows))
    _write(json_file, found.as_dict())


@click.command("hints")
@click.option(
    "--sessions", type=click.Path(path_type=Path), help="Recorded sessions: JSON Lines with turns[].document_ids."
)
@click.option("--blocks", type=click.Path(path_type=Path), help="A trace in Mooncake's format.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Seeds of what is drawn.")
@json_file_option
def bench_hints(sessions: Path | None, blocks: Path | None, seeds: int, json_file: Path | None) -> None:
    """Replay retrievals (a Zipf law by default) and measure the nearest tier's hit rate, with and without hints."""
    from chunkcache.eval.hints import BUDGETS, VARIANTS, block_trace, session_trace, zipf_trace
    from chunkcache.eval.hints import bench_hints as run

    if sessions is not None:
        traces = [session_trace(sessions, seed) for seed in range(seeds)]
    elif blocks is not None:
        traces = [block_trace(blocks)]
    else:
        traces = [zipf_trace(seed) for seed in range(seeds)]
    with progress("replaying") as bar:
        total, rows = len(traces) * len(BUDGETS) * len(VARIANTS), 0

        def on_row(_: object) -> None:
            nonlocal rows
            rows += 1
            bar(rows, total)

        found = run(traces, on_row=on_row)
    shown = [
        [
            f"{s['budget']:.0%}",
            s["variant"],
            f"{s['held']:.3f} ± {s['held_spread']:.3f}",
            f"{s['held_gain']:+.3f}",
            f"{s['ready']:.3f} ± {s['ready_spread']:.3f}",
            f"{s['fetched']:.2f}",
        ]
        for s in found.summaries()
    ]
    columns = ["budget", "variant", "held", "over lru", "ready", "fetched"]
    wide(table(f"{traces[0].name}, {len(traces)} seeds: share of chunks in the nearest tier", columns, shown))
    err.print("[dim]held: when they were retrieved; ready: when the request came, prefetch included[/]")
    _write(json_file, found.as_dict())


@click.command("order")
@data_options
@click.option("--visits", default=3, show_default=True, type=click.IntRange(2), help="How often each prompt comes.")
@model_options
@json_file_option
def bench_order(
    data: Path,
    chunks: int,
    prompts: int,
    skip: int,
    visits: int,
    model_name: str,
    device: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Measure what reordering within a rank tolerance does to reuse and to answers, on prompts like those of DATA."""
    from chunkcache.eval.order import bench_order as run
    from chunkcache.eval.order import similar

    cases = read_cases(data, chunks, prompts, skip)
    if len(cases) < 2:
        raise InputError(f"{len(cases)} prompts are too few to be like one another; pass --prompts 2 or more")
    model, tokenizer = load(model_name, device, dtype)
    with progress("serving requests") as on_request:
        found = run(
            model,
            tokenizer,
            similar(cases, visits),
            on_request=on_request,
            on_rows=lambda b: _write(json_file, b.as_dict()),
        )

    def number(value: float | None) -> str:
        return "n/a" if value is None else f"{round(value, 3) + 0.0:.3f}"  # no -0.000

    columns = [
        "tolerance",
        "moved",
        "exact_share",
        "recomputed_share",
        "ttft_ratio",
        "kl",
        "own_kl",
        "agreement",
        "f1",
    ]
    rows = [
        [s["policy"], *(number(s[name]) for name in (*columns, "order_kl", "order_agreement", "order_f1"))]
        for s in found.summaries()
    ]
    columns = [name.removesuffix("_share").replace("_", " ") for name in columns]
    wide(table("requests in sequence", ["policy", *columns, "full: KL", "agreement", "F1"], rows))
    err.print("[dim]full: full prefill of the new order; KL to full prefill of the retriever's order, in nats[/]")


def _write(json_file: Path | None, found: dict[str, Any]) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2))
