"""`chunkcache bench soak`: whether the server stays right, up and of one size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from chunkcache.cli.console import status
from chunkcache.errors import ChunkCacheError, missing_extra
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import (
    AsJson,
    FilledCaseOptions,
    ModelOptions,
    argument,
    command,
    count,
    option,
)
from chunkcache.eval.commands.show import show_summary


@dataclass(frozen=True, kw_only=True)
class SoakOptions(FilledCaseOptions):
    """A soak."""

    data: Annotated[Path, argument()]
    minutes: Annotated[float, option(help="How long.")] = 10.0
    clients: Annotated[int, count("Clients at once.")] = 16
    answer_tokens: Annotated[int, count("Length of an answer at most.", least=2)] = 32
    policy: Annotated[str, option(help="Policy of the server.")] = "query"
    memory: Annotated[str, option(help="Size of the server's memory tier, in front of the Valkey.")] = "256MiB"
    model: ModelOptions
    as_json: AsJson = False


@command("soak")
def bench_soak(options: SoakOptions) -> None:
    """Ask `chunkcache serve` for minutes, while clients vanish, ask nonsense, and its Valkey is killed.

    Every whole answer to the prompts of DATA is compared with what the server says to one client alone. Exits with 1
    where one was wrong, or a request failed that should not have.
    """
    try:
        from chunkcache.eval.soak import Soak, summary
    except ImportError as error:
        raise missing_extra("eval", "bench soak", error) from error
    from chunkcache.eval.data import cut

    cases = options.read(options.data)
    if options.chunk_tokens is not None:
        _, tokenizer = options.model.load()
        cases = cut(cases, options.chunk_tokens, tokenizer)
    soak = Soak(
        model=options.model.model_name, policy=options.policy, memory=options.memory, minutes=options.minutes,
        clients=options.clients, tokens=options.answer_tokens, options=("--dtype", options.model.dtype),
    )  # fmt: skip
    with status("starting the server") as on_status:
        found = soak.run(cases, on_status)
    show_summary(summary({**about(options.data), **found}), options.as_json)
    if not found["passed"]:
        raise ChunkCacheError(f"the soak did not pass: {found['should_be_none'] or 'the server is down'}")
