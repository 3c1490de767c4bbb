"""The command line: `chunkcache ask | demo | check-model | calibrate | bench | store`.

Answers and JSON go to stdout, everything else to stderr. Exit codes: 0 done, 1 failure, 2 bad input.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.logging import RichHandler
from rich.markup import escape

from chunkcache.cli_fill import export_file, import_file, warm
from chunkcache.cli_store import store_commands
from chunkcache.console import err, out, progress, status, table, wide
from chunkcache.errors import ChunkCacheError, DocumentError, InputError
from chunkcache.options import (
    STORE_VARIABLE,
    data_options,
    device_options,
    json_file_option,
    json_option,
    model_options,
    policy_option,
    retrieval_options,
    system_option,
)

if TYPE_CHECKING:  # torch and transformers take seconds to import: only a command that needs them does
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chunkcache.eval import Case
    from chunkcache.eval.compare import Comparison
    from chunkcache.eval.stores import StoreBench
    from chunkcache.llm import CachedLLM
    from chunkcache.retriever import Hit, Retriever
    from chunkcache.store import Store

EXAMPLES = Path(__file__).with_name("examples")
COMPARED = ("full", "prefix", "reuse", "link:k=8", "cacheblend:ratio=0.15", "cachecraft", "query")


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
@model_options
@retrieval_options
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
    model_name: str,
    device: str | None,
    dtype: str,
    top_k: int,
    chunk_tokens: int,
    policy: str,
    store: str,
    system: str | None,
    precompute: str,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Answer QUESTIONS over the documents in --docs."""
    from chunkcache.blend import parse_policy
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents
    from chunkcache.store import open_store

    chosen, opened = parse_policy(policy), open_store(store)  # bad input shows before any work
    for question in questions:
        if not question.strip():
            raise InputError(f"the question is empty ({question!r}); pass the text to be answered")
    documents = load_documents(docs)
    model, tokenizer = _load(model_name, device, dtype)
    llm = wrap(model, tokenizer, store=opened, policy=chosen)
    retriever = _index(documents, tokenizer, chunk_tokens)
    found = [retriever.search(question, top_k) for question in questions]
    ahead = retriever.chunks if precompute == "all" else [hit.chunk for hits in found for hit in hits]
    with progress("precomputing chunks") as on_progress:
        llm.precompute([chunk.text for chunk in ahead], system=system, on_progress=on_progress)
    answers = [
        _answer(llm, question, hits, system, max_new_tokens, quiet=as_json)
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
    from chunkcache.eval import Case
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents

    chosen = parse_policy(policy)
    asked = _draw_questions(questions_file or EXAMPLES / "questions.jsonl", count, seed)
    documents = load_documents(docs or EXAMPLES / "corpus")
    model, tokenizer = _load(model_name, device, dtype)
    retriever = _index(documents, tokenizer, chunk_tokens)
    found = [retriever.search(row["question"], top_k) for row in asked]
    llm = wrap(model, tokenizer, store="memory://?max_bytes=2GiB", policy=chosen)
    with progress("precomputing chunks") as on_progress:
        llm.precompute([hit.chunk.text for hits in found for hit in hits], on_progress=on_progress)
    answers = []
    for row, hits in zip(asked, found, strict=True):
        answers.append(_answer(llm, row["question"], hits, None, 48, quiet=as_json))
        if not as_json:
            full = llm.generate(row["question"], [hit.chunk.text for hit in hits], policy="full", max_new_tokens=48)
            err.print(f"  [dim]full prefill, first token after {full.ttft_s:.2f} s: {escape(full.text)}[/]")
            err.print(f"  [dim]expected: {escape(' / '.join(row['answers']))}[/]\n")
    cases = [
        Case(row["question"], tuple(hit.chunk.text for hit in hits)) for row, hits in zip(asked, found, strict=True)
    ]
    comparison = _compare(model, tokenizer, cases, list(dict.fromkeys((*COMPARED, policy))), llm.store)
    if as_json:
        click.echo(json.dumps({"answers": answers, "comparison": comparison.as_dict()}, indent=2))
    else:
        _show(comparison)


@cli.command("check-model")
@click.argument("model_name", metavar="MODEL")
@device_options
@json_option
def check_model(model_name: str, device: str | None, dtype: str, as_json: bool) -> None:
    """Say whether MODEL is supported, and show the figures of its self-check."""
    from chunkcache.blend import Decoder, self_check
    from chunkcache.identity import fingerprint

    model, tokenizer = _load(model_name, device, dtype)
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
    cases = _cases(data, chunks, prompts, skip)
    if len(cases) < 10:
        raise DocumentError(f"{len(cases)} prompts are too few for a calibration; pass --prompts 10 or more")
    model, tokenizer = _load(model_name, device, dtype)
    with progress("calibrating") as on_step:
        found = run(model, tokenizer, cases, target, guarded, (only,) if only else PARTS, on_step)
    found = found.over(load_calibration(found.fingerprint, out if out and out.exists() else None))
    path = found.save(out)
    if as_json:
        click.echo(json.dumps({"file": str(path), **asdict(found)}, indent=2))
    else:
        _show_calibration(found.report, found.alpha)
        err.print(f"[dim]written to {escape(str(path))}[/]")


@cli.group()
def bench() -> None:
    """Measure speed and fidelity."""


@bench.command("policies")
@data_options
@click.option(
    "--policy", "policies", multiple=True, default=COMPARED, show_default=True, help="May be given several times."
)
@model_options
@json_file_option
def bench_policies(
    data: Path,
    policies: Sequence[str],
    chunks: int,
    prompts: int,
    skip: int,
    model_name: str,
    device: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Compare policies with full prefill on the prompts of DATA (CacheBlend, HotpotQA, MuSiQue, LongBench, SQuAD)."""
    from chunkcache.blend import parse_policy
    from chunkcache.store import open_store

    for policy in policies:
        parse_policy(policy)
    cases = _cases(data, chunks, prompts, skip)
    model, tokenizer = _load(model_name, device, dtype)

    _show(_compare(model, tokenizer, cases, policies, open_store("memory://?max_bytes=4GiB"), _writer(json_file)))


@bench.command("selection")
@data_options
@click.option("--ratio", default=0.03, show_default=True, type=click.FloatRange(0, 1), help="Share recomputed.")
@model_options
@json_file_option
def bench_selection(
    data: Path,
    chunks: int,
    prompts: int,
    skip: int,
    ratio: float,
    model_name: str,
    device: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Compare ways to select what is recomputed, at equal cost, by fidelity alone."""
    from chunkcache.eval.ablation import ablate

    cases = _cases(data, chunks, prompts, skip)
    model, tokenizer = _load(model_name, device, dtype)
    with progress("measuring selections") as on_prompt:
        results = ablate(model, tokenizer, cases, ratio, on_prompt)
    rows = [
        [r.variant, f"{r.recomputed_share:.1%}", f"{r.kl_first:.4f}", f"{r.kl_mean:.4f}", f"{r.agreement:.1%}"]
        for r in results
    ]
    columns = ["selection", "recomputed", "KL first", "KL mean", "agreement"]
    out.print(table(f"{len(cases)} prompts, ratio {ratio}: means, KL in nats", columns, rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(result) for result in results], indent=2))


@bench.command("store")
@data_options
@click.option(
    "--store",
    "stores",
    multiple=True,
    help="URL of a store to compare with memory; may be given several times. By default a folder on disk, with each "
    "of the codecs.",
)
@policy_option
@model_options
@json_file_option
def bench_store(
    data: Path,
    stores: Sequence[str],
    policy: str,
    chunks: int,
    prompts: int,
    skip: int,
    model_name: str,
    device: str | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Compare stores on the prompts of DATA: put and get, time to first token over memory's, fidelity of codecs."""
    from chunkcache.blend import parse_policy
    from chunkcache.eval.stores import CODECS, bench_stores
    from chunkcache.store import open_store

    parse_policy(policy)
    with tempfile.TemporaryDirectory(prefix="chunkcache-") as folder, ExitStack() as opened:
        urls = stores or [f"disk://{folder}/{number}{options}" for number, options in enumerate(CODECS)]
        stands = {url: opened.enter_context(open_store(url)) for url in urls}
        cases = _cases(data, chunks, prompts, skip)
        model, tokenizer = _load(model_name, device, dtype)

        with progress("measuring stores") as on_prompt:
            measured = bench_stores(model, tokenizer, cases, stands, policy, on_prompt, _writer(json_file))
    _show_stores(measured)


@bench.command("packing")
@click.option(
    "--chunk-tokens",
    "lengths",
    multiple=True,
    default=(64, 256, 512),
    show_default=True,
    type=click.IntRange(1),
    help="Length of a chunk; may be given several times.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@model_options
@json_option
def bench_packing(
    lengths: tuple[int, ...], rounds: int, model_name: str, device: str | None, dtype: str, as_json: bool
) -> None:
    """Measure how many chunks are precomputed per second, packed and one by one."""
    from chunkcache.eval.packing import bench_packing as run

    model, tokenizer = _load(model_name, device, dtype)
    with progress("measuring packing") as on_round:
        found = run(model, tokenizer, lengths, rounds=rounds, on_round=on_round)
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    rows = [
        [each.behind, str(each.chunk_tokens), f"{each.one_by_one:.2f}", f"{each.packed:.2f}", f"{each.ratio:.2f}"]
        for each in found
    ]
    wide(table("chunks per second (medians)", ["behind", "tokens", "one by one", "packed", "ratio"], rows))


cli.add_command(store_commands)
for command in (warm, export_file, import_file):
    store_commands.add_command(command)


def _writer(json_file: Path | None) -> Callable[[Comparison | StoreBench], None]:
    """Return what writes results to a file after every prompt: a run that is interrupted leaves what it had."""

    def write(measured: Comparison | StoreBench) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(measured.as_dict(), indent=2))

    return write


def _cases(data: Path, chunks: int, prompts: int, skip: int) -> list[Case]:
    from chunkcache.eval import load_cases

    cases = load_cases(data, chunks or None, skip + prompts, least=chunks or 2)[skip:]
    if not cases:
        raise DocumentError(f"{data} has no prompts after the first {skip}; lower --skip")
    if len(cases) < prompts:
        err.print(f"[yellow]only {len(cases)} prompts of {escape(str(data))} can be used, not {prompts}[/]")
    return cases


def _load(name: str, device: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with status(f"loading {name}") as on_status:
        from chunkcache.models import load_model

        return load_model(name, device=device, dtype=dtype, on_status=on_status)


def _index(documents: Sequence[Any], tokenizer: PreTrainedTokenizerBase, chunk_tokens: int) -> Retriever:
    from chunkcache.retriever import Retriever

    with progress("indexing documents") as on_progress:
        return Retriever.build(documents, tokenizer, size=chunk_tokens, on_progress=on_progress)


def _answer(
    llm: CachedLLM, question: str, hits: Sequence[Hit], system: str | None, max_new_tokens: int, quiet: bool
) -> dict[str, Any]:
    """Stream one answer to stdout unless `quiet`; return it with its sources and stats."""
    if not quiet:
        err.print(f"[bold]{escape(question)}[/]")
    stream = llm.stream(question, [hit.chunk.text for hit in hits], system=system, max_new_tokens=max_new_tokens)
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


def _draw_questions(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [{"question": str(row["question"]), "answers": list(row.get("answers", ()))} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(f"{path} is not JSON Lines with a question in each: {error!r}") from None
    return random.Random(seed).sample(rows, min(count, len(rows)))


def _compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Any],
    policies: Sequence[str],
    store: Store,
    on_rows: Callable[[Comparison], None] | None = None,
) -> Comparison:
    from chunkcache.eval import compare

    with progress("comparing policies") as on_prompt:
        return compare(model, tokenizer, cases, policies, store, on_prompt, on_rows)


def _show_stores(measured: StoreBench) -> None:
    from chunkcache.store.url import shown

    sums = measured.summaries()

    def number(value: float | None, digits: int) -> str:
        return "n/a" if value is None else f"{value:.{digits}f}"

    bytes_rows = [
        [
            shown(s["store"]),
            str(s["chunks"]),
            f"{s['bytes_per_token']:.0f}",
            f"{s['put_s'] * 1e3:.0f}",
            f"{s['get_s'] * 1e3:.0f}",
            f"{s['get_bytes_per_s'] / 1e9:.2f}",
            f"{s['put_of_floor']:.2f}",
            f"{s['get_of_floor']:.2f}",
        ]
        for s in sums
    ]
    columns = ["store", "chunks", "bytes/token", "put ms", "get ms", "get GB/s", "put/floor", "get/floor"]
    wide(table("all chunks of a prompt (medians; floor: a plain copy of as many bytes)", columns, bytes_rows))
    ttft_rows = [
        [
            shown(s["store"]),
            str(s["chunks"]),
            f"{s['ttft_s']:.3f}",
            f"{s['ttft_ratio']:.3f}",
            number(s["cold_ttft_ratio"], 3),
            f"{s['load_s']:.3f}",
            number(s["peak_ratio"], 2),
            f"{abs(s['kl_first']):.4f}",
            f"{abs(s['kl_memory']):.5f}",
            str(s["lost"]),
        ]
        for s in sums
    ]
    columns = ["store", "chunks", "TTFT s", "of memory", "cold", "load s", "peak/KV", "KL first", "KL to raw", "lost"]
    wide(table("requests (medians; KL: means, in nats)", columns, ttft_rows))


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


def _show(comparison: Comparison) -> None:
    meta = comparison.meta
    summaries = comparison.summaries()
    out.print(
        f"{meta['prompts']} prompts, {meta['dtype']}, {meta['device']}, {meta['threads']} threads, "
        f"torch {meta['torch']}, transformers {meta['transformers']}"
    )
    speed = [
        [
            s.policy,
            f"{s.ttft_s:.3f}",
            f"{s.ttft_ratio:.3f}",
            f"{s.ttft_ratio_p90:.3f}",
            f"{s.assemble_ratio:.4f}",
            "n/a" if s.peak_ratio is None else f"{s.peak_ratio:.2f}",
        ]
        for s in summaries
    ]
    out.print(table("time to first token (medians)", ["policy", "s", "of full", "p90", "assembly", "peak/KV"], speed))
    fidelity = [
        [
            s.policy,
            f"{s.recomputed_share:.1%}",
            f"{abs(s.kl_first):.4f}",
            f"{abs(s.kl_mean):.4f}",
            f"{s.agreement:.1%}",
        ]
        for s in summaries
    ]
    columns = ["policy", "recomputed", "KL first", "KL mean", "agreement"]
    out.print(table("fidelity to full prefill (means; KL in nats)", columns, fidelity))
    scored = [s for s in summaries if s.f1 is not None]
    if scored:
        answers = [[s.policy, f"{s.f1:.3f}", f"{s.rouge_l:.3f}"] for s in scored]
        out.print(table("answers against the accepted ones (means)", ["policy", "F1", "ROUGE-L"], answers))


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
