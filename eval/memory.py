"""Peak memory of a block of code, from the operating system or from CUDA."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from chunkcache.kv import device as devices
from chunkcache.kv.heap import trim

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Context that notes how far memory rises above where it stood; `.nbytes` afterwards, None if unknown.

    On CUDA it is what torch allocated; elsewhere it is the resident set of the process, known on Linux only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.nbytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            self._before = devices.reset_peak(self._device)
        elif _CLEAR_REFS.exists():
            trim()  # what is kept for reuse would hide a part of what the block allocates
            _CLEAR_REFS.write_text("5")  # resets the high-water mark to what is resident now
            self._before = _resident("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.nbytes = devices.peak(self._device) - self._before
        elif _CLEAR_REFS.exists():
            self.nbytes = _resident("VmHWM") - self._before


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
