"""Servers under load: requests arrive by a Poisson process, for documents of Zipf popularity, whatever waits already.

The rate grows until a server's TTFT p90 passes a limit. The best of the peers is the one that gets furthest; ours is
then asked the same requests at the rate at which that one passed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from chunkcache.errors import PeerError
from chunkcache.eval.data import Case
from chunkcache.eval.peers.environments import setup_environments
from chunkcache.eval.peers.servers import peer_server, server_of
from chunkcache.eval.serving import FUSED, Ask, Clients, Shot
from chunkcache.eval.serving_summary import LIMIT_S, OURS, best_peer, passed
from chunkcache.eval.workload import Workload, at_rate, poisson, zipf_workload
from chunkcache.serve.probe import free_port

FACTOR, STEPS = 1.5, 12  # how the rate grows, and how often


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent.

    Attributes:
        cases: where chunks and questions come from.
        chunks: of each request.
        tokens: length of an answer.
        requests: at each rate.
        skew: exponent of the Zipf law.
        first: rate to begin with, in requests per second.
    """

    cases: Sequence[Case]
    chunks: int
    tokens: int
    requests: int = 40
    skew: float = 0.9
    first: float = 0.25

    @property
    def texts(self) -> list[str]:
        """All chunks."""
        return list(dict.fromkeys(text for case in self.cases for text in case.chunks))

    def step(self, number: int) -> Workload:
        """Return the requests of one rate: other ones at each, which a server has not seen before."""
        return zipf_workload(self.cases, self.requests, self.chunks, len(self.texts), self.skew, seed=number)

    def send(self, clients: Clients, url: str, number: int, rate: float, model: str | None) -> dict[str, Any]:
        """Send one step; `model` is what a peer calls the model, None for ours. Return what its row says."""
        work = self.step(number)
        asks = [
            Ask(each.question, tuple(work.texts(each)), FUSED, self.tokens, plain=model is not None)
            for each in work.requests
        ]
        shots = clients.arrive(url, asks, at_rate(poisson(self.requests, number), rate), model or "model")
        return {"part": "rate", "step": number, "rate": rate, **_figures(shots)}


def _figures(shots: Sequence[Shot]) -> dict[str, Any]:
    ttft = sorted(shot.ttft_s for shot in shots)
    p90 = ttft[math.ceil(0.9 * len(ttft)) - 1]
    return {
        "requests": len(ttft), "failed": sum(math.isinf(each) for each in ttft),
        "without_text": sum(not shot.has_text for shot in shots if not math.isinf(shot.ttft_s)),
        "ttft_p50_s": _told(statistics.median_low(ttft)), "ttft_p90_s": _told(p90),
    }  # fmt: skip


def _told(seconds: float) -> float | None:
    return None if math.isinf(seconds) else seconds  # of one that failed


class Rivals:
    """The search, on one peer after the other, and then on our server.

    Args:
        load: what is sent.
        folder: of the peers' environments.
        weights: gives the path from which a peer reads the weights, by its name and the form that it wants.
        threads: of each server.
        slots: sequences that each decodes together.
        limit_s: for the TTFT p90, in seconds.

    Attributes:
        skipped: why a peer was not measured, by its name.
    """

    def __init__(
        self, load: Load, folder: Path, weights: Callable[[str, str], Path], threads: int, slots: int,
        limit_s: float = LIMIT_S,
    ) -> None:  # fmt: skip
        self._load, self._folder, self._weights = load, folder, weights
        self._threads, self._slots, self._limit_s = threads, slots, limit_s
        self.skipped: dict[str, str] = {}

    def rows(self, names: Sequence[str], clients: Clients) -> Iterator[dict[str, Any]]:
        """Yield a row of each peer and rate.

        One that cannot be set up, or fails, is in `skipped`.
        """
        for name in names:
            environment = server_of(name).environment
            _, reason = setup_environments(self._folder, [environment])[environment.environment]
            try:
                if reason is not None:
                    raise PeerError(reason)
                yield from self._search(name, clients)
            except (PeerError, httpx.HTTPError) as error:
                self.skipped[name] = f"{type(error).__name__}: {error}"
                yield {"part": "rival", "server": name, "skipped": self.skipped[name]}

    def _search(self, name: str, clients: Clients) -> Iterator[dict[str, Any]]:
        spec = server_of(name)
        weights = self._weights(name, spec.environment.weights)
        model = str(weights) if spec.named else "model"
        with peer_server(name, self._folder, weights, free_port(), self._threads, self._slots) as url:
            with httpx.Client(timeout=None) as client:
                for text in self._load.texts if spec.warm else ():
                    client.post(f"{url}{spec.warm}", json={"text": text}).raise_for_status()
            clients.ask(url, [[Ask("Ready?", (), FUSED, 2, plain=True)]], model)  # what the first request sets up
            rate = self._load.first
            for step in range(STEPS):
                row = {"server": name, **self._load.send(clients, url, step, rate, model)}
                yield row
                if passed(row, self._limit_s):
                    return
                rate *= FACTOR

    def ours(self, url: str, rows: Sequence[dict[str, Any]], clients: Clients) -> dict[str, Any] | None:
        """Return the row of our server at the step at which the best peer passed the limit; None where none did."""
        best = best_peer(rows, self._limit_s)
        if best is None:
            return None
        with httpx.Client(timeout=None) as client:
            client.post(f"{url}/v1/chunks", json={"texts": self._load.texts}).raise_for_status()
        return {"server": OURS, **self._load.send(clients, url, best["step"], best["rate"], None)}
