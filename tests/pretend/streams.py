"""Streams and events of a pretend device, and which stream wrote or may still read an allocation."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretend.device import PretendDevice

ALWAYS = 2**62  # behind every operation there will be


class On:
    """The pretend device that is on, if any."""

    device: PretendDevice | None = None


class Allocation:
    """What the pretend device knows of one allocation; shared by all views of it."""

    __slots__ = ("home", "used_on", "writer")

    def __init__(self) -> None:
        self.home = current_stream()
        self.writer: tuple[Stream, int] | None = None
        self.used_on: dict[Stream, int] = {}

    def __del__(self) -> None:
        if On.device is None:
            return
        for stream, last in self.used_on.items():
            if stream is not self.home and last > stream.completed and last > self.home.seen.get(stream, 0):
                On.device.violate(
                    "freed while another stream may still use it (no record_stream)", "garbage collection"
                )

    def read(self) -> None:
        """Note that the current stream reads it."""
        stream = current_stream()
        self.used_on[stream] = stream.seq + 1
        if self.writer is None or On.device is None:
            return
        writer, seq = self.writer
        if writer is not stream and seq > writer.completed and stream.seen.get(writer, 0) < seq:
            On.device.violate(f"read on the {stream.name} what the {writer.name} wrote, with no event between")

    def written(self) -> None:
        """Note that the current stream has written it."""
        stream = current_stream()
        stream.seq += 1
        self.writer = (stream, stream.seq)
        self.used_on[stream] = stream.seq

    def record_stream(self, stream: Stream) -> None:
        """Let the allocator wait for `stream` before the memory is given out again."""
        self.used_on.pop(stream, None)
        self.home.seen[stream] = ALWAYS


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    _count = 0

    def __init__(self, device: Any = None, *_: Any, **__: Any) -> None:
        Stream._count += 1
        self.name = f"stream {Stream._count}"
        self.device = device
        self.seq = self.completed = 0
        self.seen: dict[Stream, int] = {}

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.at = (self, self.seq, dict(self.seen))
        event.time = time.perf_counter()
        return event

    def wait_event(self, event: Event) -> None:
        if event.at is None:
            return
        stream, seq, seen = event.at
        for other, n in {**seen, stream: seq}.items():
            self.seen[other] = max(self.seen.get(other, 0), n)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.completed = self.seq
        if On.device is not None:
            On.device.sync("stream.synchronize")

    def query(self) -> bool:
        if On.device is not None and On.device.busy:
            return False
        self.completed = self.seq
        return True


class Event:
    """Stands in for `torch.cuda.Event`; its times are the host's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at: tuple[Stream, int, dict[Stream, int]] | None = None
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self._passed()
        if On.device is not None:
            On.device.sync("event.synchronize")

    def query(self) -> bool:
        if On.device is not None and On.device.busy:
            return False
        self._passed()
        return True

    def elapsed_time(self, other: Event) -> float:
        """Return the milliseconds to `other`, which must have passed."""
        for event in (self, other):
            if event.at is None or event.at[0].completed < event.at[1]:
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (other.time - self.time) * 1e3

    def _passed(self) -> None:
        if self.at is not None:
            self.at[0].completed = max(self.at[0].completed, self.at[1])


DEFAULT = Stream()
DEFAULT.name = "default stream"
_local = threading.local()


def current_stream(device: Any = None) -> Stream:
    return getattr(_local, "stream", None) or DEFAULT


@contextlib.contextmanager
def stream_context(stream: Stream | None) -> Iterator[None]:
    before = getattr(_local, "stream", None)
    if stream is not None:
        _local.stream = stream
    try:
        yield
    finally:
        _local.stream = before
