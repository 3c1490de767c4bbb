"""Loading onto a pretend accelerator: by the copy stream where memory is page-locked, else in a thread."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from pretend import PretendDevice, Stream
from support.store import key, memory_store

from chunkcache.blend.loader import Loader
from chunkcache.kv import ChunkKV, LazyLayers, transfer
from chunkcache.kv import device as devices
from chunkcache.kv.transfer import WantedLayers

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
LAYERS = 8


@pytest.fixture
def device():
    with PretendDevice() as on:
        yield on


def plain(seed, layers=LAYERS, tokens=3):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 1, tokens, 4, generator=generator) for _ in range(layers))


def there(layers):
    return tuple(layer.to(CUDA) for layer in layers)


def pinned(layers, codec="raw"):
    store = memory_store(codec=codec)
    store.put(key(1), ChunkKV.of(range(layers[0].shape[2]), 3, there(layers)))
    store.flush()
    return store.get(key(1), None).layers


class Lazy(LazyLayers):
    def __init__(self, layers):
        super().__init__(tuple(tuple(layer.shape) for layer in layers), waits=True)
        self.layers, self.threads = layers, set()

    def read(self, index):
        self.threads.add(threading.current_thread().name)
        return self.layers[index]


def taken(sources, place=CUDA, depth=2):
    """Take all layers, use each on the stream of this thread, and return what they were."""
    loader, used = Loader(sources, place, depth), []
    for index in range(LAYERS):
        used.append([layer + 0 for layer in loader.take(index)])
    loader.close()
    return loader, [[layer.to("cpu") for layer in layers] for layers in used]


def same(got, *sources):
    return all(torch.equal(got[i][n], source[i]) for n, source in enumerate(sources) for i in range(LAYERS))


@pytest.mark.parametrize("run_bytes", [1, 2**9, 2**20])
@pytest.mark.parametrize("depth", [0, 1, 2, 20])
def test_page_locked_layers_come_without_a_thread_and_without_a_wait(device, monkeypatch, run_bytes, depth):
    monkeypatch.setattr(transfer, "RUN_BYTES", run_bytes)
    one, two = plain(1), plain(2, tokens=70)
    sources = [pinned(one), pinned(two)]
    with device.watch() as seen:
        loader = Loader(sources, CUDA, depth)
        used = [[layer + 0 for layer in loader.take(index)] for index in range(LAYERS)]
    assert loader._thread is None
    assert not seen.syncs
    assert not seen.copies.keys() - {"H2D pinned, async"}
    assert seen.copied_bytes["H2D pinned, async"] == sum(len(run.data) for source in sources for run in source.runs)
    assert same([[layer.to("cpu") for layer in layers] for layers in used], one, two)
    assert not device.total.violations


def test_copies_go_ahead_of_who_takes_by_the_depth(device, monkeypatch):
    monkeypatch.setattr(transfer, "RUN_BYTES", 1)
    loader = Loader([pinned(plain(1))], CUDA, depth=2)
    enqueued = []
    for index in range(LAYERS):
        with device.watch() as seen:
            loader.take(index)
        enqueued.append(seen.copies["H2D pinned, async"])
    assert enqueued == [3, 1, 1, 1, 1, 1, 0, 0]


def test_memory_on_the_device_does_not_grow_with_the_layers(device, monkeypatch):
    monkeypatch.setattr(transfer, "RUN_BYTES", 1)
    source = pinned(plain(1))
    loader = Loader([source], CUDA, depth=2)
    layers = [loader.take(index)[0].data_ptr() for index in range(LAYERS)]
    assert len(set(layers)) == 4


@pytest.mark.parametrize("run_bytes", [1, 2**9])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_may_be_used_until_those_a_depth_further_on_are_taken(device, monkeypatch, run_bytes, depth):
    monkeypatch.setattr(transfer, "RUN_BYTES", run_bytes)
    layers = plain(1)
    loader, used = Loader([pinned(layers)], CUDA, depth), []
    for first in range(0, LAYERS, depth):
        group = [loader.take(index)[0] for index in range(first, min(first + depth, LAYERS))]
        used += [layer + 0 for layer in group]
    assert all(torch.equal(a.to("cpu"), b) for a, b in zip(used, layers, strict=True))
    assert not device.total.violations


@pytest.mark.parametrize("fault", [None, "arrival", "overwritten", "record"])
def test_streams_are_kept_apart(device, monkeypatch, fault):
    monkeypatch.setattr(transfer, "RUN_BYTES", 1)
    source = pinned(plain(1))
    if fault == "arrival":
        monkeypatch.setattr(devices, "wait_for", lambda ready: None)
    if fault == "overwritten":
        monkeypatch.setattr("chunkcache.blend.loader._Track.overwrites", lambda *_: False)
    if fault == "record":
        monkeypatch.setattr(devices, "keep_for", lambda *_: None)
    with torch.cuda.stream(Stream()):
        loader = Loader([source], CUDA, depth=2)
        used = [loader.take(index)[0] + 0 for index in range(LAYERS)]
        del loader, used
    found = " ".join(what for what, _ in device.total.violations)
    message = {
        None: "",
        "arrival": "no event between",
        "overwritten": "while the stream",
        "record": "no record_stream",
    }[fault]
    assert message in found
    assert bool(found) is bool(fault)


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
def test_page_locked_layers_of_a_codec_come_as_they_are_kept(device, codec):
    source = pinned(plain(1, tokens=70), codec)
    loader = Loader([source], CUDA, depth=2)
    for index in range(LAYERS):
        mine, theirs = loader.take(index)[0], source[index]
        for a, b in zip(transfer.parts((mine,)), transfer.parts((theirs,)), strict=True):
            assert a.device == CUDA
            assert torch.equal(a.to("cpu"), b)
    assert not device.total.violations


def test_only_what_is_in_neither_memory_is_loaded_in_a_thread(device):
    layers = [plain(seed) for seed in range(4)]
    lazy, on_device = Lazy(layers[0]), there(layers[1])
    loader, got = taken([lazy, on_device, pinned(layers[2]), layers[3]])
    assert same(got, *layers)
    assert lazy.threads == {"chunkcache-loader"}
    assert list(loader._in_thread) == [0, 3]  # memory that is not page-locked keeps the host waiting
    assert not device.total.violations


def test_layers_on_the_device_are_not_copied(device):
    layers = there(plain(1))
    loader = Loader([layers, pinned(plain(2))], CUDA, depth=2)
    assert loader.take(0)[0] is layers[0]
    assert loader._thread is None


def test_a_model_on_the_cpu_waits_for_layers_of_a_device(device):
    one, two = plain(1), plain(2)
    loader, got = taken([there(one), pinned(two)], CPU)
    assert loader._thread is None
    assert same(got, one, two)
    assert not device.total.violations


def test_a_copy_that_is_wanted_is_handed_over_and_stays(device, monkeypatch):
    monkeypatch.setattr(transfer, "RUN_BYTES", 1)
    one, two, wanted = plain(1), plain(2), []
    source = WantedLayers(pinned(one), lambda layers, ready: wanted.append((layers, ready)))
    with device.watch() as seen:
        _, got = taken([source, pinned(two)])
    assert seen.copies["H2D pinned, async"] == 2 * LAYERS
    assert same(got, one, two)
    [(layers, ready)] = wanted
    with torch.cuda.stream(Stream()):
        kv = transfer.join(replace(ChunkKV.of(range(3), 3, layers), ready=ready))
        assert all(torch.equal((a + 0).to("cpu"), b) for a, b in zip(kv.layers, one, strict=True))
    assert not device.total.violations


def test_layers_that_another_device_still_copies_are_waited_for():
    with PretendDevice(count=2) as device:
        store = memory_store()
        kv = ChunkKV.of(range(3), 3, tuple(layer.to("cuda:1") for layer in plain(1)))
        store.put(key(1), kv)
        store.flush()
        _, got = taken([store.get(key(1), None).layers])
        assert same(got, plain(1))
        assert not device.total.violations


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_load_in_a_thread(kind):
    with PretendDevice(kind=kind) as device:
        one, two = plain(1), plain(2)
        place = torch.empty(0, device=kind).device
        _, got = taken([one, tuple(layer.to(kind) for layer in two)], place)
        assert same(got, one, two)
        assert not device.total.violations
