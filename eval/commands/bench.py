"""`chunkcache bench selection`, `store` and `packing`: the parts that requests are made of."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chunkcache.cli.console import out, progress, table, wide
from chunkcache.cli.inputs import load
from chunkcache.cli.options import data_options, json_file_option, json_option, model_options, policy_option
from chunkcache.eval.commands.inputs import read_cases

if TYPE_CHECKING:
    from chunkcache.eval.stores import StoreBench


@click.command("selection")
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

    cases = read_cases(data, chunks, prompts, skip)
    model, tokenizer = load(model_name, device, dtype)
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


@click.command("store")
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
        cases = read_cases(data, chunks, prompts, skip)
        model, tokenizer = load(model_name, device, dtype)

        with progress("measuring stores") as on_prompt:
            measured = bench_stores(model, tokenizer, cases, stands, policy, on_prompt, _writer(json_file))
    _show_stores(measured)


@click.command("packing")
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

    model, tokenizer = load(model_name, device, dtype)
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


def _writer(json_file: Path | None) -> Callable[[StoreBench], None]:
    """Return what writes results to a file after every prompt: a run that is interrupted leaves what it had."""

    def write(measured: StoreBench) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(measured.as_dict(), indent=2))

    return write


def _show_stores(measured: StoreBench) -> None:
    from chunkcache.store.url import redacted

    sums = measured.summaries()

    def number(value: float | None, digits: int) -> str:
        return "n/a" if value is None else f"{value:.{digits}f}"

    bytes_rows = [
        [
            redacted(s["store"]),
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
            redacted(s["store"]),
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
