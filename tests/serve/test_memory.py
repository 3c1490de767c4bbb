"""What answers have freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from chunkcache.kv.heap import trim
from chunkcache.serve.memory import trimming

FREED = """
import sys, torch
from pathlib import Path
from chunkcache.kv.heap import trim

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

tensors = [torch.ones(16_000) for _ in range(4_000)]  # 64 kB each
last = tensors[-1]  # keeps the heap from shrinking by itself
del tensors
before = resident()
trim()
print(before - resident())
"""

needs_glibc = pytest.mark.skipif(not trim(), reason="the C library cannot give memory back")


@needs_glibc
def test_what_is_free_is_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6  # of 256 MB


@needs_glibc
def test_it_is_given_back_again_and_again_until_the_end(monkeypatch):
    enough, calls = threading.Event(), []

    def counted():
        calls.append(threading.current_thread())
        if len(calls) == 3:
            enough.set()
        return True

    monkeypatch.setattr("chunkcache.serve.memory.trim", counted)
    with trimming(0.001):
        assert enough.wait(60)
    assert not calls[0].is_alive()
