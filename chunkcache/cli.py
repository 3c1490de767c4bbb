"""The command line: `chunkcache ask | demo | check-model | calibrate | bench | store`.

Answers and JSON go to stdout, everything else to stderr. Exit codes: 0 done, 1 failure, 2 bad input.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.logging import RichHandler
from rich.markup import escape

from chunkcache.cli_bench import bench
from chunkcache.cli_bench_all import bench_all
from chunkcache.cli_bench_batch import bench_batch
from chunkcache.cli_bench_load import bench_load, bench_simulate
from chunkcache.cli_bench_peers import bench_peers
from chunkcache.cli_bench_rag import bench_chain, bench_hints, bench_order, bench_retrieval
from chunkcache.cli_bench_report import bench_report, bench_table
from chunkcache.cli_bench_requests import COMPARED, bench_heatmap, bench_quality, bench_ttft, show
from chunkcache.cli_fill import export_file, import_file, warm
from chunkcache.cli_inputs import EXAMPLES, draw_questions, load, read_cases
from chunkcache.cli_store import store_commands
from chunkcache.console import err, out, progress, table
from chunkcache.errors import ChunkCacheError, DocumentError, InputError
from chunkcache.options import (
    STORE_VARIABLE,
    data_options,
    device_options,
    json_option,
    model_options,
    policy_option,
    retrieval_options,
    system_option,
)

if TYPE_CHECKING:  # torch and transformers take seconds to import: only a command that needs them does
    from transformers import PreTrainedTokenizerBase

    from chunkcache.llm import CachedLLM
    from chunkcache.prompt import Passage
    from chunkcache.retriever import Hit, Retriever


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chunkcache")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens to stderr, and show tracebacks.")
def cli(verbose: bool) -> None:
    """Answer questions over documents, reusing the KV caches of retrieved chunks."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])


