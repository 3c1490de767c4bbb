"""`chunkcache bench load` and `bench simulate`: many requests on one model, and on machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chunkcache.cli.console import out as console
from chunkcache.cli.console import progress, table, wide
from chunkcache.cli.inputs import load
from chunkcache.cli.options import json_option, model_options, out_option
from chunkcache.errors import InputError

if TYPE_CHECKING:
    from chunkcache.eval.cluster import Cluster
    from chunkcache.eval.simulate import Population
    from chunkcache.eval.workload import Workload

POLICIES = ("full", "prefix", "cacheblend:ratio=0.15", "query")
ABOVE_0 = click.FloatRange(0, min_open=True)
SKEW = click.FloatRange(0, 5)
SHAPE, ACCELERATOR, GPUS = "llama-3.1-70b", "h100", 4
REDIS_BANDWIDTH = 2e9  # an assumption: what one Redis hands out depends on its network, its cores and the entries
NOT_FITTED = ("accelerator", "gpus", "flops", "utilisation", "overhead")  # a fit says all of these

policies_option = click.option(
    "--policy", "policies", multiple=True, default=POLICIES, show_default=True, help="May be given several times."
)


@click.command("load")
@click.argument("data", required=False, type=click.Path(path_type=Path))
@click.option(
    "--sessions",
    type=click.Path(path_type=Path),
    help="Instead of DATA: recorded sessions, JSON Lines of {session_id, turns: [{document_ids, prompt}]}.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Arrivals as in this trace in Mooncake's format, sped up to each rate; else a Poisson process.",
)
@policies_option
@click.option("--requests", default=60, show_default=True, type=click.IntRange(2))
@click.option("--chunks", default=5, show_default=True, type=click.IntRange(1), help="Chunks of a request.")
@click.option(
    "--documents",
    default=50,
    show_default=True,
    type=click.IntRange(1),
    help="Different chunks of DATA that may be asked for.",
)
@click.option("--skew", default=0.9, show_default=True, type=SKEW, help="Of the Zipf law over them.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    type=ABOVE_0,
    help="Requests per second to print curves for; may be given several times. By default a range that fits.",
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=(1.0,),
    show_default=True,
    type=ABOVE_0,
    help="Memory for chunk KV, as a share of all chunks'; may be given several times.",
)
@click.option(
    "--tiers",
    multiple=True,
    default=("memory",),
    show_default=True,
    type=click.Choice(["memory", "memory+disk"]),
    help="May be given several times.",
)
@click.option("--warm", is_flag=True, help="The most popular chunks that fit are there before the first request.")
@click.option(
    "--answer-tokens",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Length of every answer, which holds the server.",
)
@click.option(
    "--validate",
    "validated",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="LOAD",
    help="Also send the requests on the wall clock, to each policy at this share of the rate that it can keep up "
    "with, such as 0.5; in the first budget.",
)
@click.option(
    "--bound",
    type=ABOVE_0,
    help="TTFT in seconds that 90 % of the requests shall meet, in what is printed. By default twice the slowest "
    "policy's without load.",
)
@click.option("--seed", default=0, show_default=True, type=int)
@model_options
@out_option
@json_option  # fmt: skip
def bench_load(
    data: Path | None,
    sessions: Path | None,
    trace: Path | None,
    policies: Sequence[str],
    requests: int,
    chunks: int,
    documents: int,
    skew: float,
    rates: Sequence[float],
    budgets: Sequence[float],
    tiers: Sequence[str],
    warm: bool,
    answer_tokens: int,
    validated: Sequence[float],
    bound: float | None,
    seed: int,
    model_name: str,
    device: str | None,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure requests over the chunks of DATA, or of recorded sessions, and the TTFT at any rate of arrivals.

    Every request is served once under each policy and cache budget; the waiting at each rate is simulated from these
    times, and checked against real waiting with --validate.
    """
    from chunkcache.eval import Results
    from chunkcache.eval.load import Group, LoadBench
    from chunkcache.eval.load_summary import summary
    from chunkcache.eval.machine import ran_on
    from chunkcache.eval.workload import poisson, trace_arrivals

    names = list(dict.fromkeys(policies))
    source, workload = _workload(data, sessions, requests, chunks, documents, skew, seed)
    recorded = None if trace is None else trace_arrivals(trace, requests)
    model, tokenizer = load(model_name, device, dtype)
    groups = [Group(budget, which) for which in dict.fromkeys(tiers) for budget in dict.fromkeys(budgets)]
    bench = LoadBench(model, tokenizer, workload, names, groups, warm, answer_tokens)
    settings = {
        **_about(source), "sessions": sessions is not None, "arrivals": recorded, "requests": requests,
        "chunks": chunks, "documents": len(workload.chunks), "skew": None if sessions else skew, "policies": names,
        "budgets": list(budgets), "tiers": list(tiers), "warm": warm, "answer_tokens": answer_tokens, "seed": seed,
        **bench.about,
    }  # fmt: skip
    path = None if out is None else out / f"load-{source.stem}-{chunks}{'-warm' if warm else ''}.jsonl"
    with Results.open(path, "load", settings, ran_on(model)) as results:
        with progress("measuring requests") as on_step:
            bench.measure(results, on_step)
        runs = [(name, share) for share in dict.fromkeys(validated) for name in names]
        with progress("sending requests on the wall clock") as on_run:
            for done, (name, share) in enumerate(runs):
                on_run(done, len(runs))
                bench.real_run(name, groups[0], share, recorded or poisson(requests, seed), results)
    show_tables(summary(results, rates, bound), as_json)


