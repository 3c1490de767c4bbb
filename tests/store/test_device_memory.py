"""Chunk KV between an accelerator and its tiers, on a pretend device: who waits, what is copied, and when."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager

import pytest
import torch
from pretend import PretendDevice, Stream
from pretend.tensor import PretendTensor
from support.store import disk_store, key, memory_store, same

from chunkcache.kv import ChunkKV, transfer
from chunkcache.kv import device as devices
from chunkcache.store import DeviceStore, MemoryStore, TieredStore, memory

CUDA = torch.device("cuda:0")


@pytest.fixture
def device():
    with PretendDevice() as on:
        yield on


@pytest.fixture(autouse=True)
def one_layer_a_run(monkeypatch):
    """Tiny layers would all be copied at once."""
    monkeypatch.setattr(transfer, "RUN_BYTES", 1)


def plain_kv(tokens=3, layers=4):
    generator = torch.Generator().manual_seed(tokens)
    return ChunkKV.of(range(tokens), 3, [torch.randn(2, 1, tokens, 4, generator=generator) for _ in range(layers)])


def kv_there(tokens=3, layers=4, place="cuda:0"):
    """The same KV, made on a device by this thread's stream."""
    kv = plain_kv(tokens, layers)
    return kv.of_layers(tuple(layer.to(place) for layer in kv.layers))


def on_cpu(kv):
    return kv.of_layers(tuple(layer.to("cpu") for layer in kv.layers))


@contextmanager
def on_a_stream():
    with torch.cuda.stream(Stream()):
        yield


def test_kv_stay_on_the_device_until_the_store_catches_up(device):
    store = memory_store()
    with device.watch() as seen:
        assert store.put(key(1), kv_there())
        got = store.get(key(1), (0, 1, 2))
    assert not any(what.startswith("D2H") for what in seen.copies)
    assert got.layers[0].device == CUDA
    store.catch_up()
    store.flush()
    got = store.get(key(1), (0, 1, 2))
    assert isinstance(got.layers, transfer.PinnedLayers)
    assert same(got, plain_kv())
    assert not device.total.violations


def test_copies_to_the_host_are_asynchronous_into_page_locked_memory_and_each_layer_is_copied_once(device):
    store = memory_store()
    store.put(key(1), kv_there())
    with device.watch() as seen:
        store.flush()
    assert seen.copies == {"D2H async": 4}
    assert seen.copied_bytes["D2H async"] == plain_kv().nbytes == store.stats().nbytes
    assert not seen.syncs


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
def test_page_locked_layers_are_what_was_put(device, codec):
    store, other = memory_store(codec=codec), memory_store(codec=codec)
    store.put(key(1), kv_there())
    other.put(key(1), plain_kv())
    store.flush()
    got, wanted = store.get(key(1), None), other.get(key(1), None)
    for mine, theirs in zip(got.layers, wanted.layers, strict=True):
        for a, b in zip(transfer.parts((mine,)), transfer.parts((theirs,)), strict=True):
            assert torch.equal(a, b)
    assert got.nbytes == wanted.nbytes == store.stats().nbytes
    assert not device.total.violations


def test_who_reads_on_the_host_waits_until_the_copy_has_come(device, monkeypatch):
    store = memory_store()
    store.put(key(1), kv_there())
    store.flush()
    device.busy = True
    assert same(store.get(key(1), None), plain_kv())
    monkeypatch.setattr(transfer.PinnedLayers, "_arrived", True, raising=False)  # the fault: nobody waits
    store.put(key(2), kv_there(tokens=5))
    store.flush()
    late = store.get(key(2), None).layers
    late._arrived = True
    assert not torch.equal(late[0], plain_kv(tokens=5).layers[0])


@pytest.mark.parametrize("fault", [None, "no wait", "no record"])
def test_the_copy_stream_waits_for_what_makes_the_kv_and_keeps_their_memory(device, fault, monkeypatch):
    if fault == "no wait":
        monkeypatch.setattr(transfer, "_let_copies_wait", lambda kv: None)
    if fault == "no record":
        monkeypatch.setattr(PretendTensor, "record_stream", lambda *_: None)
    store = memory_store()
    with on_a_stream():
        store.put(key(1), kv_there())
        store.flush()
    found = " ".join(what for what, _ in device.total.violations)
    assert {None: "", "no wait": "no event between", "no record": "no record_stream"}[fault] in found
    assert bool(found) is bool(fault)


@pytest.mark.parametrize("url", ["memory", "device", "device int8"])
@pytest.mark.parametrize("fault", [None, "no wait", "no record"])
def test_requests_on_streams_of_their_own_do_not_race(device, url, fault, monkeypatch):
    if fault == "no wait":
        monkeypatch.setattr(devices, "wait_for", lambda ready: None)
    if fault == "no record":
        monkeypatch.setattr(devices, "keep_for", lambda *_: None)
    store = memory_store() if url == "memory" else DeviceStore(codec="int8" if "int8" in url else "raw")
    with on_a_stream():
        store.put(key(1), kv_there())
    with on_a_stream():
        got = store.get(key(1), None)
        read = [part.float() + 1 for part in transfer.parts(got.layers)]
    store.clear()
    del got, read
    found = " ".join(what for what, _ in device.total.violations)
    assert {None: "", "no wait": "no event between", "no record": "no record_stream"}[fault] in found
    assert bool(found) is bool(fault)


