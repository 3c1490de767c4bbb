"""One module has the calls that only an accelerator has: so there is one place to look at for another kind of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from pretend import PretendDevice

import chunkcache
from chunkcache.kv import device as devices

PACKAGE = Path(chunkcache.__file__).parent
ONLY = re.compile(r"torch\.(cuda|mps|xpu|accelerator|backends\.mps|Stream|Event)\b|pin_memory|record_stream")


def sources():
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def test_nothing_else_calls_what_only_an_accelerator_has():
    found = {str(path.relative_to(PACKAGE)) for path in sources() if ONLY.search(path.read_text())}
    found = {name for name in found if not name.startswith("eval/gpu/")}  # measures these calls themselves
    assert found == {"kv/device.py"}


def test_there_is_one_copy_stream_for_each_device():
    with PretendDevice(count=2):
        first, second = (devices.copy_stream(torch.device("cuda", index)) for index in range(2))
        assert first is devices.copy_stream(torch.device("cuda", 0))
        assert first is not second


def test_the_copies_of_one_device_wait_for_those_of_the_others():
    with PretendDevice(count=2):
        first, second = (devices.copy_stream(torch.device("cuda", index)) for index in range(2))
        with devices.working_on(second):
            torch.ones(2, device="cuda:1")
        devices.order_copies(torch.device("cuda", 0))
        assert first.is_behind(second, second.seq)


def test_free_memory_is_told_of_the_device_and_of_the_machine():
    with PretendDevice():
        assert devices.free_bytes(torch.device("cuda")) > 0
    assert devices.free_ram() > 2**20


def test_without_page_locked_memory_there_is_none():
    assert not torch.cuda.is_available()
    assert devices.page_locked(64) is None


@pytest.mark.parametrize("kind", ["mps", "xpu", "cpu"])
def test_other_devices_have_no_streams_to_wait_for(kind):
    assert not devices.has_streams(torch.device(kind))
    devices.synchronize(torch.device(kind))