@click.command("simulate")
@click.option("--shape", show_default=SHAPE, help="Model: one whose shape is built in.")
@click.option("--accelerator", show_default=ACCELERATOR, help="One whose figures are built in.")
@click.option("--gpus", show_default=str(GPUS), type=click.IntRange(1), help="Accelerators of a replica.")
@click.option("--flops", type=ABOVE_0, help="Peak FLOP/s of an accelerator, instead of the built-in figure.")
@click.option("--memory-bandwidth", type=ABOVE_0, help="Bytes/s at which an accelerator gets KV from memory.")
@click.option("--hbm-bandwidth", type=ABOVE_0, help="Bytes/s at which it reads weights from its own memory.")
@click.option(
    "--utilisation", type=click.FloatRange(0, 1, min_open=True), help="Share of the peak that prefill gets."
)
@click.option("--overhead", type=click.FloatRange(0), help="Seconds per layer and pass on top.")
@click.option("--replicas", default=8, show_default=True, type=click.IntRange(1))
@click.option("--memory", default="256GiB", show_default=True, help="For KV, of each replica.")
@click.option("--redis", default="4TiB", show_default=True, help="For KV, of the one Redis; none for no Redis.")
@click.option(
    "--redis-bandwidth",
    default=REDIS_BANDWIDTH,
    show_default=True,
    type=ABOVE_0,
    help="Bytes/s, shared by all; an assumption.",
)
@click.option("--redis-latency", default=0.001, show_default=True, type=click.FloatRange(0), help="Seconds.")
@click.option("--route", default="round-robin", show_default=True, help="round-robin or least-loaded.")
@click.option("--documents", default=5000, show_default=True, type=click.IntRange(1), help="Different chunks.")
@click.option("--chunks", default=10, show_default=True, type=click.IntRange(1), help="Chunks of a request.")
@click.option("--chunk-tokens", default=512, show_default=True, type=click.IntRange(1))
@click.option("--prefix-tokens", default=64, show_default=True, type=click.IntRange(0))
@click.option("--question-tokens", default=48, show_default=True, type=click.IntRange(1))
@click.option("--skew", default=0.9, show_default=True, type=SKEW, help="Of the Zipf law over chunks.")
@click.option("--requests", default=2000, show_default=True, type=click.IntRange(20))
@click.option("--rate", "rates", multiple=True, type=ABOVE_0, help="Requests per second; may be given several times.")
@policies_option
@click.option(
    "--fit",
    "fitted",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Instead of an accelerator: speed as of the full prefills in this results folder. Needs --shape, that of "
    "the model measured, and --memory-bandwidth and --hbm-bandwidth of the machine.",
)
@click.option("--seed", default=0, show_default=True, type=int)
@out_option
@json_option  # fmt: skip
def bench_simulate(policies: Sequence[str], out: Path | None, as_json: bool, **asked: Any) -> None:
    """Simulate the load on machines that are not here: replicas with memory of their own, one Redis for all.

    Service times come from a cost model with published figures of model and accelerator; each can be overridden. How
    much of its peak an accelerator reaches is an assumption. A request is prefilled alone, not in a batch.
    """
    from chunkcache.eval import Results
    from chunkcache.eval.simulate import check_cluster, default_rates, settings, simulate, summary

    cluster, population, checks = _cluster(asked)
    names = list(dict.fromkeys(policies))
    check_cluster(cluster, names)
    population.draw()
    rates = sorted(asked["rates"]) or default_rates(cluster, population)
    about = {**settings(cluster, population, names, rates), "fit": checks}
    path = None if out is None else out / f"simulation-{asked['shape'] or SHAPE}-{asked['replicas']}.jsonl"
    with Results.open(path, "simulation", about, {"simulated": True}) as results, progress("simulating") as on_run:
        simulate(cluster, population, results, on_run)
    show_tables(summary(results), as_json)


