"""Writes down launches, waits, copies and violations, with the line of the project that asked for them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from pretend.seen import CrossDeviceError, Seen
from pretend.streams import current_stream


class Book:
    """What a pretend device writes down.

    Args:
        strict: whether an operation across devices raises, as on a GPU.
        project: only lines of files with one of these in their path are named; others count for the line that
            called them, and what no such line called for the nearest.

    Attributes:
        total: all that happened.
        busy: while True, streams and events say that the device has not got there yet.
    """

    def __init__(self, strict: bool, project: tuple[str, ...]) -> None:
        self.strict, self.project = strict, project
        self.total = Seen()
        self.busy = False
        self._watching: list[Seen] = []
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def watch(self) -> Iterator[Seen]:
        """Count what happens inside."""
        seen = Seen()
        self._watching.append(seen)
        try:
            yield seen
        finally:
            self._watching = [other for other in self._watching if other is not seen]

    def violate(self, what: str, where: str | None = None) -> None:
        where = where or self._where()
        with self._lock:
            for seen in self._books():
                seen.violations[(what, where)] += 1

    def mixed(self, name: str, devices: str) -> None:
        """Write down an operation across devices; raise if strict."""
        self.violate(f"{name} of tensors on {devices}")
        if self.strict:
            raise CrossDeviceError(
                f"Expected all tensors to be on the same device, but found at least two devices, {devices}! ({name})"
            )

    def sync(self, what: str) -> None:
        """The host waits for the current stream."""
        stream = current_stream()
        stream.completed = stream.seq
        where = self._where()
        with self._lock:
            for seen in self._books():
                seen.sync_lines[(what, where)] += 1

    def copied(self, what: str, nbytes: int) -> None:
        where = self._where()
        with self._lock:
            for seen in self._books():
                seen.copies[what] += 1
                seen.copied_bytes[what] += nbytes
                seen.copy_lines[(what, where)] += 1

    def launched(self, name: str, kernels: int) -> None:
        if not kernels or not self._watching:
            return
        where = self._where()
        with self._lock:
            for seen in self._watching:
                seen.launches += kernels
                seen.ops[name] += kernels
                seen.by_line[where] += kernels

    def _books(self) -> list[Seen]:
        return [self.total, *self._watching]

    def _where(self) -> str:
        frame: Any = sys._getframe(2)
        nearest = ""
        while frame is not None:
            name = frame.f_code.co_filename
            place = _place(name, self.project)
            if place:
                here = f"{place}:{frame.f_lineno} {frame.f_code.co_name}"
                if any(part in name for part in self.project):
                    return here
                nearest = nearest or here
            frame = frame.f_back
        return f"({nearest})"


@cache
def _place(name: str, project: tuple[str, ...]) -> str:
    """Return folder and name of a file; nothing for one of the pretend device, of a library or of Python."""
    foreign = ("/tests/pretend/", "/site-packages/", "/lib/python")
    return "" if any(part in name for part in foreign) else "/".join(name.split("/")[-2:])
