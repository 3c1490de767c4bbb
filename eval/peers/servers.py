"""Servers of other systems, measured beside ours over HTTP: each in its own environment, with the same weights.

All speak OpenAI's `/v1/chat/completions` with streams. A peer is one line in `SERVERS`.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from chunkcache.errors import PeerError
from chunkcache.eval.peers.registry import HERE, PeerSpec, log_of, python_in

START_S = 300.0
SAID = 1500  # characters of a peer's own output that an error quotes at most


@dataclass(frozen=True)
class Settings:
    """What a server is started with.

    Attributes:
        python: of its environment.
        weights: folder or GGUF file.
        port: to listen at.
        threads: to compute with.
        slots: sequences at once.
    """

    python: Path
    weights: Path
    port: int
    threads: int
    slots: int


@dataclass(frozen=True)
class ServerSpec:
    """One server.

    Attributes:
        environment: its environment, and the form in which it reads the weights.
        command: what starts it.
        about: what is measured, in one line.
        warm: a path that takes `{"text": ...}` to compute a text ahead; None where there is none.
        named: whether requests name the model by its path.
    """

    environment: PeerSpec
    command: Callable[[Settings], Sequence[str]]
    about: str
    warm: str | None = None
    named: bool = False


def _transformers(given: Settings) -> list[str]:
    program = given.python.with_name("transformers")
    options = ["--continuous-batching", "--device", "cpu", "--cb-max-memory-percent", "0.2"]
    script = [str(program)] if program.exists() else [str(given.python), "-m", "transformers.cli.transformers"]
    return [*script, "serve", str(given.weights), "--port", str(given.port), *options]


def _llamacpp(reuse: int) -> Callable[[Settings], list[str]]:
    def command(given: Settings) -> list[str]:
        numbers = map(str, (given.port, given.threads, given.slots, reuse))
        return [str(given.python), "-I", str(HERE / "server_llamacpp.py"), str(given.weights), *numbers]

    return command


def _kvboost(given: Settings) -> list[str]:
    options = ["--device", "cpu", "--dtype", "float32", "--model-name", "model", "--max-batch-size", str(given.slots)]
    where = ["--host", "127.0.0.1", "--port", str(given.port)]
    return [str(given.python), "-m", "kvboost.server", "--model", str(given.weights), *where, *options]


_LLAMACPP = PeerSpec("xllamacpp", "", "", "gguf", "a wheel of xllamacpp for this machine")
SERVERS = {
    "transformers": ServerSpec(
        PeerSpec("transformers-serve", "", ""), _transformers, "transformers serve, continuous batching", named=True
    ),
    "llama.cpp": ServerSpec(_LLAMACPP, _llamacpp(0), "llama.cpp's server, reuse of common beginnings"),
    "llama.cpp-reuse": ServerSpec(_LLAMACPP, _llamacpp(64), "llama.cpp's server, reuse of shifted runs of 64 tokens"),
    "kvboost": ServerSpec(PeerSpec("kvboost-serve", "", ""), _kvboost, "kvboost's server, CacheBlend", "/v1/warm"),
}


def server_of(name: str) -> ServerSpec:
    """Return the server called `name`.

    Raises:
        PeerError: there is none.
    """
    if name not in SERVERS:
        raise PeerError(f"there is no server {name!r} to compare with; there are {', '.join(SERVERS)}")
    return SERVERS[name]


@contextmanager
def peer_server(name: str, folder: Path, weights: Path, port: int, threads: int, slots: int) -> Iterator[str]:
    """Run a peer's server; yield its URL.

    Args:
        name: the peer.
        folder: where the environments are.
        weights: what `peer_weights` returned for it.
        port: a free one.
        threads: to compute with.
        slots: sequences that decode together.

    Raises:
        PeerError: it is not set up, or does not come up.
    """
    spec = server_of(name)
    python = python_in(folder, spec.environment.environment)
    if not python.exists():
        log = log_of(folder, spec.environment.environment)
        raise PeerError(f"{name} is not set up in {folder}" + (f", see {log}" if log.exists() else ""))
    command = spec.command(Settings(python, weights, port, threads, slots))
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environ)
        try:
            _wait(name, process, url, said)
            yield url
        finally:
            process.kill()
            process.wait()
            process.stdin.close()  # type: ignore[union-attr]


def _wait(name: str, process: subprocess.Popen[bytes], url: str, said: IO[bytes]) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            said.seek(0)
            told = said.read().decode(errors="replace").strip()[-SAID:]
            raise PeerError(f"the server of {name} did not come up (exit code {process.poll()}). It said: {told}")
        time.sleep(0.2)
