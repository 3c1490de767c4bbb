"""The peers' environments: one virtual environment each, with pinned versions, made once.

A folder holds `ENVIRONMENT/`, the virtual environment, with a stamp of the requirements it was made from, and
`ENVIRONMENT.log`, what pip said. An environment that cannot be made is removed; its log stays.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from chunkcache.eval.peers.registry import PEERS, PeerSpec, log_of, python_in, spec_of

STAMP = "chunkcache-peer.json"
VENV = (sys.executable, "-m", "venv")  # makes an environment
TIMEOUT_S = 3600.0  # for one environment; llama.cpp is compiled


@dataclass(frozen=True)
class SetUp:
    """What became of a peer's set-up.

    Attributes:
        name: the peer.
        versions: version by package, for those it pins; empty if it was skipped.
        skipped: why it was skipped; None if it is ready.
    """

    name: str
    versions: dict[str, str]
    skipped: str | None = None


def setup_peers(
    folder: Path, names: Iterable[str] = (), on_status: Callable[[str], None] | None = None
) -> list[SetUp]:
    """Make the environments of these peers in `folder`, of all by default; those that are there already are kept.

    Args:
        folder: where; each takes up to 1 GB.
        names: the peers.
        on_status: called with one line before each step that takes time.

    Raises:
        PeerError: there is no peer of a name. One that cannot be set up raises nothing: it is skipped.
    """
    specs = {name: spec_of(name) for name in (names or PEERS)}
    found = setup_environments(folder, specs.values(), on_status)
    return [SetUp(name, *found[spec.environment]) for name, spec in specs.items()]


def setup_environments(
    folder: Path, specs: Iterable[PeerSpec], on_status: Callable[[str], None] | None = None
) -> dict[str, tuple[dict[str, str], str | None]]:
    """Make environments in `folder`; return of each, by its name, the versions in it and why it could not be made."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, tuple[dict[str, str], str | None]] = {}
    with FileLock(folder / ".lock"):
        for spec in specs:
            if spec.environment not in found:
                found[spec.environment] = _environment(folder, spec, on_status or (lambda line: None))
    return found


def _environment(folder: Path, spec: PeerSpec, on_status: Callable[[str], None]) -> tuple[dict[str, str], str | None]:
    """Return the versions in an environment, made if need be, and why it could not be made."""
    home, log = folder / spec.environment, log_of(folder, spec.environment)
    versions = _stamped(home, spec)
    if versions is not None:
        return versions, None
    shutil.rmtree(home, ignore_errors=True)
    on_status(f"setting up {spec.environment}: {log} has the details")
    try:
        with log.open("w", encoding="utf-8") as output:
            for command in (
                [*VENV, str(home)],
                [str(python_in(folder, spec.environment)), "-m", "pip", "install", "--disable-pip-version-check",
                 "--no-input", "--requirement", str(spec.requirements)],
            ):  # fmt: skip
                subprocess.run(command, stdout=output, stderr=output, check=True, timeout=TIMEOUT_S)
        versions = _versions(folder, spec)
        (home / STAMP).write_text(json.dumps({"made_from": _made_from(spec), "versions": versions}), encoding="utf-8")
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(home, ignore_errors=True)
        return {}, _reason(error, log, spec)
    return versions, None


def _made_from(spec: PeerSpec) -> str:
    return hashlib.sha256(spec.requirements.read_bytes() + platform.python_version().encode()).hexdigest()


def _stamped(home: Path, spec: PeerSpec) -> dict[str, str] | None:
    """Return the versions in an environment that was made from these very requirements."""
    try:
        stamp = json.loads((home / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    versions: dict[str, str] = stamp["versions"]
    return versions if stamp["made_from"] == _made_from(spec) else None


def _versions(folder: Path, spec: PeerSpec) -> dict[str, str]:
    """Return the installed versions of the packages that are pinned."""
    pinned = set(re.findall(r"^([\w.-]+)==", spec.requirements.read_text(encoding="utf-8"), re.MULTILINE))
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    command = [str(python_in(folder, spec.environment)), "-I", "-c", code, *sorted(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def _reason(error: Exception, log: Path, spec: PeerSpec) -> str:
    """Return one line on why an environment could not be made."""
    said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    errors = [line.strip() for line in said.splitlines() if line.lstrip().lower().startswith("error:")]
    why = errors[-1] if errors else str(error)
    needs = f"; it needs {spec.needs}" if spec.needs else ""
    return f"{why}{needs}; {log} has all of it"
