"""`chunkcache bench load` and `bench simulate`: many requests on one model, and on machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from chunkcache.cli.console import progress
from chunkcache.errors import InputError
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import ModelOptions, OutputOptions, Policies, argument, command, count, option
from chunkcache.eval.commands.show import show_summary

if TYPE_CHECKING:
    from chunkcache.eval.cluster import Cluster
    from chunkcache.eval.workload import Workload

POLICIES = ("full", "prefix", "cacheblend:ratio=0.15", "query")
ABOVE_0 = click.FloatRange(0, min_open=True)
FROM_0 = click.FloatRange(0)
TIERS = click.Choice(["memory", "memory+disk"])
SHARE = click.FloatRange(0, 1, min_open=True)
SKEW = click.FloatRange(0, 5)
COUNT = click.IntRange(1)
SHAPE, MACHINE, GPUS = "llama-3.1-70b", "h100", 4
BANDWIDTH = 2e9  # an assumption: what one Redis hands out depends on its network, its cores and the entries
NOT_FITTED = ("accelerator", "gpus", "flops", "utilisation", "overhead")  # a fit says all of these


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Many requests on one model."""

    data: Annotated[Path | None, argument()] = None
    sessions: Annotated[Path | None, option(help="Instead of DATA: recorded sessions, JSON Lines of {session_id, "
                                            "turns: [{document_ids, prompt}]}.")] = None  # fmt: skip
    trace: Annotated[Path | None, option(help="Arrivals as in this trace in Mooncake's format, sped up to each rate; "
                                         "else a Poisson process.")] = None  # fmt: skip
    policies: Policies = POLICIES
    requests: Annotated[int, count(least=2)] = 60
    chunks: Annotated[int, count("Chunks of a request.")] = 5
    documents: Annotated[int, count("Different chunks of DATA that may be asked for.")] = 50
    skew: Annotated[float, option(type=SKEW, help="Of the Zipf law over them.")] = 0.9
    rates: Annotated[tuple[float, ...], option("--rate", type=ABOVE_0, help="Requests per second to print curves "
                     "for; may be given several times. By default a range that fits.")] = ()  # fmt: skip
    budgets: Annotated[tuple[float, ...], option("--budget", type=ABOVE_0, help="Memory for chunk KV, as a share of "
                       "all chunks'; may be given several times.")] = (1.0,)  # fmt: skip
    tiers: Annotated[tuple[str, ...], option(type=TIERS, help="May be given several times.")] = ("memory",)
    warm: Annotated[bool, option(help="The most popular chunks that fit are there before the first request.")] = False
    answer_tokens: Annotated[int, count("Length of every answer, which holds the server.")] = 1
    validated: Annotated[tuple[float, ...], option(
        "--validate", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="LOAD",
        help="Also send the requests on the wall clock, to each policy at this share of the rate that it can keep up "
        "with, such as 0.5; in the first budget.",
    )] = ()  # fmt: skip
    bound: Annotated[float | None, option(type=ABOVE_0, help="TTFT in seconds that 90 % of the requests shall meet, "
                     "in what is printed. By default twice the slowest policy's without load.")] = None  # fmt: skip
    seed: Annotated[int, option()] = 0
    model: ModelOptions
    output: OutputOptions

    def workload(self) -> tuple[Path, Workload]:
        """Return the file that the requests are from, and the requests."""
        from chunkcache.eval import load_cases
        from chunkcache.eval.workload import session_workload, zipf_workload

        if self.data is not None and self.sessions is None:
            cases = load_cases(self.data)
            return self.data, zipf_workload(cases, self.requests, self.chunks, self.documents, self.skew, self.seed)
        if self.sessions is not None and self.data is None:
            return self.sessions, session_workload(self.sessions, self.requests, self.chunks, self.seed)
        raise InputError("requests come from DATA or from --sessions; pass one of them")


