"""The server over real HTTP: what it costs, how much it answers at once, and whether a prefill holds up decoding.

A server is a process of its own, and so is each client. All answers have the same length, so that counts compare.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

from chunkcache.errors import ChunkCacheError
from chunkcache.eval.results import Results

BENCH = "serve"
START_S = 300.0


@dataclass(frozen=True)
class Ask:
    """One request: a question over chunks, how its KV are reused, and how long its answer is."""

    question: str
    chunks: tuple[str, ...]
    reuse: str
    tokens: int

    def body(self, model: str) -> dict[str, Any]:
        """Return the request as it is sent."""
        return {
            "model": model, "messages": [{"role": "user", "content": self.question}], "documents": list(self.chunks),
            "reuse": self.reuse, "max_tokens": self.tokens, "temperature": 0, "stream": True,
        }  # fmt: skip


@dataclass(frozen=True)
class Shot:
    """What a client saw of one request.

    Attributes:
        ttft_s: seconds to the first piece of the answer.
        whole_s: seconds to its end.
        gaps_s: seconds between pieces.
    """

    ttft_s: float
    whole_s: float
    gaps_s: tuple[float, ...]


@contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """Run `chunkcache serve` in a process of its own; yield its URL.

    Raises:
        ChunkCacheError: it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "chunkcache", "serve", model, "--port", port, "--name", "model", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise ChunkCacheError(f"the server did not come up: {process.communicate()[1].strip()[-400:]}")
            time.sleep(0.1)
        try:
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


class Clients:
    """Processes that ask a server; to be used as a context manager.

    Args:
        most: how many may ask at once.
    """

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._manager = context.Manager()
        self._pool = ProcessPoolExecutor(most, context)

    def ask(self, url: str, asked: Sequence[Sequence[Ask]]) -> tuple[list[list[Shot]], float]:
        """Send the requests of several clients, each of which asks one after the other.

        Returns:
            what each saw; seconds from when all were ready to the last answer.
        """
        ready = self._manager.Barrier(len(asked))
        runs = list(self._pool.map(_client, [url] * len(asked), asked, [ready] * len(asked)))
        return [shots for shots, _, _ in runs], max(end for _, _, end in runs) - min(start for _, start, _ in runs)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._manager.shutdown()


def send(client: httpx.Client, url: str, ask: Ask) -> Shot:
    """Send one request, and read its answer to the end.

    Raises:
        httpx.HTTPStatusError: it was answered with an error.
    """
    started = time.perf_counter()
    times = []
    with client.stream("POST", f"{url}/v1/chat/completions", json=ask.body("model")) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {") and _has_text(json.loads(line[6:])):
                times.append(time.perf_counter())
    ended = time.perf_counter()
    first = times[0] if times else ended
    return Shot(first - started, ended - started, tuple(later - earlier for earlier, later in pairwise(times)))


def _client(url: str, asked: Sequence[Ask], ready: Any) -> tuple[list[Shot], float, float]:
    with httpx.Client(timeout=None) as client:
        ready.wait()
        started = time.time()
        shots = [send(client, url, ask) for ask in asked]
        return shots, started, time.time()


def _has_text(event: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def summary(results: Results) -> dict[str, Any]:
    """Return tables of what was measured, and the figures that they show."""
    rows = results.rows
    by = {
        part: [row for row in rows if row["part"] == part] for part in ("overhead", "throughput", "decode", "stall")
    }
    tables, found = [], {}
    if by["overhead"]:
        extra = [1000 * (row["served_s"] - row["alone_s"]) for row in by["overhead"]]
        found["overhead_ms"] = statistics.median(extra)
        tables.append({
            "title": "One client, against the wrapper alone", "columns": ["requests", "HTTP and scheduling, ms"],
            "rows": [[len(extra), found["overhead_ms"]]],
        })  # fmt: skip
    if by["throughput"]:
        rates = {row["reuse"]: row for row in by["throughput"]}
        found["requests_per_s"] = {name: row["requests"] / row["wall_s"] for name, row in rates.items()}
        tables.append({
            "title": "Clients at once", "columns": ["reuse", "clients", "requests/s", "TTFT p50, s", "TTFT p90, s"],
            "rows": [
                [name, row["clients"], found["requests_per_s"][name], row["ttft_p50_s"], row["ttft_p90_s"]]
                for name, row in rates.items()
            ],
        })  # fmt: skip
    if by["decode"]:
        speeds = {row["clients"]: row["tokens"] / row["wall_s"] for row in by["decode"]}
        found["tokens_per_s"] = speeds
        tables.append({
            "title": "Decoding", "columns": ["clients", "tokens/s"], "rows": [[n, v] for n, v in speeds.items()],
        })  # fmt: skip
    if by["stall"]:
        steps = [row["longest_gap_s"] / row["median_gap_s"] for row in by["stall"]]
        found["stall_steps"] = max(steps)
        tables.append({
            "title": "Longest gap of a running answer while another prompt is prefilled",
            "columns": ["prompts", "longest, in decoding steps", "median step, ms"],
            "rows": [[len(steps), max(steps), 1000 * statistics.median(row["median_gap_s"] for row in by["stall"])]],
        })  # fmt: skip
    return {**found, "tables": tables}
