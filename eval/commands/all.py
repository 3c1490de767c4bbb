"""`chunkcache bench all`: every measurement of this machine into one folder, and the report of it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chunkcache.eval.commands.batch import BatchOptions, bench_batch
from chunkcache.eval.commands.load import LoadOptions, SimulateOptions, bench_load, bench_simulate
from chunkcache.eval.commands.options import (
    FOLDER,
    ModelOptions,
    OutputOptions,
    Policies,
    argument,
    command,
    count,
    option,
)  # fmt: skip
from chunkcache.eval.commands.report import ReportOptions, bench_report
from chunkcache.eval.commands.requests import (
    COMPARED,
    HeatmapOptions,
    PeerOptions,
    QualityOptions,
    TtftOptions,
    bench_heatmap,
    bench_quality,
    bench_ttft,
)  # fmt: skip
from chunkcache.eval.results import PLAIN

LENGTHS = (1000, 2000, 3000, 4000, 6000, 7900)  # tokens of chunks
GROWING = (PLAIN, "full", "cacheblend:ratio=0.15", "query")  # policies whose growth with the context is measured
BUDGETS = (1.25, 0.3)  # memory for chunk KV under load, as shares of all chunks'; the first holds the lead-in's, too
VALIDATED = 0.6  # load at which the requests are also sent on the wall clock


@dataclass(frozen=True, kw_only=True)
class AllOptions:
    """Every measurement."""

    data: Annotated[tuple[Path, ...], argument()]
    out: Annotated[Path, option(type=FOLDER, help="Folder for the results and the report; an interrupted run goes on "
                                "there.")]  # fmt: skip
    counts: Annotated[tuple[int, ...], count("Chunks per prompt; may be given several times.", "--chunks")] = (5, 10)
    prompts: Annotated[int, count("Prompts of each kind.")] = 50
    lengths: Annotated[tuple[int, ...], count("Context lengths, in tokens of chunks; may be given several times.",
                                              "--tokens")] = LENGTHS  # fmt: skip
    requests: Annotated[int, count("Requests under load.", least=2)] = 40
    policies: Policies = COMPARED
    peers: PeerOptions
    model: ModelOptions
    without_texts: Annotated[bool, option(help="No questions and answers in the report.")] = False


@command("all")
def bench_all(options: AllOptions) -> None:
    """Measure everything on DATA, and write the report: speed, quality, growth with length, load, batches.

    Lengths are measured on the first of DATA, load and batches on the last.
    """
    data, policies, model, output = options.data, options.policies, options.model, OutputOptions(out=options.out)
    for source in data:
        for chunks in options.counts:
            bench_quality.run(
                QualityOptions(
                    data=(source,), counts=(chunks,), prompts=options.prompts, policies=(PLAIN, *policies),
                    fill=True,
                    peers=options.peers, model=model, output=output,
                )
            )  # fmt: skip
    bench_ttft.run(
        TtftOptions(data=data[:1], lengths=options.lengths, prompts=2, policies=GROWING, model=model, output=output)
    )
    bench_load.run(
        LoadOptions(
            data=data[-1], requests=options.requests, chunks=2, documents=20, warm=True, budgets=BUDGETS,
            validated=(VALIDATED,), model=model, output=output,
        )
    )  # fmt: skip
    bench_simulate.run(SimulateOptions(output=output))
    bench_batch.run(BatchOptions(data=data[-1], model=model, output=output))
    bench_heatmap.run(HeatmapOptions(policies=policies, model=model, output=output))
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    bench_report.run(
        ReportOptions(
            source=options.out, without_texts=options.without_texts, command=shlex.join(["chunkcache", *words])
        )
    )