@command("load")
def bench_load(options: LoadOptions) -> None:
    """Measure requests over the chunks of DATA, or of recorded sessions, and the TTFT at any rate of arrivals.

    Every request is served once under each policy and cache budget; the waiting at each rate is simulated from these
    times, and checked against real waiting with --validate.
    """
    from chunkcache.eval import Results
    from chunkcache.eval.load import BENCH, Group, LoadBench
    from chunkcache.eval.load_summary import summary
    from chunkcache.eval.machine import ran_on
    from chunkcache.eval.workload import poisson, trace_arrivals

    names = list(dict.fromkeys(options.policies))
    source, workload = options.workload()
    recorded = None if options.trace is None else trace_arrivals(options.trace, options.requests)
    model, tokenizer = options.model.load()
    groups = [
        Group(budget, tiers) for tiers in dict.fromkeys(options.tiers) for budget in dict.fromkeys(options.budgets)
    ]
    bench = LoadBench(model, tokenizer, workload, names, groups, options.warm, options.answer_tokens)
    settings = {
        **about(source), "sessions": options.sessions is not None, "arrivals": recorded, "requests": options.requests,
        "chunks": options.chunks, "documents": len(workload.chunks),
        "skew": None if options.sessions else options.skew, "policies": names,
        "budgets": list(options.budgets), "tiers": list(options.tiers), "warm": options.warm,
        "answer_tokens": options.answer_tokens, "seed": options.seed, **bench.about,
    }  # fmt: skip
    path = options.output.path(f"load-{source.stem}-{options.chunks}{'-warm' if options.warm else ''}")
    with Results.open(path, BENCH, settings, ran_on(model)) as results:
        with progress("measuring requests") as on_step:
            bench.measure(results, on_step)
        runs = [(name, share) for share in dict.fromkeys(options.validated) for name in names]
        with progress("sending requests on the wall clock") as on_run:
            for completed, (name, share) in enumerate(runs):
                on_run(completed, len(runs))
                bench.real_run(name, groups[0], share, recorded or poisson(options.requests, options.seed), results)
    show_summary(summary(results, options.rates, options.bound), options.output.as_json)


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Load on machines that are not here; what is None has the default of its accelerator, or of a fit."""

    shape: Annotated[str | None, option(show_default=SHAPE, help="Model: one whose shape is built in.")] = None
    accelerator: Annotated[str | None, option(show_default=MACHINE, help="One whose figures are built in.")] = None
    gpus: Annotated[int | None, option(show_default=str(GPUS), type=COUNT, help="Accelerators of a replica.")] = None
    flops: Annotated[float | None, option(type=ABOVE_0, help="Peak FLOP/s of an accelerator, instead of the built-in "
                                          "figure.")] = None  # fmt: skip
    memory_bandwidth: Annotated[float | None, option(type=ABOVE_0, help="Bytes/s at which an accelerator gets KV "
                                                     "from memory.")] = None  # fmt: skip
    hbm_bandwidth: Annotated[float | None, option(type=ABOVE_0, help="Bytes/s at which it reads weights from its own "
                                                  "memory.")] = None  # fmt: skip
    utilisation: Annotated[float | None, option(type=SHARE, help="Share of the peak that prefill gets.")] = None
    overhead: Annotated[float | None, option(type=FROM_0, help="Seconds per layer and pass on top.")] = None
    replicas: Annotated[int, count()] = 8
    memory: Annotated[str, option(help="For KV, of each replica.")] = "256GiB"
    redis: Annotated[str, option(help="For KV, of the one Redis; none for no Redis.")] = "4TiB"
    redis_bandwidth: Annotated[float, option(type=ABOVE_0, help="Bytes/s, shared by all; an assumption.")] = BANDWIDTH
    redis_latency: Annotated[float, option(type=FROM_0, help="Seconds.")] = 0.001
    route: Annotated[str, option(help="round-robin or least-loaded.")] = "round-robin"
    documents: Annotated[int, count("Different chunks.")] = 5000
    chunks: Annotated[int, count("Chunks of a request.")] = 10
    chunk_tokens: Annotated[int, count()] = 512
    prefix_tokens: Annotated[int, count(least=0)] = 64
    question_tokens: Annotated[int, count()] = 48
    skew: Annotated[float, option(type=SKEW, help="Of the Zipf law over chunks.")] = 0.9
    requests: Annotated[int, count(least=20)] = 2000
    rates: Annotated[tuple[float, ...], option("--rate", type=ABOVE_0, help="Requests per second; may be given "
                                               "several times.")] = ()  # fmt: skip
    policies: Policies = POLICIES
    fitted: Annotated[Path | None, option(
        "--fit", type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Instead of an accelerator: speed as of the full prefills in this results folder. Needs --shape, that "
        "of the model measured, and --memory-bandwidth and --hbm-bandwidth of the machine.",
    )] = None  # fmt: skip
    seed: Annotated[int, option()] = 0
    output: OutputOptions

    @property
    def shape_name(self) -> str:
        """The shape that is simulated."""
        return self.shape or SHAPE


@command("simulate")
def bench_simulate(options: SimulateOptions) -> None:
    """Simulate the load on machines that are not here: replicas with memory of their own, one Redis for all.

    Service times come from a cost model with published figures of model and accelerator; each can be overridden. How
    much of its peak an accelerator reaches is an assumption. A request is prefilled alone, not in a batch.
    """
    from chunkcache.eval import Results
    from chunkcache.eval.simulate import BENCH, Population, check_cluster, default_rates, settings, simulate, summary

    cluster, checks = _cluster(options)
    population = Population(options.documents, options.chunks, options.skew, options.requests, options.seed)
    names = list(dict.fromkeys(options.policies))
    check_cluster(cluster, names)
    population.draw()
    rates = sorted(options.rates) or default_rates(cluster, population)
    asked = {**settings(cluster, population, names, rates), "fit": checks}
    path = options.output.path(f"simulation-{options.shape_name}-{options.replicas}")
    with Results.open(path, BENCH, asked, {"simulated": True}) as results, progress("simulating") as on_run:
        simulate(cluster, population, results, on_run)
    show_summary(summary(results), options.output.as_json)


def _cluster(options: SimulateOptions) -> tuple[Cluster, list[dict[str, Any]]]:
    """Return what is simulated, and how well a fit agrees with what it was fitted to."""
    from chunkcache.eval.cluster import Cluster, Sizes
    from chunkcache.eval.costs import MACHINES, SHAPES, Costs
    from chunkcache.eval.simulate import fit_folder
    from chunkcache.store import parse_bytes

    for name, value, known in (
        ("shape", options.shape_name, SHAPES), ("accelerator", options.accelerator, MACHINES)
    ):  # fmt: skip
        if value is not None and value not in known:
            raise InputError(f"no {name} {value!r} is built in; there are {', '.join(known)}")
    shape = SHAPES[options.shape_name]
    sizes = Sizes(options.prefix_tokens, options.chunk_tokens, options.question_tokens)
    checks: list[dict[str, Any]] = []
    if options.fitted is not None:
        memory_bandwidth, hbm_bandwidth = _bandwidths_of_fit(options)
        machine, checks = fit_folder(
            options.fitted, options.shape_name, shape, sizes, memory_bandwidth, hbm_bandwidth
        )
    else:
        figures = ("flops", "memory_bandwidth", "hbm_bandwidth", "utilisation", "overhead")
        given = {name: value for name in figures if (value := getattr(options, name)) is not None}
        machine = replace(MACHINES[options.accelerator or MACHINE], **given).times(options.gpus or GPUS)
    redis_bytes = 0 if options.redis == "none" else parse_bytes(options.redis)
    return Cluster(
        Costs(shape, machine), sizes, options.replicas, parse_bytes(options.memory), redis_bytes,
        options.redis_bandwidth, options.redis_latency, options.route,
    ), checks  # fmt: skip


def _bandwidths_of_fit(options: SimulateOptions) -> tuple[float, float]:
    """Return the bandwidths of what was measured; refuse a fit that lacks them, or is given what it finds itself."""
    for name in ("shape", "memory_bandwidth", "hbm_bandwidth"):
        if getattr(options, name) is None:
            raise InputError(
                f"--fit needs --{name.replace('_', '-')} of what was measured; the results do not tell it"
            )
    for name in NOT_FITTED:
        if getattr(options, name) is not None:
            raise InputError(
                f"--fit finds the speed of what was measured, and --{name} says another; pass one of them"
            )
    return options.memory_bandwidth or 0.0, options.hbm_bandwidth or 0.0
