"""The server over real HTTP: what it costs, how much it answers at once, and whether a prefill holds up decoding.

A server is a process of its own, and so is each client. All answers have the same length, so that counts compare.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

from chunkcache.errors import ChunkCacheError
from chunkcache.eval.data import Case
from chunkcache.llm import CachedLLM
from chunkcache.serve.probe import free_port, is_up

BENCH = "serve"
FUSED, OFF = "fused", "off"
START_S = 300.0
ARRIVED_S = 120.0  # for each read of a request that arrives at a rate; one that takes longer has failed


@dataclass(frozen=True)
class Ask:
    """One request: a question over chunks, how its KV are reused, and how long its answer is.

    Attributes:
        question: as it is asked.
        chunks: the texts in front of it.
        reuse: as the server takes it.
        tokens: length of the answer at most.
        plain: whether it has only what every server knows of: one message with all texts.
    """

    question: str
    chunks: tuple[str, ...]
    reuse: str
    tokens: int
    plain: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """Return the request as it is sent."""
        if self.plain:
            said = "\n\n".join((*self.chunks, self.question))
            return {
                "model": model, "messages": [{"role": "user", "content": said}], "max_tokens": self.tokens,
                "temperature": 0, "stream": True,
            }  # fmt: skip
        return {
            "model": model, "messages": [{"role": "user", "content": self.question}], "documents": list(self.chunks),
            "reuse": self.reuse, "max_tokens": self.tokens, "temperature": 0, "stream": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """What a client saw of one request.

    Attributes:
        ttft_s: seconds to the first piece of the answer; infinite where it failed.
        whole_s: seconds to its end.
        gaps_s: seconds between pieces.
        has_text: whether there was any.
    """

    ttft_s: float
    whole_s: float
    gaps_s: tuple[float, ...]
    has_text: bool = True


FAILED = Shot(math.inf, math.inf, (), False)


@contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """Run `chunkcache serve` in a process of its own; yield its URL.

    Raises:
        ChunkCacheError: it does not come up.
    """
    with server_process(model, *options) as (url, _):
        yield url


@contextmanager
def server_process(model: str, *options: str) -> Iterator[tuple[str, int]]:
    """Run `chunkcache serve` in a process of its own; yield its URL and the process's number.

    Raises:
        ChunkCacheError: it does not come up.
    """
    port = free_port()
    command = [sys.executable, "-m", "chunkcache", "serve", model, "--port", str(port), "--name", "model", *options]
    with (  # a pipe that nobody reads would fill with its log, and hold it up
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=said, stderr=said, env=os.environ) as process,
    ):
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                process.wait()
                said.seek(0)
                told = said.read().decode(errors="replace").strip()[-400:]
                raise ChunkCacheError(f"the server did not come up: {told}")
            time.sleep(0.1)
        try:
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


class Clients:
    """Processes that ask a server; to be used as a context manager.

    Args:
        most: how many may ask at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        context = multiprocessing.get_context("spawn")
        self._manager = context.Manager()
        self._pool = ProcessPoolExecutor(most, context)

    def arrive(self, url: str, asks: Sequence[Ask], arrivals: Sequence[float], model: str) -> list[Shot]:
        """Send each request at its time, in seconds, whatever became of those before; return what each saw."""
        shares = [[*range(n, len(asks), self._most)] for n in range(min(self._most, len(asks)))]
        ready = self._manager.Barrier(len(shares))
        told = self._pool.map(
            _arriving, [url] * len(shares), [[asks[n] for n in share] for share in shares],
            [[arrivals[n] for n in share] for share in shares], [ready] * len(shares), [model] * len(shares),
        )  # fmt: skip
        return [shot for shots in told for shot in shots]

    def ask(self, url: str, asked: Sequence[Sequence[Ask]], model: str = "model") -> tuple[list[list[Shot]], float]:
        """Send the requests of several clients, each of which asks one after the other.

        Returns:
            what each saw; seconds from when all were ready to the last answer.
        """
        ready = self._manager.Barrier(len(asked))
        each = len(asked)
        runs = list(self._pool.map(_client, [url] * each, asked, [ready] * each, [model] * each))
        return [shots for shots, _, _ in runs], max(end for _, _, end in runs) - min(start for _, start, _ in runs)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._manager.shutdown()


