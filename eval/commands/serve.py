"""`chunkcache bench serve`: the server, asked by clients in processes of their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx

from chunkcache.cli.console import progress, status
from chunkcache.eval.commands.inputs import about, read_cases
from chunkcache.eval.commands.options import (
    CaseOptions,
    ModelOptions,
    OutputOptions,
    argument,
    command,
    count,
    option,
)
from chunkcache.eval.commands.show import show_summary
from chunkcache.eval.serving import BENCH, Ask, Clients, Shot, send, server, summary

if TYPE_CHECKING:
    from chunkcache.eval.data import Case
    from chunkcache.llm import CachedLLM

FUSED, OFF = "fused", "off"


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions(CaseOptions):
    """Requests to a server."""

    data: Annotated[Path, argument()]
    fill: Annotated[bool, option(help="Give cases with too few chunks some of other cases.")] = False
    chunk_tokens: Annotated[int | None, count("Cut chunks to so many tokens.")] = None
    clients: Annotated[int, count("Clients at once.", least=2)] = 8
    answer_tokens: Annotated[int, count("Length of every answer.", least=2)] = 32
    policy: Annotated[str, option(help="Policy of the server.")] = "query"
    model: ModelOptions
    output: OutputOptions


@command("serve")
def bench_serve(options: ServeBenchOptions) -> None:
    """Measure `chunkcache serve` on the prompts of DATA: its overhead, its throughput, and how evenly it decodes."""
    from chunkcache.eval import Results
    from chunkcache.eval.data import DataSet, cut
    from chunkcache.eval.machine import ran_on
    from chunkcache.llm import wrap

    source = DataSet.read(options.data)
    cases = read_cases(source, options.chunks, options.prompts, options.skip, options.fill)
    model, tokenizer = options.model.load()
    cases = cut(cases, options.chunk_tokens, tokenizer)
    settings = {
        **about(options.data), "chunks": options.chunks, "prompts": options.prompts, "clients": options.clients,
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
                bench = _Bench(options, llm, url, clients, cases)
                for number, row in enumerate(bench.rows()):
                    results.add(row)
                    on_step(number + 1, bench.steps)
        show_summary(summary(results), options.output.as_json)


class _Bench:
    """The parts of the measurement, one after the other, on a server that is up."""

    def __init__(
        self, options: ServeBenchOptions, llm: CachedLLM, url: str, clients: Clients, cases: list[Case]
    ) -> None:
        self._options, self._llm, self._url, self._clients, self._cases = options, llm, url, clients, cases
        self.steps = len(cases) + 2 + 2 + len(cases)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what was measured."""
        with httpx.Client(timeout=None) as client:
            for case in self._cases:  # chunks that are asked for are there
                client.post(f"{self._url}/v1/chunks", json={"texts": case.chunks}).raise_for_status()
                self._llm.precompute(case.chunks)
            yield from self._overhead(client)
            yield from self._throughput()
            yield from self._decoding()
            yield from self._stalls(client)

    def _ask(self, case: Case, reuse: str = FUSED, tokens: int | None = None) -> Ask:
        return Ask(case.question, tuple(case.chunks), reuse, tokens or self._options.answer_tokens)

    def _overhead(self, client: Any) -> Iterator[dict[str, Any]]:
        for number, case in enumerate(self._cases):
            shot = send(client, self._url, self._ask(case))
            started = time.perf_counter()
            self._llm.generate(
                case.question, case.chunks, max_new_tokens=self._options.answer_tokens, do_sample=False
            )
            alone_s = time.perf_counter() - started
            yield {"part": "overhead", "prompt": number, "served_s": shot.whole_s, "alone_s": alone_s}

    def _throughput(self) -> Iterator[dict[str, Any]]:
        for reuse in (OFF, FUSED):
            clients = self._options.clients
            asked = [[self._ask(case, reuse) for case in self._cases[n::clients]] for n in range(clients)]
            shots, wall_s = self._clients.ask(self._url, [each for each in asked if each])
            ttft = sorted(shot.ttft_s for each in shots for shot in each)
            yield {
                "part": "throughput", "reuse": reuse, "clients": len(shots), "requests": len(ttft), "wall_s": wall_s,
                "ttft_p50_s": statistics.median(ttft), "ttft_p90_s": ttft[int(0.9 * (len(ttft) - 1))],
            }  # fmt: skip

    def _decoding(self) -> Iterator[dict[str, Any]]:
        tokens = 4 * self._options.answer_tokens
        for clients in (1, self._options.clients):
            shots, _ = self._clients.ask(
                self._url, [[self._ask(self._cases[0], tokens=tokens)] for _ in range(clients)]
            )
            flat = [shot for each in shots for shot in each]
            decoding = max(shot.whole_s - shot.ttft_s for shot in flat)
            yield {
                "part": "decode", "clients": clients, "wall_s": decoding,
                "tokens": sum(len(shot.gaps_s) for shot in flat),
            }  # fmt: skip

    def _stalls(self, client: Any) -> Iterator[dict[str, Any]]:
        for number, case in enumerate(self._cases):
            with ThreadPoolExecutor(1) as beside:
                decoding = beside.submit(self._decode_beside)
                time.sleep(1.0)  # it decodes
                send(client, self._url, self._ask(case, OFF, tokens=2))
                gaps = sorted(decoding.result().gaps_s)
            yield {
                "part": "stall", "prompt": number, "median_gap_s": statistics.median(gaps), "longest_gap_s": gaps[-1],
            }  # fmt: skip

    def _decode_beside(self) -> Shot:
        with httpx.Client(timeout=None) as client:
            return send(client, self._url, self._ask(self._cases[0], tokens=4 * self._options.answer_tokens))
