"""`chunkcache bench serve`: the server, asked by clients in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from chunkcache.cli.console import progress, status
from chunkcache.errors import InputError, missing_extra
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import (
    FOLDER,
    FilledCaseOptions,
    ModelOptions,
    OutputOptions,
    argument,
    command,
    count,
    option,
)
from chunkcache.eval.commands.show import show_summary

if TYPE_CHECKING:
    from chunkcache.eval.data import Case
    from chunkcache.eval.serving_rates import Rivals


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions(FilledCaseOptions):
    """Requests to a server."""

    data: Annotated[Path, argument()]
    clients: Annotated[int, count("Clients at once.", least=2)] = 8
    answer_tokens: Annotated[int, count("Length of every answer.", least=2)] = 32
    policy: Annotated[str, option(help="Policy of the server.")] = "query"
    peers: Annotated[str, option(metavar="NAME,...", help="Servers to compare with, under requests that arrive at a "
                                 "rate: transformers, llama.cpp, llama.cpp-reuse, kvboost.")] = ""  # fmt: skip
    peers_in: Annotated[Path | None, option(type=FOLDER, help="Folder of their environments, made where they are "
                                            "missing.")] = None  # fmt: skip
    arrivals: Annotated[int, count("Requests at each rate.", least=10)] = 40
    first_rate: Annotated[float, option(type=click.FloatRange(0, min_open=True), help="Rate to begin with, in "
                                        "requests per second.")] = 0.25  # fmt: skip
    skew: Annotated[float, option(help="Exponent of the Zipf law of documents at a rate.")] = 0.9
    model: ModelOptions
    output: OutputOptions


@command("serve")
def bench_serve(options: ServeBenchOptions) -> None:
    """Measure `chunkcache serve` on the prompts of DATA: its overhead, its throughput, and how evenly it decodes."""
    names = [name.strip() for name in options.peers.split(",") if name.strip()]
    if names and options.peers_in is None:
        raise InputError("--peers wants --peers-in: a folder for their environments")
    try:
        from chunkcache.eval.serving import BENCH, Clients, ServeBench, server
    except ImportError as error:
        raise missing_extra("eval", "bench serve", error) from error
    import torch

    from chunkcache.cli.serve import default_threads
    from chunkcache.eval import Results
    from chunkcache.eval.data import cut
    from chunkcache.eval.machine import ran_on
    from chunkcache.eval.peers.servers import server_of
    from chunkcache.eval.serving_summary import summary
    from chunkcache.llm import wrap

    for name in names:
        server_of(name)
    cores = torch.get_num_threads()
    torch.set_num_threads(default_threads())  # of a prefill of the server; its decoding has as many beside it
    cases = options.read(options.data)
    model, tokenizer = options.model.load()
    cases = cut(cases, options.chunk_tokens, tokenizer)
    settings = {
        **about(options.data), "chunks": options.chunks, "prompts": options.prompts, "skip": options.skip,
        "fill": options.fill, "clients": options.clients,
        "answer_tokens": options.answer_tokens, "policy": options.policy, "chunk_tokens": options.chunk_tokens,
        "peers": names, "arrivals": options.arrivals, "first_rate": options.first_rate,
        "skew": options.skew,
    }  # fmt: skip
    with wrap(model, tokenizer, store="memory://?max_bytes=4GiB", policy=options.policy) as llm:
        path = options.output.path(f"serve-{options.data.stem}")
        with Results.open(path, BENCH, settings, ran_on(model)) as results:
            rivals: list[dict[str, Any]] = []
            search = _rivals(options, cases, model, tokenizer, cores) if names else None
            with status("asking the peers"), Clients(options.clients) as clients:
                for row in search.rows(names, clients) if search is not None else ():
                    rivals.append(row)
                    results.add(row)
            with status("starting the server"):
                running = server(
                    options.model.model_name, "--policy", options.policy, "--store", "memory://?max_bytes=4GiB"
                )
            with running as url, Clients(options.clients) as clients, progress("asking the server") as on_step:
                bench = ServeBench(llm, url, clients, cases, options.clients, options.answer_tokens)
                for number, row in enumerate(bench.rows()):
                    results.add(row)
                    on_step(number + 1, bench.steps)
                ours = None if search is None else search.ours(url, rivals, clients)
                if ours is not None:
                    results.add(ours)
        show_summary(summary(results), options.output.as_json)


def _rivals(options: ServeBenchOptions, cases: Sequence[Case], model: Any, tokenizer: Any, threads: int) -> Rivals:
    from chunkcache.eval.peers.weights import weights_as
    from chunkcache.eval.serving_rates import Load, Rivals

    chunks = min(len(case.chunks) for case in cases)
    load = Load(
        cases=cases,
        chunks=chunks,
        tokens=options.answer_tokens,
        requests=options.arrivals,
        skew=options.skew,
        first=options.first_rate,
    )
    folder = (options.peers_in or Path()).absolute()

    def weights(name: str, form: str) -> Path:
        return weights_as(form, name, folder, options.model.model_name, model, tokenizer)

    return Rivals(load, folder, weights, threads, options.clients)
