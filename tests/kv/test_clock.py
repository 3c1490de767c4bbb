"""Seconds of stages: each its own, whatever runs inside it."""

from __future__ import annotations

import pytest
import torch

from chunkcache.kv import clock as module
from chunkcache.kv.clock import StageClock, wait_for


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time goes on by one second at each mark."""
    ticks = iter(range(100))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    return StageClock(torch.device("cpu"))


def test_a_stage_counts_what_stages_inside_it_do_not(clock):
    with clock.stage("select"):
        with clock.stage("assemble"), clock.stage("wait"):
            pass
        with clock.stage("select"):
            pass
    assert [clock.seconds(name) for name in ("select", "assemble", "wait")] == [4, 2, 1]
    assert clock.seconds("select", "wait") == 5
    assert clock.seconds("unknown") == 0


def test_a_stage_that_fails_is_over(clock):
    with pytest.raises(ValueError, match="broken"), clock.stage("select"), clock.stage("wait"):
        raise ValueError("broken")
    assert clock.seconds("select", "wait") == 3
    with clock.stage("assemble"):
        pass
    assert clock.seconds("assemble") == 1


def test_marks_are_apart_as_far_as_they_are(clock):
    start, end = clock.mark(), clock.mark()
    assert clock.between(start, end) == 1


def test_what_is_on_the_cpu_is_there_already():
    wait_for(torch.zeros(1))
