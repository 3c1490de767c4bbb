"""`chunkcache bench batch`: offline batches, grouped by what they share, against plain ones and none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chunkcache.cli.console import progress
from chunkcache.errors import DocumentError
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import (
    ModelOptions,
    OutputOptions,
    Policies,
    argument,
    check_policies,
    command,
    count,
    option,
)  # fmt: skip
from chunkcache.eval.commands.show import show_summary


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Questions over a few sets of chunks."""

    data: Annotated[Path, argument()]
    sets: Annotated[int, count("Sets of chunks.")] = 3
    chunks: Annotated[int, count("Chunks of a set.", least=2)] = 4
    questions: Annotated[int, count("Questions over each set.")] = 8
    skip: Annotated[int, count("Cases to leave out first.", least=0)] = 0
    policies: Policies = ("full", "prefix", "query")
    max_batch: Annotated[int, count("Sequences decoded together.")] = 8
    new_tokens: Annotated[int, count("Length of an answer at most.")] = 32
    rounds: Annotated[int, count("How often all of it is run; six for intervals.")] = 1
    store: Annotated[str | None, option(help="URL of a store that is used for nothing else: it is cleared.  "
                                        "[default: memory]")] = None  # fmt: skip
    model: ModelOptions
    output: OutputOptions


@command("batch")
def bench_batch(options: BatchOptions) -> None:
    """Answer questions of DATA over sets of its chunks: one by one, in plain batches, and grouped over shared KV."""
    from chunkcache.eval.batch import STORE, Batching, summary, workload
    from chunkcache.eval.batch import bench_batch as run
    from chunkcache.eval.data import load_cases

    check_policies(options.policies)
    cases = load_cases(options.data, limit=options.skip + options.sets * options.questions)[options.skip :]
    cases = workload(cases, options.chunks, options.questions)
    if not cases:
        raise DocumentError(
            f"{options.data} has too few cases for {options.questions} questions over a set; lower --questions"
        )
    model, tokenizer = options.model.load()
    settings = {
        **about(options.data), "skip": options.skip, "sets": options.sets, "chunks": options.chunks,
        "questions": options.questions, "seed": 0,
    }  # fmt: skip
    batching = Batching(
        options.policies, options.store or STORE, options.max_batch, options.new_tokens, options.rounds
    )
    with progress("answering batches") as on_pass:
        path = options.output.path(f"batch-{options.data.stem}")
        results = run(model, tokenizer, cases, batching, settings, path, on_pass)
    show_summary(summary(results), options.output.as_json)
