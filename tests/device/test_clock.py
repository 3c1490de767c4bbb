"""Clocks on an accelerator: events in its queue, and no wait before the first token."""

from __future__ import annotations

import pytest
import torch
from pretend import PretendDevice
from support.llm import QUESTION, TEXTS, own_model, wrapped

from chunkcache.blend import Decoder
from chunkcache.kv.clock import StageClock, wait_for
from chunkcache.library.encoder import Encoder

CUDA = torch.device("cuda", 0)


def test_stages_are_counted_by_events_and_asked_for_later():
    with PretendDevice() as device:
        clock = StageClock(CUDA)
        with device.watch() as seen, clock.stage("select"):
            torch.ones(3).to(CUDA) + 1
            with clock.stage("wait"):
                torch.zeros(3, device=CUDA)
        assert not [what for what, _ in seen.sync_lines if "event" in what]
        with device.watch() as seen:
            assert clock.seconds("select") > 0
            assert clock.seconds("wait") > 0
            before = clock.seconds("select", "wait")
        assert seen.syncs <= 1  # it was asked before the work was done
        assert clock.seconds("select", "wait") == before


def test_waiting_for_a_tensor_waits_once():
    with PretendDevice() as device:
        tensor = torch.ones(3, device=CUDA) + 1
        with device.watch() as seen:
            wait_for(tensor)
        assert seen.syncs == 1


@pytest.mark.parametrize("policy", ["link:k=4", "query:ratio=0.1"])
def test_the_parts_of_a_request_are_within_the_whole(policy):
    with PretendDevice() as device, wrapped(own_model().to(CUDA), policy=policy) as llm:
        llm.precompute(TEXTS)
        for ask in (llm.prefill, llm.generate):
            with device.watch() as seen:
                stats = ask(QUESTION, TEXTS).stats
            parts = stats.stages()
            assert all(parts[name] > 0 for name in ("rerotate", "select", "recompute", "head"))
            assert stats.assemble_s + stats.select_s + stats.recompute_s + stats.head_s <= stats.prefill_s
            waited = any("wait_for" in where for _, where in seen.sync_lines)
            assert waited == (ask == llm.prefill)  # for its logits; generate() has read the token


def test_the_time_to_the_logits_is_taken_when_they_are_there(monkeypatch):
    with PretendDevice(), wrapped(own_model().to(CUDA)) as llm:
        calls = []
        monkeypatch.setattr("chunkcache.engine.engine.wait_for", lambda logits: calls.append(logits.shape))
        llm.prefill(QUESTION, TEXTS)
        assert calls == [(512,)]


def test_a_chunk_says_how_long_the_device_computed_it():
    with PretendDevice():
        encoder = Encoder(Decoder(own_model().to(CUDA)))
        chunks = [tuple(range(10, 60)), tuple(range(10, 30))]
        long, short = [kv.origin.compute_s for kv in encoder.encode((), chunks)]
        assert long == pytest.approx(short * 50 / 20)
        assert short > 0
