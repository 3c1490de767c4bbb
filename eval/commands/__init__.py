"""The `chunkcache bench` commands: speed and fidelity, measured. The command line finds them by an entry point."""

from __future__ import annotations

import click

from chunkcache.eval.commands.all import bench_all
from chunkcache.eval.commands.batch import bench_batch
from chunkcache.eval.commands.bench import bench_packing, bench_precompute, bench_selection, bench_store
from chunkcache.eval.commands.load import bench_load, bench_simulate
from chunkcache.eval.commands.peers import bench_peers
from chunkcache.eval.commands.rag import bench_chain, bench_hints, bench_order, bench_retrieval
from chunkcache.eval.commands.report import bench_report, bench_table
from chunkcache.eval.commands.requests import bench_heatmap, bench_quality, bench_ttft
from chunkcache.eval.commands.serve import bench_serve
from chunkcache.eval.commands.soak import bench_soak


@click.group()
def bench() -> None:
    """Measure speed and fidelity."""


for command in (
    bench_ttft, bench_quality, bench_heatmap, bench_load, bench_simulate, bench_batch, bench_all, bench_peers,
    bench_report, bench_table, bench_retrieval, bench_chain, bench_hints, bench_order, bench_selection, bench_store,
    bench_packing, bench_precompute, bench_serve, bench_soak,
):  # fmt: skip
    bench.add_command(command)