@cli.command()
@click.argument("questions", nargs=-1, required=True)
@click.option("--docs", required=True, type=click.Path(path_type=Path), help="Folder or file of documents.")
@click.option(
    "--index",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to keep the index in: the next time only documents that have changed are read into it.",
)
@model_options
@retrieval_options
@click.option(
    "--search",
    "mode",
    type=click.Choice(["hybrid", "dense", "keyword"]),
    default="hybrid",
    show_default=True,
    help="How chunks are searched for.",
)
@policy_option
@click.option(
    "--store",
    envvar=STORE_VARIABLE,
    default="memory://?max_bytes=2GiB",
    show_default=True,
    show_envvar=True,
    help="URL of the chunk KV store.",
)
@system_option
@click.option(
    "--precompute",
    type=click.Choice(["all", "retrieved"]),
    default="all",
    show_default=True,
    help="Chunks to compute ahead: of the whole folder, or those retrieved for the questions.",
)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@json_option
def ask(
    questions: tuple[str, ...],
    docs: Path,
    index: Path | None,
    model_name: str,
    device: str | None,
    dtype: str,
    top_k: int,
    chunk_tokens: int,
    mode: str,
    policy: str,
    store: str,
    system: str | None,
    precompute: str,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Answer QUESTIONS over the documents in --docs."""
    from chunkcache.blend import parse_policy
    from chunkcache.corpus import Corpus
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents
    from chunkcache.store import open_store

    chosen, opened = parse_policy(policy), open_store(store)  # bad input shows before any work
    for question in questions:
        if not question.strip():
            raise InputError(f"the question is empty ({question!r}); pass the text to be answered")
    documents = load_documents(docs)
    model, tokenizer = load(model_name, device, dtype)
    llm = wrap(model, tokenizer, store=opened, policy=chosen)
    everything = precompute == "all"
    corpus = Corpus(llm, _indexed(documents, tokenizer, chunk_tokens, index), system=system, ahead=everything)
    with progress("precomputing chunks") as on_progress:
        corpus.sync(documents, on_progress)
        if everything:
            corpus.precompute(on_progress)
    if index is not None and corpus.retriever.unsaved:
        corpus.retriever.save(index)
    found = [corpus.search(question, top_k, mode) for question in questions]
    if not everything:
        chunks = [hit.chunk for hits in found for hit in hits]
        with progress("precomputing chunks") as on_progress:
            owners = [chunk.document_id for chunk in chunks]
            llm.precompute([chunk.text for chunk in chunks], system, on_progress, documents=owners)
    answers = [
        _answer(llm, question, hits, corpus.passages(hits), system, max_new_tokens, quiet=as_json)
        for question, hits in zip(questions, found, strict=True)
    ]
    if as_json:
        click.echo(json.dumps({"answers": answers, "store": opened.stats().as_dict()}, indent=2))


@cli.command()
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
    retriever = _indexed(documents, tokenizer, chunk_tokens)
    found = [retriever.search(row["question"], top_k) for row in asked]
    llm = wrap(model, tokenizer, store="memory://?max_bytes=2GiB", policy=chosen)
    with progress("precomputing chunks") as on_progress:
        llm.precompute([hit.chunk.text for hits in found for hit in hits], on_progress=on_progress)
    answers = []
    for row, hits in zip(asked, found, strict=True):
        chunks = [hit.chunk.text for hit in hits]
        answers.append(_answer(llm, row["question"], hits, chunks, None, 48, quiet=as_json))
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


@cli.command("check-model")
@click.argument("model_name", metavar="MODEL")
@device_options
@json_option
def check_model(model_name: str, device: str | None, dtype: str, as_json: bool) -> None:
    """Say whether MODEL is supported, and show the figures of its self-check."""
    from chunkcache.blend import Decoder, self_check
    from chunkcache.identity import fingerprint

    model, tokenizer = load(model_name, device, dtype)
    decoder = Decoder(model)
    check = self_check(decoder)
    facts = {
        "model": model_name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": len(decoder.layers),
        "max_tokens": decoder.max_tokens,
        "fingerprint": fingerprint(model, tokenizer),
        **check.as_dict(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [[name.replace("_", " "), f"{v:.2g}" if isinstance(v, float) else str(v)] for name, v in facts.items()]
    out.print(table("supported: selective prefill agrees with the model's own", ["figure", "value"], rows))


@cli.command()
@data_options
@click.option(
    "--target",
    default="cacheblend:ratio=0.15",
    show_default=True,
    help="Policy whose fidelity cachecraft has to reach.",
)
@click.option("--guarded", default="query", show_default=True, help="Query policy whose guard is fitted.")
@click.option(
    "--only", type=click.Choice(["guard", "cachecraft"]), help="Look for one of both; the other is left as it was."
)
@model_options
@click.option("--out", type=click.Path(path_type=Path), help="File to write; by default in the cache folder.")
@json_option
def calibrate(
    data: Path,
    chunks: int,
    prompts: int,
    skip: int,
    target: str,
    guarded: str,
    only: str | None,
    model_name: str,
    device: str | None,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Find what cachecraft:alpha=auto and query:guard=X need to know of a model, on prompts of DATA."""
    from chunkcache.blend import parse_policy
    from chunkcache.calibration import load_calibration
    from chunkcache.eval.calibrate import PARTS
    from chunkcache.eval.calibrate import calibrate as run

    for policy in (target, guarded):
        parse_policy(policy)
    cases = read_cases(data, chunks, prompts, skip)
    if len(cases) < 10:
        raise DocumentError(f"{len(cases)} prompts are too few for a calibration; pass --prompts 10 or more")
    model, tokenizer = load(model_name, device, dtype)
    with progress("calibrating") as on_step:
        found = run(model, tokenizer, cases, target, guarded, (only,) if only else PARTS, on_step)
    found = found.over(load_calibration(found.fingerprint, out if out and out.exists() else None))
    path = found.save(out)
    if as_json:
        click.echo(json.dumps({"file": str(path), **asdict(found)}, indent=2))
    else:
        _show_calibration(found.report, found.alpha)
        err.print(f"[dim]written to {escape(str(path))}[/]")


for command in (
    bench_ttft, bench_quality, bench_heatmap, bench_load, bench_simulate, bench_batch, bench_all, bench_peers,
    bench_report, bench_table, bench_retrieval, bench_chain, bench_hints, bench_order,
):  # fmt: skip
    bench.add_command(command)
cli.add_command(bench)
cli.add_command(store_commands)
for command in (warm, export_file, import_file):
    store_commands.add_command(command)


def _indexed(
    documents: Sequence[Any], tokenizer: PreTrainedTokenizerBase, chunk_tokens: int, folder: Path | None = None
) -> Retriever:
    """Return the index that was saved in a folder, or else one that is built of the documents."""
    from chunkcache.retriever import Retriever

    if folder is None or not Retriever.saved_in(folder):
        with progress("indexing documents") as on_progress:
            return Retriever.build(documents, tokenizer, size=chunk_tokens, on_progress=on_progress)
    retriever = Retriever.load(folder, tokenizer)
    if retriever.size != chunk_tokens:
        raise InputError(
            f"the index in {str(folder)!r} has chunks of {retriever.size} tokens, not {chunk_tokens}: pass "
            f"--chunk-tokens {retriever.size}, or another folder"
        )
    return retriever


def _answer(
    llm: CachedLLM,
    question: str,
    hits: Sequence[Hit],
    chunks: Sequence[str | Passage],
    system: str | None,
    max_new_tokens: int,
    quiet: bool,
) -> dict[str, Any]:
    """Stream one answer to stdout unless `quiet`; return it with its sources and stats."""
    if not quiet:
        err.print(f"[bold]{escape(question)}[/]")
    stream = llm.stream(question, chunks, system=system, max_new_tokens=max_new_tokens)
    for piece in stream:
        if not quiet:
            click.echo(piece, nl=False)
    result = stream.result
    assert result is not None  # the stream has ended without an error
    if not quiet:
        click.echo()
        stats = result.stats
        err.print(
            f"  [dim]{stats.tokens} tokens, {stats.hits} of {stats.chunks} chunks reused, "
            f"{stats.recomputed_share:.1%} recomputed, first token after {result.ttft_s:.2f} s[/]"
        )
    sources = [
        {"document": hit.chunk.document_id, "chunk": hit.chunk.index, "score": round(hit.score, 4)} for hit in hits
    ]
    return {"question": question, "answer": result.text, "sources": sources, "stats": result.stats.as_dict()}


def _show_calibration(report: dict[str, Any], alpha: float | None) -> None:
    if "cachecraft" in report:
        craft = report["cachecraft"]
        rows = [
            [f"{r['alpha']}", f"{r['kl_first']:.4f}", f"{r['kl_mean']:.4f}", f"{r['recomputed_share']:.1%}"]
            for r in craft["tried"]
        ]
        rows.append([craft["target"], f"{craft['target_kl_first']:.4f}", f"{craft['target_kl_mean']:.4f}", ""])
        found = f"alpha = {alpha}" if craft["met"] else f"target not reached; alpha = {alpha}"
        out.print(table(f"cachecraft: {found}", ["alpha", "KL first", "KL mean", "recomputed"], rows))
    if "guard" in report:
        rows = [
            [f"{r['bound']}", f"{r['broken']:.1%}", f"{r['full']:.1%}", f"{r['passes']:.2f}", f"{r['kl_first']:.4f}"]
            for r in report["guard"]
        ]
        title = f"guard of {report['guarded']} (cross-validated)"
        out.print(table(title, ["bound", "broken", "full prefill", "passes", "KL first"], rows))


def main() -> None:
    """Run the command line, turning errors into one line and an exit code."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv[1:]))
    try:
        sys.exit(cli.main(prog_name="chunkcache", standalone_mode=False))
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends in one readable line
        if verbose:
            err.print_exception()
        known = isinstance(error, ChunkCacheError)
        _fail(str(error) if known else f"{type(error).__name__}: {error}", 2 if isinstance(error, InputError) else 1)


def _fail(message: str, code: int) -> None:
    one_line = " ".join(message.split())
    click.echo(f"error: {one_line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