def test_kv_of_the_cpu_are_neither_page_locked_nor_is_the_device_touched(device, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model on the CPU uses the accelerator")

    for name in ("current_stream", "Stream", "stream", "_lazy_init", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    store = memory_store()
    store.put(key(1), plain_kv())
    store.catch_up()
    store.flush()
    assert same(store.get(key(1), None), plain_kv())
    assert not device._pinned
    assert store._arena is None


def test_without_page_locked_memory_kv_go_into_other_memory_counted_and_logged_once(device, caplog, monkeypatch):
    monkeypatch.setattr(devices, "page_locked", lambda nbytes: None)
    monkeypatch.setattr(memory, "Arena", lambda capacity: memory_arena(capacity))
    store = memory_store()
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            store.put(key(number), kv_there(tokens=3 + number))
        store.flush()
    assert store.stats().unpinned == 2
    assert len(caplog.records) == 1
    assert "page-locked" in caplog.text
    assert isinstance(store.get(key(0), None).layers, tuple)
    assert same(store.get(key(0), None), plain_kv())
    assert not device.total.violations


def memory_arena(capacity):
    from chunkcache.store.arena import Arena

    return Arena(capacity, lambda nbytes: None)


def test_a_page_locked_slot_lives_as_long_as_somebody_reads_its_entry(device):
    store = memory_store()
    store.put(key(1), kv_there())
    store.flush()
    layer = store.get(key(1), None).layers[2]
    store.clear()
    for number in range(2, 6):
        store.put(key(number), kv_there(tokens=3))
    store.flush()
    assert torch.equal(layer, plain_kv().layers[2])


def test_an_entry_that_was_removed_or_replaced_meanwhile_is_not_brought_home(device):
    store = memory_store()
    store.put(key(1), kv_there())
    store.put(key(2), kv_there())
    store.delete(key(1))
    store.put(key(2), kv_there(tokens=5))
    with device.watch() as seen:
        store.flush()
    assert seen.copies == {"D2H async": 4}
    assert same(store.get(key(2), None), plain_kv(tokens=5))
    assert store.stats().nbytes == plain_kv(tokens=5).nbytes


@pytest.fixture
def copying(device, monkeypatch):
    """A memory tier whose copy of an entry is on its way, and takes a moment."""
    started, go_on = threading.Event(), threading.Event()

    def slow_pin(*args):
        started.set()
        go_on.wait(5)
        return transfer.pin(*args)

    monkeypatch.setattr(memory, "pin", slow_pin)
    store = memory_store()
    store.put(key(1), kv_there())
    store.catch_up()
    assert started.wait(5)
    threading.Timer(0.05, go_on.set).start()
    return store


def test_flush_waits_for_a_copy_that_is_on_its_way(copying):
    copying.flush()
    assert isinstance(copying._held[key(1)][0].layers, transfer.PinnedLayers)


def test_what_is_being_copied_is_not_copied_again_for_the_tier_below(copying):
    assert copying.copy_of(key(1)).layers[0].device.type == "cpu"
    copying.close()


def test_much_that_is_put_off_is_not_put_off_for_longer(device, monkeypatch):
    monkeypatch.setattr(memory, "PUT_OFF_BYTES", 1)
    store = memory_store()
    store.put(key(1), kv_there())
    store._copies.flush()
    assert isinstance(store._held[key(1)][0].layers, transfer.PinnedLayers)


def test_a_codec_counts_what_it_saves_once_it_has_run(device):
    store = memory_store(codec="int8")
    store.put(key(1), kv_there())
    assert store.stats().nbytes == plain_kv().nbytes
    store.flush()
    assert store.stats().nbytes < plain_kv().nbytes


# --- several tiers


def test_what_is_copied_off_the_device_for_one_tier_is_not_copied_for_the_next(device, tmp_path):
    store = TieredStore([DeviceStore(), memory_store(), disk_store(tmp_path)])
    with device.watch() as seen:
        store.put(key(1), kv_there())
    assert not seen.copies.keys() & {"D2H", "D2H async"}
    with device.watch() as seen:
        store.flush()
    assert {what: n for what, n in seen.copies.items() if what.startswith("D2H")} == {"D2H async": 4}
    for tier in store.tiers().values():
        assert same(on_cpu(tier.get(key(1), None)), plain_kv())
    assert not device.total.violations
    store.close()


def test_memory_above_a_disk_copies_once_too(device, tmp_path):
    store = TieredStore([memory_store(), disk_store(tmp_path)])
    store.put(key(1), kv_there())
    with device.watch() as seen:
        store.catch_up()
        store.flush()
    assert {what: n for what, n in seen.copies.items() if what.startswith("D2H")} == {"D2H async": 4}
    assert all(key(1) in tier for tier in store.tiers().values())
    store.close()


def test_writes_behind_read_what_another_stream_has_made(device, tmp_path):
    store = TieredStore([DeviceStore(), disk_store(tmp_path)])
    with on_a_stream():
        store.put(key(1), kv_there())
    store.flush()
    assert same(store.tiers()["disk"].get(key(1), None), plain_kv())
    assert not device.total.violations
    store.close()


def test_an_entry_that_is_deleted_before_it_is_written_below_is_not_written(device):
    store = TieredStore([DeviceStore(), memory_store()])
    store.put(key(1), kv_there())
    store.delete(key(1))
    store.flush()
    assert not any(key(1) in tier for tier in store.tiers().values())
    store.close()


def test_too_many_that_wait_are_written_at_once_and_none_is_lost(device, monkeypatch):
    monkeypatch.setattr("chunkcache.store.tiered._PUT_OFF", 2)
    store = TieredStore([DeviceStore(), memory_store()])
    for number in range(7):
        store.put(key(number), kv_there())
    store.flush()
    assert store.tiers()["memory"].stats().entries == 7
    assert not store.near_only()
    store.close()


def test_what_the_device_tier_evicts_goes_to_memory(device):
    size = plain_kv().nbytes
    store = TieredStore([with_budget(size), memory_store()], write="evict")
    store.put(key(1), kv_there())
    store.put(key(2), kv_there())
    store.flush()
    tiers = store.tiers()
    assert key(1) not in tiers["device"]
    assert isinstance(tiers["memory"].get(key(1), None).layers, transfer.PinnedLayers)
    assert not device.total.violations
    store.close()


def with_budget(max_bytes):
    from chunkcache.store import Budget

    return DeviceStore(Budget(max_bytes=max_bytes))


def test_prefetched_kv_come_by_the_copy_stream_and_who_reads_them_waits(device):
    store = TieredStore([DeviceStore(), memory_store()])
    store.put(key(1), kv_there())
    store.flush()
    store.tiers()["device"]._remove(key(1))
    with device.watch() as seen:
        store.prefetch([key(1)])
        store.flush()
    assert seen.copies["H2D pinned, async"] == 4
    assert not seen.copies["H2D pageable"]
    with on_a_stream():
        got = store.get(key(1), None)
        assert got.layers[0].device == CUDA
        assert torch.equal((got.layers[3] + 1).to("cpu"), plain_kv().layers[3] + 1)
    store.close()
    del got
    assert not device.total.violations


def test_kv_of_a_disk_go_into_page_locked_memory_by_way_of_the_device(device, tmp_path):
    store = TieredStore([DeviceStore(), memory_store(), disk_store(tmp_path)])
    store.put(key(1), kv_there())
    store.flush()
    for name in ("device", "memory"):
        store.tiers()[name].clear()
    store.tiers()["disk"].put(key(2), plain_kv())
    store.prefetch([key(2)])
    store.flush()
    assert isinstance(store.tiers()["memory"].get(key(2), None).layers, transfer.PinnedLayers)
    assert same(store.tiers()["memory"].get(key(2), None), plain_kv())
    assert not device.total.violations
    store.close()


# --- several devices, and other kinds of them


def test_layers_of_two_devices_are_copied_by_the_streams_of_both():
    with PretendDevice(count=2) as device:
        kv = plain_kv()
        kv = kv.of_layers(tuple(layer.to(f"cuda:{index // 2}") for index, layer in enumerate(kv.layers)))
        store = memory_store()
        store.put(key(1), kv)
        store.flush()
        got = store.get(key(1), None)
        assert len(got.layers.arrival) == 2
        assert same(got, plain_kv())
        there = transfer.to_device(got, lambda index: torch.device("cuda", index // 2))
        assert [layer.device.index for layer in there.layers] == [0, 0, 1, 1]
        assert same(on_cpu(transfer.join(there)), plain_kv())
        assert not device.total.violations


def test_a_device_tier_that_names_none_leaves_kv_on_their_own_device():
    with PretendDevice(count=2):
        anywhere, first = DeviceStore(), DeviceStore(device="cuda:0")
        for store, place in ((anywhere, 1), (first, 0)):
            store.put(key(1), kv_there(place="cuda:1"))
            assert store.get(key(1), None).layers[0].device.index == place


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_make_no_call_of_cuda(kind, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a call that only CUDA has")

    for name in ("current_stream", "Stream", "stream", "Event", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    with PretendDevice(kind=kind) as device:
        store = TieredStore([DeviceStore(), memory_store(), disk_store(tmp_path)])
        store.put(key(1), kv_there(place=kind))
        store.flush()
        for tier in store.tiers().values():
            assert same(on_cpu(tier.get(key(1), None)), plain_kv())
        store.close()
        assert not device._pinned
        assert not device.total.violations


def test_a_memory_tier_that_is_closed_copies_nothing_more(device):
    store = MemoryStore()
    store.put(key(1), kv_there())
    with device.watch() as seen:
        store.close()
    assert not seen.copies
