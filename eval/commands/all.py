"""`chunkcache bench all`: every measurement of this machine into one folder, and the report of it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from chunkcache.cli.options import model_options
from chunkcache.eval.commands.batch import bench_batch
from chunkcache.eval.commands.load import bench_load, bench_simulate
from chunkcache.eval.commands.report import bench_report
from chunkcache.eval.commands.requests import bench_heatmap, bench_quality, bench_ttft, peers_options, policies_option

LENGTHS = (1000, 2000, 3000, 4000, 6000, 7900)  # tokens of chunks
GROWING = ("full", "cacheblend:ratio=0.15", "query")  # policies whose growth with the context is measured
BUDGETS = (1.25, 0.3)  # memory for chunk KV under load, as shares of all chunks'; the first holds the lead-in's, too
VALIDATED = 0.6  # load at which the requests are also sent on the wall clock


@click.command("all")
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results and the report; an interrupted run goes on there.",
)
@click.option(
    "--chunks",
    "counts",
    multiple=True,
    default=(5, 10),
    show_default=True,
    type=click.IntRange(1),
    help="Chunks per prompt; may be given several times.",
)
@click.option("--prompts", default=50, show_default=True, type=click.IntRange(1), help="Prompts of each kind.")
@click.option(
    "--tokens",
    "lengths",
    multiple=True,
    default=LENGTHS,
    show_default=True,
    type=click.IntRange(1),
    help="Context lengths, in tokens of chunks; may be given several times.",
)
@click.option("--requests", default=40, show_default=True, type=click.IntRange(2), help="Requests under load.")
@policies_option
@peers_options
@model_options
@click.option("--without-texts", is_flag=True, help="No questions and answers in the report.")
@click.pass_context  # fmt: skip
def bench_all(
    ctx: click.Context,
    data: tuple[Path, ...],
    out: Path,
    counts: tuple[int, ...],
    prompts: int,
    lengths: tuple[int, ...],
    requests: int,
    policies: tuple[str, ...],
    peers: Path | None,
    peer_prompts: int | None,
    peer_names: tuple[str, ...],
    model_name: str,
    device: str | None,
    dtype: str,
    without_texts: bool,
) -> None:
    """Measure everything on DATA, and write the report: speed, quality, growth with length, load, batches.

    Lengths are measured on the first of DATA, load and batches on the last.
    """
    where = {"model_name": model_name, "device": device, "dtype": dtype, "out": out}
    asked = {**where, "policies": policies, "fill": True}
    for each in data:
        for chunks in counts:
            one = {"data": (each,), "counts": (chunks,), "prompts": prompts}
            ctx.invoke(bench_quality, **one, **asked, peers=peers, peer_prompts=peer_prompts, peer_names=peer_names)
    ctx.invoke(bench_ttft, **where, data=data[:1], lengths=lengths, prompts=2, policies=GROWING)
    load: dict[str, Any] = {"requests": requests, "chunks": 2, "documents": 20, "warm": True}
    ctx.invoke(bench_load, **where, **load, data=data[-1], budgets=BUDGETS, validated=(VALIDATED,))
    ctx.invoke(bench_simulate, out=out)
    ctx.invoke(bench_batch, **where, data=data[-1])
    ctx.invoke(bench_heatmap, **where, policies=policies)
    command = shlex.join(["chunkcache", *(Path(each).name if Path(each).exists() else each for each in sys.argv[1:])])
    ctx.invoke(bench_report, folder=out, without_texts=without_texts, command=command)