def _cluster(asked: dict[str, Any]) -> tuple[Cluster, Population, list[dict[str, Any]]]:
    """Return what is simulated, and how well a fit agrees with what it was fitted to."""
    from chunkcache.eval.cluster import Cluster, Sizes
    from chunkcache.eval.costs import MACHINES, SHAPES, Costs
    from chunkcache.eval.simulate import Population, fit_folder
    from chunkcache.store import parse_bytes

    shape_name = asked["shape"] or SHAPE
    for name, value, known in (("shape", shape_name, SHAPES), ("accelerator", asked["accelerator"], MACHINES)):
        if value is not None and value not in known:
            raise InputError(f"no {name} {value!r} is built in; there are {', '.join(known)}")
    shape = SHAPES[shape_name]
    sizes = Sizes(asked["prefix_tokens"], asked["chunk_tokens"], asked["question_tokens"])
    checks: list[dict[str, Any]] = []
    if asked["fitted"] is not None:
        _check_fit(asked)
        bandwidths = asked["memory_bandwidth"], asked["hbm_bandwidth"]
        machine, checks = fit_folder(asked["fitted"], shape_name, shape, sizes, *bandwidths)
    else:
        figures = ("flops", "memory_bandwidth", "hbm_bandwidth", "utilisation", "overhead")
        given = {name: asked[name] for name in figures if asked[name] is not None}
        machine = replace(MACHINES[asked["accelerator"] or ACCELERATOR], **given).times(asked["gpus"] or GPUS)
    cluster = Cluster(
        Costs(shape, machine), sizes, asked["replicas"], parse_bytes(asked["memory"]),
        0 if asked["redis"] == "none" else parse_bytes(asked["redis"]),
        asked["redis_bandwidth"], asked["redis_latency"], asked["route"],
    )  # fmt: skip
    population = Population(asked["documents"], asked["chunks"], asked["skew"], asked["requests"], asked["seed"])
    return cluster, population, checks


def _check_fit(asked: dict[str, Any]) -> None:
    """Refuse a fit that lacks what measured requests do not tell, or is given what they do."""
    for name in ("shape", "memory_bandwidth", "hbm_bandwidth"):
        if asked[name] is None:
            raise InputError(
                f"--fit needs --{name.replace('_', '-')} of what was measured; the results do not tell it"
            )
    for name in NOT_FITTED:
        if asked[name] is not None:
            raise InputError(
                f"--fit finds the speed of what was measured, and --{name} says another; pass one of them"
            )


def _workload(
    data: Path | None, sessions: Path | None, requests: int, chunks: int, documents: int, skew: float, seed: int
) -> tuple[Path, Workload]:
    """Return the requests, and the file that they are from."""
    from chunkcache.eval import load_cases
    from chunkcache.eval.workload import session_workload, zipf_workload

    if data is not None and sessions is None:
        return data, zipf_workload(load_cases(data), requests, chunks, documents, skew, seed)
    if sessions is not None and data is None:
        return sessions, session_workload(sessions, requests, chunks, seed)
    raise InputError("requests come from DATA or from --sessions; pass one of them")


def _about(source: Path) -> dict[str, Any]:
    from chunkcache.eval.data import checksum

    return {"data": source.stem, "data_sha256": checksum(source)}


def show_tables(found: dict[str, Any], as_json: bool) -> None:
    """Print a summary: its tables, or all of it as JSON."""
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found["tables"]:
        wide(table(each["title"], each["columns"], each["rows"]))
    for note in found.get("notes", ()):
        console.print(note)