def send(client: httpx.Client, url: str, ask: Ask, model: str = "model") -> Shot:
    """Send one request, and read its answer to the end.

    Raises:
        httpx.HTTPStatusError: it was answered with an error.
    """
    started = time.perf_counter()
    times = []
    with client.stream("POST", f"{url}/v1/chat/completions", json=ask.body(model)) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and _has_text(json.loads(line[6:])):
                times.append(time.perf_counter())
    ended = time.perf_counter()
    first = times[0] if times else ended
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Shot(first - started, ended - started, gaps, bool(times))


def _arriving(url: str, asks: Sequence[Ask], arrivals: Sequence[float], ready: Any, model: str) -> list[Shot]:
    """Send requests at their times, each by a thread of its own."""

    def at_its_time(ask: Ask, arrival: float) -> Shot:
        time.sleep(max(0.0, started + arrival - time.perf_counter()))
        try:
            return send(client, url, ask, model)
        except httpx.HTTPError:  # counted where the shots are
            return FAILED

    limits = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=ARRIVED_S, limits=limits) as client, ThreadPoolExecutor(len(asks)) as threads:
        ready.wait()
        started = time.perf_counter()
        return list(threads.map(at_its_time, asks, arrivals))


def _client(url: str, asked: Sequence[Ask], ready: Any, model: str) -> tuple[list[Shot], float, float]:
    with httpx.Client(timeout=None) as client:
        ready.wait()
        started = time.time()
        shots = [send(client, url, ask, model) for ask in asked]
        return shots, started, time.time()


def _has_text(event: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


class ServeBench:
    """The parts of the measurement, one after the other, on a server that is up.

    Args:
        llm: the wrapper alone, over the same model and policy.
        url: the server's.
        clients: ask it.
        cases: the prompts.
        most: clients at once.
        tokens: length of every answer.

    Attributes:
        steps: how many rows there will be.
    """

    def __init__(
        self, llm: CachedLLM, url: str, clients: Clients, cases: Sequence[Case], most: int, tokens: int
    ) -> None:
        self._llm, self._url, self._clients, self._cases = llm, url, clients, cases
        self._most, self._tokens = most, tokens
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
        return Ask(case.question, tuple(case.chunks), reuse, tokens or self._tokens)

    def _overhead(self, client: Any) -> Iterator[dict[str, Any]]:
        for number, case in enumerate(self._cases):
            shot = send(client, self._url, self._ask(case))
            started = time.perf_counter()
            self._llm.generate(case.question, case.chunks, max_new_tokens=self._tokens, do_sample=False)
            alone_s = time.perf_counter() - started
            yield {"part": "overhead", "prompt": number, "served_s": shot.whole_s, "alone_s": alone_s}

    def _throughput(self) -> Iterator[dict[str, Any]]:
        for reuse in (OFF, FUSED):
            clients = self._most
            asked = [[self._ask(case, reuse) for case in self._cases[n::clients]] for n in range(clients)]
            shots, wall_s = self._clients.ask(self._url, [each for each in asked if each])
            ttft = sorted(shot.ttft_s for each in shots for shot in each)
            yield {
                "part": "throughput", "reuse": reuse, "clients": len(shots), "requests": len(ttft), "wall_s": wall_s,
                "ttft_p50_s": statistics.median(ttft), "ttft_p90_s": ttft[int(0.9 * (len(ttft) - 1))],
            }  # fmt: skip

    def _decoding(self) -> Iterator[dict[str, Any]]:
        tokens = 4 * self._tokens
        for clients in (1, self._most):
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
            return send(client, self._url, self._ask(self._cases[0], tokens=4 * self._tokens))
