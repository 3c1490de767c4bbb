"""Requests of a model on a pretend accelerator: over every tier, on streams of their own, and what they wait for."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from pretend import PretendDevice, Stream
from pretend.streams import DEFAULT
from support.llm import QUESTION, TEXTS, own_model, wrapped

from chunkcache.engine.generation import FirstTokenClock
from chunkcache.kv import transfer
from chunkcache.library import ChunkLibrary

POLICY = "link:k=4"
STORES = ["memory://", "device://", "tiered:device://|memory://", "memory://?codec=int8", "device://?codec=int4"]
TEXTS = list(TEXTS)


@pytest.fixture(autouse=True)
def one_layer_a_run(monkeypatch):
    """Tiny layers would all be copied at once."""
    monkeypatch.setattr(transfer, "RUN_BYTES", 1)


def wrap(place, store):
    return wrapped(own_model(num_hidden_layers=4).to(place), store=store, policy=POLICY)


def logits(llm, texts):
    return llm.prefill(QUESTION, texts).logits.float().to("cpu")


def all_logits(place, store):
    """Logits while KV are still on the device, once they are home, and once the device tier has lost them."""
    with wrap(place, store) as llm:
        found = [logits(llm, TEXTS)]
        if "codec" in str(store):  # until then KV are as they were computed
            llm.store.flush()
        found.append(logits(llm, TEXTS[::-1]))
        llm.store.flush()
        found.append(logits(llm, TEXTS))
        first, *below = llm.store.tiers().values()
        for entry in list(first.entries()) if below else ():
            first._remove(entry.key)
        found += [logits(llm, TEXTS), logits(llm, TEXTS[::-1])]
        llm.store.flush()
        found.append(logits(llm, TEXTS))
    return found


@pytest.mark.parametrize("store", [*STORES, None])
def test_every_store_gives_the_logits_of_the_cpu(store):
    wanted = all_logits("cpu", None if store is None else store.replace("device:", "memory:"))
    with PretendDevice() as device:
        got = all_logits("cuda:0", store)
    assert not device.total.violations
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
@pytest.mark.parametrize("store", ["memory://", "device://", None])
def test_other_accelerators_make_no_call_of_cuda(kind, store, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a call that only CUDA has")

    for name in ("current_stream", "Stream", "stream", "Event", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    wanted = all_logits("cpu", "memory://")
    with PretendDevice(kind=kind) as device:
        got = all_logits(kind, store)
        assert not device._pinned
    assert not device.total.violations
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


def run_requests(store):
    """Run requests, each on a stream of its own."""
    llm = wrap("cuda:0", store)
    DEFAULT.completed = DEFAULT.seq  # the model has been loaded long ago

    def request(texts):
        with torch.cuda.stream(Stream()):
            llm.prefill(QUESTION, texts)

    for texts in (TEXTS, TEXTS[::-1], TEXTS[1:], TEXTS):
        thread = threading.Thread(target=request, args=(texts,))
        thread.start()
        thread.join()
    llm.store.flush()
    for texts in (TEXTS, TEXTS[::-1]):
        request(texts)
    llm.close()


def violations_of_streams(store, monkeypatch):
    """Return what went wrong where; that the host waited for one request is no help to the others here."""
    monkeypatch.setattr(PretendDevice, "sync", lambda self, what: None)
    with PretendDevice() as device:
        run_requests(store)
        found = set(device.total.violations)
    gc.collect()  # while no device is on
    return found


@pytest.mark.parametrize("store", STORES)
def test_requests_on_streams_of_their_own_do_not_race(store, monkeypatch):
    assert not violations_of_streams(store, monkeypatch)


@pytest.mark.parametrize("store", ["memory://", "tiered:device://|memory://"])
@pytest.mark.parametrize("call", ["prefill", "generate", "stream"])
def test_no_kv_are_copied_to_the_host_before_the_first_token(store, call, monkeypatch):
    with PretendDevice() as device:
        llm = wrap("cuda:0", store)
        before = []
        catch_up = ChunkLibrary.catch_up

        def noted(library):
            before.append(seen.copied_bytes["D2H"] + seen.copied_bytes["D2H async"])
            catch_up(library)

        monkeypatch.setattr(ChunkLibrary, "catch_up", noted)
        with device.watch() as seen:
            if call == "prefill":
                llm.prefill(QUESTION, TEXTS)
            elif call == "generate":
                llm.generate(QUESTION, TEXTS, max_new_tokens=3)
            else:
                list(llm.stream(QUESTION, TEXTS, max_new_tokens=3))
            llm.store.flush()
        tier = llm.store.tiers()["memory"]
        assert tier.stats().entries == len(TEXTS) + 1
        assert seen.copied_bytes["D2H async"] >= tier.stats().nbytes > 20 * before[0]
        assert all(isinstance(kv.layers, transfer.PinnedLayers) for kv, _ in tier._held.values())
        assert not device.total.violations
        llm.close()


def test_what_was_put_off_starts_once_the_first_token_is_known():
    known = []
    clock = FirstTokenClock(lambda: known.append(clock.first_token_at))
    for _ in range(2):
        clock(torch.tensor([[1, 2]]), None)
    assert known == [clock.first_token_at]


def test_kv_found_in_memory_are_copied_to_the_device_once_and_kept_there():
    with PretendDevice() as device:
        llm = wrap("cuda:0", "tiered:device://|memory://")
        llm.precompute(TEXTS)
        near, below = llm.store.tiers().values()
        for entry in list(near.entries()):
            near._remove(entry.key)
        with device.watch() as seen:
            llm.prefill(QUESTION, TEXTS)
            llm.store.flush()
        assert near.stats().entries == below.stats().entries
        assert seen.copied_bytes["H2D pinned, async"] < 1.5 * near.stats().nbytes  # runs start at multiples
        assert seen.copies["H2D pinned, async"] == 4 * near.stats().entries
        with device.watch() as seen:
            llm.prefill(QUESTION, TEXTS)
        assert not seen.copies["H2D pinned, async"]
        assert not device.total.violations
        llm.close()


def test_a_model_on_the_cpu_leaves_the_accelerator_alone(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model on the CPU uses the accelerator")

    with PretendDevice() as device:
        for name in ("current_stream", "Stream", "stream", "Event", "mem_get_info", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, refuse)
        llm = wrap("cpu", None)
        llm.precompute(TEXTS)
        llm.generate(QUESTION, TEXTS, max_new_tokens=2)
        llm.close()
        assert not device._pinned
        assert not device.total.copies


def test_a_model_on_the_cpu_over_a_device_tier_reads_what_has_come():
    wanted = all_logits("cpu", "memory://")
    with PretendDevice() as device:
        got = all_logits("cpu", "device://")
    assert not device.total.violations
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
