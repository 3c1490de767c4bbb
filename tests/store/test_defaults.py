"""The store of a model that none was named for."""

from __future__ import annotations

import pytest
import torch
from pretend import PretendDevice

from chunkcache.kv import device as devices
from chunkcache.store import DeviceStore, default_store, open_store

GIB = 2**30


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(devices, "free_ram", lambda: 40 * GIB)
    monkeypatch.setattr(devices, "free_bytes", lambda place: 20 * GIB)


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_elsewhere_than_on_cuda_it_is_two_gib_of_memory(kind):
    assert default_store({torch.device(kind)}) == "memory://?max_bytes=2GiB"


def test_on_cuda_it_is_a_quarter_of_what_is_free():
    place = torch.device("cuda", 1)
    assert default_store({place}) == "tiered:device://?device=cuda:1&max_bytes=5120MiB|memory://?max_bytes=10240MiB"


def test_of_a_sharded_model_each_device_keeps_its_own():
    places = {torch.device("cuda", index) for index in range(2)}
    assert default_store(places) == "tiered:device://?max_bytes=10240MiB|memory://?max_bytes=10240MiB"


def test_it_opens_and_says_how_much_it_holds():
    with PretendDevice(), open_store(default_store({torch.device("cuda:0")})) as store:
        budgets = {name: tier.stats().max_bytes for name, tier in store.tiers().items()}
        assert budgets == {"device": 5 * GIB, "memory": 10 * GIB}
        assert isinstance(store.tiers()["device"], DeviceStore)


def test_where_the_system_does_not_say_how_much_is_free_it_is_as_on_a_cpu(monkeypatch):
    monkeypatch.setattr(devices, "free_ram", lambda: 0)
    assert default_store({torch.device("cuda:0")}) == "memory://?max_bytes=2GiB"
