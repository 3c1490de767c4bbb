"""The machine, its versions, and its ceilings: copies, matrix products, launches."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from chunkcache.eval.gpu.check import Check
from chunkcache.eval.machine import code, commit

LAUNCHES = 2000


def environment(check: Check) -> None:
    """Write down what the check runs on."""
    found: dict[str, Any] = {"commit": commit(), "code": code(), "python": platform.python_version()}
    for package in ("torch", "transformers", "triton"):
        found[package] = None
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["cores"] = os.cpu_count()
    if check.cuda:
        device = torch.cuda.get_device_properties(check.device)
        found |= {"gpu": device.name, "GB": device.total_memory / 1e9, "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found["cudnn in SDPA"] = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    for name, value in found.items():
        check.report.row("Machine", name=name, value=value)
    for name, value in _ceilings(check).items():
        check.report.row("Ceilings", name=name, value=value)


def _ceilings(check: Check) -> dict[str, float]:
    """Return what copies, matrix products and launches reach here."""
    nbytes = 1 << (18 if check.options.smoke else 28)
    one, two = (torch.empty(nbytes, dtype=torch.uint8, device=check.device) for _ in range(2))
    host = torch.empty(nbytes, dtype=torch.uint8)
    pinned = host.pin_memory() if check.cuda else host
    size = 256 if check.options.smoke else 8192
    left, right = (torch.randn(size, size, device=check.device, dtype=check.dtype) for _ in range(2))
    works: dict[str, tuple[Callable[[], object], float]] = {
        "on the device, GB/s": (lambda: two.copy_(one), 2 * nbytes / 1e6),
        "to the device, pinned, GB/s": (lambda: one.copy_(pinned, non_blocking=True), nbytes / 1e6),
        "to the device, pageable, GB/s": (lambda: one.copy_(host), nbytes / 1e6),
        "to the host, pinned, GB/s": (lambda: pinned.copy_(one, non_blocking=True), nbytes / 1e6),
        "to the host, pageable, GB/s": (lambda: host.copy_(one), nbytes / 1e6),
        f"matrix products of {size}, TFLOP/s": (lambda: left @ right, 2 * size**3 / 1e9),
    }
    found = {name: amount / check.each_milliseconds(work, 5) for name, (work, amount) in works.items()}
    small = torch.ones(8, device=check.device)
    check.wait()
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        small.add_(1)
    launched = time.perf_counter() - started
    check.wait()
    found["host time of a launch, us"] = launched / LAUNCHES * 1e6
    found["time of a launch, us"] = (time.perf_counter() - started) / LAUNCHES * 1e6
    return found
