"""All calls that only an accelerator has: is one there, streams and events, page-locked memory, and how much is free.

Streams, their events and page-locked memory are used on CUDA (ROCm included) alone. On MPS, XPU and the CPU tensors
are copied by `Tensor.to`, and there is nothing to wait for. Events that time stages are used on every accelerator. It
ran on a pretend device only; it is untested on a GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MEMINFO = Path("/proc/meminfo")
_copy_streams: dict[torch.device, Any] = {}
_lock = threading.Lock()


class Ready(NamedTuple):
    """When tensors on a device have been made.

    Attributes:
        device: where they are.
        event: behind the work that makes them.
        stream: the stream whose memory they are in.
    """

    device: torch.device
    event: Any
    stream: Any


# --- which devices there are


def accelerator() -> torch.device | None:
    """Return the accelerator of this machine, or None."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def devices() -> list[str]:
    """Return the names of the devices that a model can run on, the fastest first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*(["cuda", *cuda] if cuda else []), *mps, "cpu"]


def has_streams(device: torch.device) -> bool:
    """Return whether work on a device is put in streams that have to wait for one another."""
    return device.type == "cuda"


def name(device: torch.device) -> str:
    """Return what the maker calls a CUDA device."""
    return torch.cuda.get_device_name(device)


# --- streams and events; but for `timed_event`, of a device that has streams


def current_stream(device: torch.device) -> Any:
    """Return the stream that this thread works on."""
    return torch.cuda.current_stream(device)


def copy_stream(device: torch.device) -> Any:
    """Return the one stream of this process for copies from and to a device.

    There is one, since torch keeps the memory that was freed on a stream for that stream, and since copies in one
    stream are in order: page-locked memory can be written again once its last reader is in that stream.
    """
    with _lock:
        if device not in _copy_streams:
            new: Any = torch.cuda.Stream
            _copy_streams[device] = new(device)
        return _copy_streams[device]


def working_on(stream: Any) -> AbstractContextManager[Any]:
    """Return a context in which this thread works on a stream."""
    context: AbstractContextManager[Any] = torch.cuda.stream(stream)
    return context


def mark(device: torch.device) -> Ready:
    """Return when what this thread has put into its stream of a device so far is done."""
    stream = current_stream(device)
    return Ready(device, stream.record_event(), stream)


def wait_for(ready: Ready) -> None:
    """Let the stream that this thread works on wait; the host goes on."""
    current_stream(ready.device).wait_event(ready.event)


def keep_for(stream: Any, tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors from being given out again before a stream, which is not their own, has used it."""
    for tensor in tensors:
        tensor.record_stream(stream)


def timed_event(device: torch.device) -> Any:
    """Return an event with a time, behind what was asked of the current stream by now; of any accelerator."""
    module = torch.get_device_module(device)
    event = module.Event(enable_timing=True)
    if hasattr(module, "current_stream"):
        event.record(module.current_stream(device))
    else:  # MPS has one stream
        event.record()
    return event


def order_copies(device: torch.device) -> None:
    """Let the copies of a device wait for what all other devices copy: they may use the same page-locked memory."""
    with _lock:
        others = [stream for other, stream in _copy_streams.items() if other != device]
    for stream in others:
        copy_stream(device).wait_stream(stream)


def synchronize(device: torch.device) -> None:
    """Wait until all work on a device is done; without streams there is nothing to wait for."""
    if has_streams(device):
        torch.cuda.synchronize(device)


# --- memory


def page_locked(nbytes: int) -> Tensor | None:
    """Return `[nbytes]` bytes of page-locked memory, or None if there are none. Torch locks a power of two."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a CUDA device."""
    return int(torch.cuda.mem_get_info(device)[0])


def free_ram() -> int:
    """Return the bytes of RAM that programs can still take without swapping; 0 where the system does not say."""
    with suppress(OSError, ValueError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 0


def reset_peak(device: torch.device) -> int:
    """Start to note the peak of what torch allocates on a CUDA device; return the bytes that it has allocated."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    """Return the most bytes that torch had allocated on a CUDA device since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device)
