"""Kernels in Triton for what a selective prefill does in every layer; off unless `CHUNKCACHE_KERNELS=triton` asks.

The torch path is their reference. They are tested in Triton's interpreter on the CPU, and have not run on a GPU yet.
This module imports no Triton: `assembly` and `attention` do.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from chunkcache.errors import InputError

VARIABLE = "CHUNKCACHE_KERNELS"
CHOICES = ("torch", "triton")
DEVICES = ("cuda", "xpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does


def check_kernels() -> str:
    """Return which kernels `CHUNKCACHE_KERNELS` asks for, `torch` by default.

    Raises:
        InputError: there are no such kernels, or Triton is not installed.
    """
    chosen = os.environ.get(VARIABLE) or "torch"
    if chosen not in CHOICES:
        raise InputError(f"{VARIABLE}={chosen!r} is unknown: set it to {' or '.join(CHOICES)}, or not at all")
    if chosen == "triton" and find_spec("triton") is None:
        raise InputError(
            f"{VARIABLE}=triton needs Triton, which is not installed: pip install 'chunkcache[triton]', or unset it"
        )
    return chosen


def serve(device: torch.device) -> bool:
    """Return whether the kernels are asked for and run on `device`; in Triton's interpreter they do on the CPU."""
    return (INTERPRETED or device.type in DEVICES) and os.environ.get(VARIABLE) == "triton"
