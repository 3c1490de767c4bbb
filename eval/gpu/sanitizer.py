"""Races between streams and faults of memory: the same requests in a process of its own, under sanitizers.

torch's CUDA sanitizer (TORCH_CUDA_SANITIZER, csan) sees races between streams; NVIDIA's compute-sanitizer, where it
is installed, sees reads and writes out of bounds in kernels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from chunkcache.eval.gpu.check import Check
from chunkcache.eval.gpu.exactness import STD, outcomes
from chunkcache.eval.gpu.made import make_model

DONE = "all requests answered"
POLICIES = ("link:k=4", "cacheblend:ratio=0.2", "query:ratio=0.1", "cachecraft")
STORES = ("memory://", "memory://?codec=int8", "tiered:device://|memory://")
FOUND = ("CSAN detected", "ERROR SUMMARY:")
TABLE = "Sanitizers"


def sanitizer(check: Check) -> None:
    """Run the requests under each sanitizer that is there; on the CPU without one."""
    command = [sys.executable, "-m", "chunkcache.eval.gpu.sanitizer", str(check.device)]
    if not check.cuda:
        _run(check, "none", command, {})
        return
    _run(check, "csan", command, {"TORCH_CUDA_SANITIZER": "1"})
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        check.report.row(TABLE, sanitizer="compute-sanitizer", outcome="not installed")
    elif check.has(20, "compute-sanitizer"):
        _run(
            check,
            "compute-sanitizer",
            [tool, "--tool", "memcheck", *command],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


def _run(check: Check, name: str, command: list[str], environment: dict[str, str]) -> None:
    seconds = 60 if check.options.smoke else max(check.left, 20.0)
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        check.report.row(TABLE, sanitizer=name, outcome="not finished")
        check.report.add_left_out(f"{name}: not finished in {seconds:.0f} s")
        return
    text = done.stdout + done.stderr
    lines = [line for line in text.splitlines() if any(mark in line for mark in FOUND)]
    lines = [line for line in lines if "ERROR SUMMARY: 0 errors" not in line]
    if lines or done.returncode or DONE not in text:
        check.report.row(TABLE, sanitizer=name, outcome="faults")
        check.report.add_wrong(f"{name}: {lines[0] if lines else text[-600:]}")
    else:
        check.report.row(TABLE, sanitizer=name, outcome="clean")


def main(device: str) -> None:
    """Serve some requests with a toy model on this device."""
    from pathlib import Path

    from chunkcache.eval.gpu.check import Options

    check = Check(Options(smoke=True, device=device, out=Path(os.devnull)))
    for store in STORES if check.cuda else STORES[:2]:
        model = make_model("toy", torch.bfloat16, device, STD)
        outcomes(check, model, POLICIES, store)
    check.wait()
    print(DONE)


if __name__ == "__main__":
    main(sys.argv[1])
