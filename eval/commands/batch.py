"""`chunkcache bench batch`: offline batches, grouped by what they share, against plain ones and none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from chunkcache.cli.console import progress, table, wide
from chunkcache.cli.inputs import load
from chunkcache.cli.options import json_option, model_options, out_option


@click.command("batch")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--sets", default=3, show_default=True, type=click.IntRange(1), help="Sets of chunks.")
@click.option("--chunks", default=4, show_default=True, type=click.IntRange(2), help="Chunks of a set.")
@click.option("--questions", default=8, show_default=True, type=click.IntRange(1), help="Questions over each set.")
@click.option("--skip", default=0, show_default=True, type=click.IntRange(0), help="Cases to leave out first.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("full", "prefix", "query"),
    show_default=True,
    help="May be given several times.",
)
@click.option("--max-batch", default=8, show_default=True, type=click.IntRange(1), help="Sequences decoded together.")
@click.option(
    "--new-tokens", default=32, show_default=True, type=click.IntRange(1), help="Length of an answer at most."
)
@click.option(
    "--rounds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="How often all of it is run; six for intervals.",
)
@click.option("--store", help="URL of a store that is used for nothing else: it is cleared.  [default: memory]")
@model_options
@out_option
@json_option
def bench_batch(
    data: Path,
    sets: int,
    chunks: int,
    questions: int,
    skip: int,
    policies: Sequence[str],
    max_batch: int,
    new_tokens: int,
    rounds: int,
    store: str | None,
    model_name: str,
    device: str | None,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Answer questions of DATA over sets of its chunks: one by one, in plain batches, and grouped over shared KV."""
    from chunkcache.blend import parse_policy
    from chunkcache.errors import DocumentError
    from chunkcache.eval.batch import STORE, summary, workload
    from chunkcache.eval.batch import bench_batch as run
    from chunkcache.eval.data import checksum, load_cases

    for policy in policies:
        parse_policy(policy)
    cases = workload(load_cases(data, limit=skip + sets * questions)[skip:], chunks, questions)
    if not cases:
        raise DocumentError(f"{data} has too few cases for {questions} questions over a set; lower --questions")
    model, tokenizer = load(model_name, device, dtype)
    about = {
        "data": data.stem, "data_sha256": checksum(data), "skip": skip, "sets": sets, "chunks": chunks,
        "questions": questions, "seed": 0,
    }  # fmt: skip
    path = None if out is None else out / f"batch-{data.stem}.jsonl"
    with progress("answering batches") as on_pass:
        results = run(
            model, tokenizer, cases, policies, about, path, store or STORE, max_batch, new_tokens, rounds, on_pass
        )
    found = summary(results)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found["tables"]:
        wide(table(each["title"], each["columns"], each["rows"]))
