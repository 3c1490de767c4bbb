"""A peer, as the benchmark sees it: a process that is started, warmed and asked, and that may fail without harm."""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkcache.errors import PeerError
from chunkcache.eval.peers.registry import HERE, PeerSpec, log_of, python_in, spec_of
from chunkcache.prompt import Prompt

if TYPE_CHECKING:
    from typing_extensions import Self  # mypy has it; typing's own is of Python 3.11

TIMEOUT_S = 600.0  # for one reply
SAID = 2000  # characters of a peer's own output that an error quotes at most


@dataclass(frozen=True)
class PeerAnswer:
    """A peer's answer to one prompt.

    Attributes:
        ttft_s: wall time from the ids in hand to the first token id, in seconds.
        token_ids: the greedy answer, an end-of-sequence token included.
        logits: of the first token `[vocab]`, float32; None if the peer gives none.
    """

    ttft_s: float
    token_ids: list[int]
    logits: Tensor | None


class Worker:
    """A running process that is asked for one thing after the other. Made by `run`; a context manager that ends it.

    Attributes:
        name: what it is called in results.
        versions: version by package.
        settings: what it was set to, as it tells it.

    Every method raises `PeerError` when the process answers with an error, answers garbage, dies, or does not answer
    in time; it has ended then, unless it was an error that it told itself.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], said: IO[bytes], timeout_s: float) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self._process, self._said, self._timeout_s = process, said, timeout_s
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def run(
        cls, name: str, python: Path, arguments: Sequence[str], model_path: Path, threads: int, timeout_s: float
    ) -> Self:
        """Start a process and load a model.

        Args:
            name: what it is called.
            python: the Python to run it with.
            arguments: of `worker.py`: module and class, and what else that reads there.
            model_path: the weights.
            threads: threads to compute with.
            timeout_s: how long to wait for a reply, in seconds.
        """
        said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        process = subprocess.Popen(
            [str(python), "-I", str(HERE / "worker.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            env={**os.environ, **_environ(threads)},
        )
        worker = cls(name, process, said, timeout_s)
        try:
            reply = worker._ask(op="load", model=str(model_path), threads=threads)
            with worker._understood():
                worker.versions, worker.settings = reply["versions"], reply["settings"]
        except BaseException:
            worker.close()
            raise
        return worker

    @property
    def ended(self) -> bool:
        """Whether its process is no more."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        with suppress(BrokenPipeError):  # what was still to be sent to one that died
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.stdout.close()  # type: ignore[union-attr]
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the reply."""
        if self._process.poll() is not None:
            raise self._failed(f"has ended with exit code {self._process.returncode}")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            raise self._failed("has ended") from None
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            raise self._failed(f"did not answer within {self._timeout_s:g} s") from None
        if not line:
            raise self._failed(f"died with exit code {self._process.wait()}")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._failed(f"answered what is no reply: {line[:80]!r}")
        if "error" in reply:
            raise PeerError(f"the peer {self.name} could not do its part ({request['op']}): {reply['error']}")
        return reply

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Take a reply that lacks what is read, or holds something else there, for the end of the process."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._failed(f"answered what is no answer ({error!r})") from None

    def _failed(self, what: str) -> PeerError:
        """Return the error for a process that cannot go on, which is ended."""
        self._process.kill()
        self._process.wait()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()[-SAID:]
        return PeerError(f"{self.name} {what}" + (f". It said: {said}" if said else ""))

    def _read(self) -> None:
        """Hand over each line of the process, and an empty one at the end."""
        for line in self._process.stdout:  # type: ignore[union-attr]
            self._lines.put(line)
        self._lines.put("")


class Peer(Worker):
    """A running peer, by its name in the registry."""

    @classmethod
    def start(
        cls,
        name: str,
        folder: Path,
        model_path: Path,
        threads: int,
        *,
        timeout_s: float = TIMEOUT_S,
        python: Path | None = None,
    ) -> Self:
        """Start the peer called `name` and load its model.

        Args:
            name: the peer.
            folder: where `setup_peers` put the environments.
            model_path: what `peer_weights` returned for it.
            threads: threads to compute with.
            timeout_s: how long to wait for a reply, in seconds.
            python: the Python to run it with, instead of that of its environment.
        """
        spec = spec_of(name)
        python = python or _python(name, folder, spec)
        return cls.run(name, python, [spec.worker], model_path, threads, timeout_s)

    def warm(self, parts: list[list[int]]) -> None:
        """Let it compute ahead what it can of a prompt but its last part, the question, which is not sent."""
        self._ask(op="warm", parts=parts[:-1])

    def answer(self, parts: list[list[int]], answer_tokens: int) -> PeerAnswer:
        """Let it answer the prompt made of `parts`, greedily, with at most so many tokens."""
        reply = self._ask(op="answer", parts=parts, answer_tokens=answer_tokens)
        with self._understood():
            coded = reply.get("logits")
            logits = None if coded is None else decoded(coded)
            return PeerAnswer(float(reply["ttft_s"]), [int(token) for token in reply["answer"]], logits)


def decoded(coded: str) -> Tensor:
    """Return the logits, float32, that a worker has coded, one behind the other."""
    return torch.frombuffer(bytearray(base64.b64decode(coded)), dtype=torch.float32)


def parts(prompt: Prompt) -> list[list[int]]:
    """Return the token ids of a prompt as prefix, chunks and question; what stands before a chunk belongs to it."""
    stops = [prompt.prefix_tokens, *(span.stop for span in prompt.spans)]
    chunks = [list(prompt.token_ids[start:stop]) for start, stop in pairwise(stops)]
    return [list(prompt.prefix), *chunks, list(prompt.question)]


def _python(name: str, folder: Path, spec: PeerSpec) -> Path:
    """Return the Python of a peer's environment."""
    python = python_in(folder, spec.environment)
    if not python.exists():
        log = log_of(folder, spec.environment)
        failed = f"its set-up failed, see {log}" if log.exists() else "it is not set up"
        raise PeerError(f"the peer {name} is not in {folder}: {failed}; run `chunkcache bench peers --into {folder}`")
    return python


def _environ(threads: int) -> dict[str, str]:
    """Return the environment variables of a peer: no network, and so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
