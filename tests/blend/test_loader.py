"""Loading ahead of the model: in order, not too far, once each, and whatever goes wrong reaches who takes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from chunkcache.blend.loader import Loader
from chunkcache.errors import EntryLostError

CPU = torch.device("cpu")


class Slow(Sequence):
    """Layers that note when they are read, and wait for leave to be."""

    def __init__(self, count=6, fail_at=None):
        self.read, self.count, self.fail_at = [], count, fail_at
        self.leave = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reached.release()
        self.leave.acquire()
        if index == self.fail_at:
            raise EntryLostError("abc", "it was only for the test")
        self.read.append(index)
        return torch.full((2, 1, 1, 2), float(index))


def test_layers_come_in_order_and_no_more_than_the_depth_ahead():
    source = Slow()
    loader = Loader([source], CPU, depth=2)
    for _ in range(3):
        source.leave.release()
    assert float(loader.take(0)[0].max()) == 0.0
    for _ in range(3):
        source.reached.acquire()
    assert source.read == [0, 1, 2] or source.read == [0, 1]
    for _ in range(3):
        source.leave.release()
    assert [float(loader.take(index)[0].max()) for index in range(1, 6)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert source.read == list(range(6))
    loader.close()


def test_a_layer_that_is_lost_is_so_for_who_takes_it():
    source = Slow(fail_at=1)
    for _ in range(6):
        source.leave.release()
    loader = Loader([source], CPU, depth=1)
    with pytest.raises(EntryLostError, match="abc"):
        [loader.take(index) for index in range(2)]  # it may be known as soon as for the first
    loader.close()


def test_closing_ends_the_thread():
    source = Slow()
    for _ in range(6):
        source.leave.release()
    loader = Loader([source], CPU, depth=1)
    loader.take(0)
    loader.close()
    loader._thread.join(10)
    assert not loader._thread.is_alive()
    assert len(source.read) < 6
