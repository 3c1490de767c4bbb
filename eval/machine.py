"""What a measurement ran on: the machine, the model and the versions, down to the commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import chunkcache
from chunkcache.blend import parse_policy
from chunkcache.eval.fidelity import ANSWER_TOKENS

PACKAGE = Path(chunkcache.__file__).parent
ROOMS = ("store", "blend", "retriever", "eval")  # links in the package
SEED = 0  # decoding is greedy; the seed is for models that draw something even so


def ran_on(model: PreTrainedModel) -> dict[str, Any]:
    """Return what rows that are to be compared must agree in, besides their settings."""
    device = model.device
    return {
        "model": Path(model.config._name_or_path).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "chunkcache": chunkcache.__version__,
        "code": code(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def meta_data(model: PreTrainedModel, policies: Sequence[str], cases: Sequence[Any]) -> dict[str, Any]:
    """Return what a measurement of policies over cases ran on, and with which settings."""
    options = {policy: str(parse_policy(policy)) for policy in policies}
    asked = {"policies": list(policies), "options": options, "prompts": len(cases), "seed": SEED}
    return {**asked, "answer_tokens": ANSWER_TOKENS, **ran_on(model)}


def code() -> str:
    """Return the checksum of the package's source: of its files by name, whatever the commit is called."""
    found = hashlib.sha256()
    for path in sorted(
        each for room in (PACKAGE, *(PACKAGE / name for name in ROOMS)) for each in room.rglob("*.py")
    ):
        found.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def commit() -> str | None:
    """Return the commit of the source tree, with `+` if its code was changed since; None outside of a checkout."""
    folder = PACKAGE.resolve().parent
    try:
        head = _git(folder, "rev-parse", "--short=10", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--", "chunkcache", *ROOMS)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
