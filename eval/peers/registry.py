"""The peers by name: what each runs in, which worker speaks for it, in which form it reads the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chunkcache.errors import PeerError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PeerSpec:
    """One peer.

    Attributes:
        environment: name of its environment, and of its file in `requirements/`.
        worker: module and class of its worker.
        about: what is measured, in one line.
        weights: `folder` for one written by `save_pretrained`, `gguf` for a float32 GGUF file.
        needs: what its set-up needs besides Python; the reason most likely when it fails.
    """

    environment: str
    worker: str
    about: str
    weights: str = "folder"
    needs: str = ""

    @property
    def requirements(self) -> Path:
        """Its pinned requirements."""
        return HERE / "requirements" / f"{self.environment}.txt"


PEERS = {
    "transformers": PeerSpec("transformers", "worker_transformers:Full", "full prefill, no cache"),
    "transformers-prefix": PeerSpec("transformers", "worker_transformers:Prefix", "DynamicCache of the prefix"),
    "kvboost": PeerSpec("kvboost", "worker_kvboost:InOrder", "chunks cached in the order of the request"),
    "kvboost-cacheblend": PeerSpec("kvboost", "worker_kvboost:AnyOrder", "chunks cached one by one, CacheBlend"),
    "llama.cpp": PeerSpec("llamacpp", "worker_llamacpp:PromptCache", "prompt cache of the prefix", "gguf",
                          "a C++ compiler, and about ten minutes to build"),
}  # fmt: skip


def spec_of(name: str) -> PeerSpec:
    """Return the peer called `name`.

    Raises:
        PeerError: there is none.
    """
    if name not in PEERS:
        raise PeerError(f"there is no peer {name!r}; the peers are {', '.join(PEERS)}")
    return PEERS[name]


def python_in(folder: Path, environment: str) -> Path:
    """Return the Python of an environment."""
    return folder / environment / "bin" / "python"


def log_of(folder: Path, environment: str) -> Path:
    """Return the file in which the set-up of an environment keeps what pip said."""
    return folder / f"{environment}.log"
