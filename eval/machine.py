"""What a measurement ran on: the machine, the model and the versions, down to the commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import chunkcache
from chunkcache.kv.device import name as device_name

PACKAGE = Path(chunkcache.__file__).parent
SEED = 0  # decoding is greedy; the seed is for models that draw something even so


def ran_on(model: PreTrainedModel) -> dict[str, Any]:
    """Return what rows that are to be compared must agree in, besides their settings."""
    device = model.device
    return {
        "model": Path(model.config._name_or_path).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
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


def code(package: Path = PACKAGE) -> str:
    """Return the checksum of a package's source, by the paths of its modules: the same of a checkout and a wheel.

    The commit's name is no part of it, nor whether a folder is one itself or a link to one.
    """
    checksum = hashlib.sha256()
    for name, path in sorted(_modules(package)):
        checksum.update(name.encode() + b"\0" + path.read_bytes())
    return checksum.hexdigest()[:12]


def _modules(package: Path) -> Iterator[tuple[str, Path]]:
    """Yield each module's path below the package, and its file; a folder that is linked twice counts once."""
    seen = {package.resolve()}
    for folder, folders, names in os.walk(package, followlinks=True):
        real = {Path(folder, name).resolve(): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for path, name in real.items() if path not in seen)
        seen |= real.keys()
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            yield path.relative_to(package).as_posix(), path


def commit(package: Path = PACKAGE) -> str | None:
    """Return the commit of the source tree, with `+` if its code was changed since.

    None where no repository tracks the package: an installed copy may lie in the folder of another project's.
    """
    folders = {package.resolve(), *(entry.resolve() for entry in package.iterdir() if entry.is_symlink())}
    try:
        _git(package, "ls-files", "--error-unmatch", "--", "__init__.py")
        head = _git(package, "rev-parse", "--short=10", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", *map(str, sorted(folders)))
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(folder: Path, *command: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
