"""Chunks computed on a pretend accelerator: their context comes once, and who else wants them waits for them."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from pretend import PretendDevice, Stream
from pretend.streams import DEFAULT
from support.blend import random_ids
from support.llm import own_model
from support.store import key, memory_store

from chunkcache.blend import Decoder
from chunkcache.kv import ChunkKV
from chunkcache.library import ChunkLibrary
from chunkcache.library import encoder as encoder_module
from chunkcache.library import library as library_module
from chunkcache.library.encoder import Encoder
from chunkcache.library.single_flight import Claim

CHUNKS = [random_ids(size, seed=size) for size in (5, 40, 17, 64)]
CONTEXT = random_ids(20, seed=99)


def served(place="cuda:0"):
    return Decoder(own_model().to(place))


def own_prefill_there(decoder, ids):
    with torch.no_grad():
        cache = decoder.model(torch.tensor([ids]).to(decoder.device), use_cache=True).past_key_values
    return [torch.cat((layer.keys, layer.values)) for layer in cache.layers]


@pytest.mark.parametrize("bound", [64, 10_000])
def test_a_context_in_memory_is_copied_to_the_device_once_for_all_packs(bound, monkeypatch):
    monkeypatch.setattr(encoder_module, "PACK_TOKENS_THERE", bound)
    with PretendDevice() as device:
        decoder = served()
        store = memory_store()
        store.put(key(1), ChunkKV.of(CONTEXT, 0, own_prefill_there(decoder, CONTEXT)))
        store.flush()
        context = store.get(key(1), None)
        with device.watch() as seen:
            computed = list(Encoder(decoder).encode(context, CHUNKS))
        assert seen.copies["H2D pinned, async"] == len(context.layers.runs)
        assert [kv.token_ids for kv in computed] == CHUNKS
        for kv in computed:
            expected = own_prefill_there(decoder, (*CONTEXT, *kv.token_ids))
            for layer, theirs in zip(kv.layers, expected, strict=True):
                torch.testing.assert_close(
                    layer.to("cpu"), theirs[:, :, len(CONTEXT) :].to("cpu"), atol=1e-4, rtol=1e-4
                )
        assert not device.total.violations


def test_packs_are_larger_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(encoder_module, "PACK_TOKENS", 40)
    counts = []
    for place in ("cpu", "cuda:0"):
        with PretendDevice():
            decoder, forwards = served(place), []
            decoder.model.model.embed_tokens.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
            list(Encoder(decoder).encode(None, CHUNKS))
        counts.append(len(forwards))
    assert counts == [4, 1]


@pytest.mark.parametrize("waits", [True, False])
def test_who_waits_for_another_thread_to_compute_a_chunk_waits_on_its_own_stream(waits, monkeypatch):
    monkeypatch.setattr(PretendDevice, "sync", lambda self, what: None)  # that the host waited is no help here
    if not waits:
        monkeypatch.setattr(library_module, "join", lambda kv: kv)
    others, begun, go_on = Claim.others, threading.Event(), threading.Event()

    def slowly(encoder, context, chunks, record):
        begun.set()
        go_on.wait()
        config = library._decoder.config
        shape = 2, config.num_key_value_heads, len(chunks[0]), config.hidden_size // config.num_attention_heads
        layers = [torch.ones(shape, device="cuda:0") for _ in range(config.num_hidden_layers)]
        yield ChunkKV.of(chunks[0], 0, layers)

    def asked_for(claim):
        go_on.set()
        return others(claim)

    monkeypatch.setattr(Encoder, "encode", slowly)
    with PretendDevice() as device:
        library = ChunkLibrary(served(), memory_store(), "model")
        DEFAULT.completed = DEFAULT.seq
        ref = library.ref(CHUNKS[0], ())

        def compute():
            with torch.cuda.stream(Stream()):
                return library.compute([ref])[ref].layers[0] + 1

        thread = threading.Thread(target=compute)
        thread.start()
        begun.wait()
        monkeypatch.setattr(Claim, "others", asked_for)
        compute()
        thread.join()
        found = " ".join(what for what, _ in device.total.violations)
    gc.collect()  # while no device is on
    assert ("no event between" in found) is not waits
