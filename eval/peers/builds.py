"""Another build of chunkcache as the benchmark sees it: a checkout that runs its own code in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from chunkcache.errors import PeerError
from chunkcache.eval.data import Case
from chunkcache.eval.peers.client import TIMEOUT_S, Worker, decoded

if TYPE_CHECKING:
    from typing_extensions import Self  # mypy has it; typing's own is of Python 3.11

BUILD = "build:"  # what the name of another build begins with where policies are named


def build_name(checkout: Path) -> str:
    """Return what the build in a checkout is called in results, by its commit.

    Raises:
        PeerError: there is no chunkcache, or no commit to name it by.
    """
    if not (checkout / "chunkcache" / "__init__.py").is_file():
        raise PeerError(f"{checkout} is no checkout of chunkcache: it has no chunkcache/__init__.py")
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise PeerError(f"the commit of {checkout} is not known: {str(said).strip()}; use a git clone") from None
    return BUILD + told.stdout.strip()


class Build(Worker):
    """A running build; see `worker_build`."""

    @classmethod
    def start(cls, checkout: Path, model_path: Path, threads: int, *, timeout_s: float = TIMEOUT_S) -> Self:
        """Start the build in a checkout, under the Python of this process, and load a model from a folder."""
        arguments = ["worker_build:Build", str(checkout.absolute())]
        return cls.run(build_name(checkout), Path(sys.executable), arguments, model_path, threads, timeout_s)

    def warm(self, case: Case) -> None:
        """Let it compute the chunks of a prompt ahead."""
        self._ask(op="prepare", chunks=case.chunks)

    def prefill(self, case: Case) -> dict[str, Any]:
        """Let it prefill a prompt: `ttft_s`, `stages`, `recomputed_share`, and the prompt's `token_ids`."""
        reply = self._ask(op="prefill", question=case.question, chunks=case.chunks)
        with self._understood():
            return {name: reply[name] for name in ("ttft_s", "stages", "recomputed_share", "token_ids")}

    def judge(self, answer: list[int], answer_tokens: int) -> tuple[Tensor, list[int]]:
        """Return the logits `[tokens, vocab]` along an answer of the prompt prefilled last, and its own answer."""
        reply = self._ask(op="judge", answer=answer, answer_tokens=answer_tokens)
        with self._understood():
            return decoded(reply["logits"]).view(len(answer), -1), [int(token) for token in reply["answer"]]
