"""The rows of a measurement, in a file that grows as they come.

A file is JSON Lines. Its first line says what was measured, with which settings, and on what; each line below is a
row. So a run that was interrupted goes on where it stopped, and rows of different settings never share a file: one
that was made with others, or on another machine, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from chunkcache.errors import ResultsError

FORMAT = 1
SUFFIX = ".jsonl"
FULL = "full"  # the policy that all are compared with
PLAIN = "plain"  # where policies are named: the model alone, with nothing of ours, which `full` must be as fast as
PEER = "peer:"  # what a peer's name has before it where policies are named
Row = dict[str, Any]


@dataclass
class Results:
    """What a measurement found so far.

    Attributes:
        bench: which measurement: `requests`, `load`, ...
        settings: what was asked for; rows of one file agree in all of it.
        ran_on: machine, code and versions; rows of one file agree in these, too, but for the commit: what counts is
            the code.
        rows: plain dicts, in the order they came.
        started: when the first row was about to be measured, ISO 8601 in UTC.
    """

    bench: str
    settings: dict[str, Any]
    ran_on: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    _file: Any = field(default=None, repr=False)
    _lock: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, path: Path | None, bench: str, settings: dict[str, Any], ran_on: dict[str, Any]) -> Results:
        """Begin a results file, or go on with it; without a path, keep the rows in memory only. Close it afterwards.

        Raises:
            ResultsError: the file holds rows of another measurement, of other settings or of another machine; it is
                damaged; or another process is writing to it.
        """
        fresh = cls(bench, _plain(settings), _plain(ran_on))
        if path is None:
            return fresh
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResultsError(
                f"{path} is being written by another run; wait for it, or name another folder"
            ) from None
        try:
            found = cls._resume(path, fresh) if path.exists() and b"\n" in path.read_bytes() else fresh
            mode = "w" if found is fresh else "a"
            found._file, found._lock = open(path, mode, encoding="utf-8"), lock  # noqa: SIM115 - closed by close()
            if found is fresh:
                head = {"bench": bench, "settings": fresh.settings, "ran_on": fresh.ran_on, "started": fresh.started}
                found._write({"chunkcache_results": FORMAT, **head})
        except BaseException:
            lock.release()
            raise
        return found

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a results file, without a last line that was cut off.

        Raises:
            ResultsError: it is no results file, or damaged.
        """
        return cls._parse(path)[0]

    def add(self, row: Row) -> None:
        """Take a row, and see to it that it is on disk."""
        self.rows.append(_plain(row))
        if self._file is not None:
            self._write(row)

    def done(self, **fields: Any) -> bool:
        """Return whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in fields.items()) for row in self.rows)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._lock.release()
            self._file = None

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    @classmethod
    def _resume(cls, path: Path, fresh: Results) -> Results:
        found, whole = cls._parse(path)
        if found.bench != fresh.bench:
            raise ResultsError(f"{path} holds a measurement of {found.bench}, not of {fresh.bench}")
        for name, there, now in [
            *_differences(found.settings, fresh.settings),
            *_differences(found.ran_on, fresh.ran_on),
        ]:
            raise ResultsError(
                f"{path} was measured with {name}={there!r}, and this run has {now!r}: rows of both in one file "
                "would mix two experiments. Name another folder, or delete the file"
            )
        if whole < path.stat().st_size:  # a row was cut off
            os.truncate(path, whole)
        return found

    @classmethod
    def _parse(cls, path: Path) -> tuple[Results, int]:
        """Return the results, and how many bytes of the file hold whole lines."""
        try:
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            head, *rows = [json.loads(line) for line in data[:whole].splitlines()]
            if head["chunkcache_results"] != FORMAT:
                raise ResultsError(f"{path} has format {head['chunkcache_results']}; this version reads {FORMAT}")
            return cls(head["bench"], head["settings"], head["ran_on"], rows, head["started"]), whole
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} is not a file of results, or is damaged: {error!r}") from None


def read_folder(folder: Path) -> dict[str, Results]:
    """Return all results of a folder by the names of their files, in alphabetical order.

    Raises:
        ResultsError: there are none, or one is damaged.
    """
    found = {path.stem: Results.read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not found:
        raise ResultsError(f"{folder} has no results (*{SUFFIX}); `chunkcache bench all --out {folder}` makes some")
    return found


def _differences(there: dict[str, Any], now: dict[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    for name in sorted({*there, *now}):
        if name != "commit" and there.get(name) != now.get(name):
            yield name, there.get(name), now.get(name)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as they read back from JSON, so that they compare equal with those of a file."""
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return plain
