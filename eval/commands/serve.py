"""`chunkcache bench serve`: the server, asked by clients in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chunkcache.cli.console import progress, status
from chunkcache.errors import missing_extra
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import (
    FilledCaseOptions,
    ModelOptions,
    OutputOptions,
    argument,
    command,
    count,
    option,
)
from chunkcache.eval.commands.show import show_summary


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions(FilledCaseOptions):
    """Requests to a server."""

    data: Annotated[Path, argument()]
    clients: Annotated[int, count("Clients at once.", least=2)] = 8
    answer_tokens: Annotated[int, count("Length of every answer.", least=2)] = 32
    policy: Annotated[str, option(help="Policy of the server.")] = "query"
    model: ModelOptions
    output: OutputOptions


@command("serve")
def bench_serve(options: ServeBenchOptions) -> None:
    """Measure `chunkcache serve` on the prompts of DATA: its overhead, its throughput, and how evenly it decodes."""
    try:
        from chunkcache.eval.serving import BENCH, Clients, ServeBench, server
    except ImportError as error:
        raise missing_extra("eval", "bench serve", error) from error
    from chunkcache.eval import Results
    from chunkcache.eval.data import cut
    from chunkcache.eval.machine import ran_on
    from chunkcache.eval.serving_summary import summary
    from chunkcache.llm import wrap

    cases = options.read(options.data)
    model, tokenizer = options.model.load()
    cases = cut(cases, options.chunk_tokens, tokenizer)
    settings = {
        **about(options.data), "chunks": options.chunks, "prompts": options.prompts, "skip": options.skip,
        "fill": options.fill, "clients": options.clients,
        "answer_tokens": options.answer_tokens, "policy": options.policy, "chunk_tokens": options.chunk_tokens,
    }  # fmt: skip
    with wrap(model, tokenizer, store="memory://?max_bytes=4GiB", policy=options.policy) as llm:
        path = options.output.path(f"serve-{options.data.stem}")
        with Results.open(path, BENCH, settings, ran_on(model)) as results:
            with status("starting the server"):
                running = server(
                    options.model.model_name, "--policy", options.policy, "--store", "memory://?max_bytes=4GiB"
                )
            with running as url, Clients(options.clients) as clients, progress("asking the server") as on_step:
                bench = ServeBench(llm, url, clients, cases, options.clients, options.answer_tokens)
                for number, row in enumerate(bench.rows()):
                    results.add(row)
                    on_step(number + 1, bench.steps)
        show_summary(summary(results), options.output.as_json)
