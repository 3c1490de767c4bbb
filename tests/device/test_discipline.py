"""The accelerator's path on a machine without one: nothing across devices, no race, and the CPU's results."""

from __future__ import annotations

import pytest
import torch
import zoo
from pretend import Event, PretendDevice, PretendTensor, Stream
from support.device import model, texts, wrapped
from support.llm import QUESTION, chat_tokenizer

import chunkcache

CHUNKS = texts(4)
EVERY_POLICY = {  # each with one of the stores, each store with several
    "full": "memory://",
    "prefix": "device://",
    "reuse": "memory://?codec=int8",
    "link:k=8": "device://?codec=int4",
    "cacheblend:ratio=0.15": "tiered:device://|memory://",
    "cacheblend:ratio=0.2,gradual=0.3,0.1": "memory://",
    "cachecraft": "device://",
    "kvshift": "memory://",
    "prophetkv": "device://",
    "fusionrag": "memory://?codec=int8",
    "query:ratio=0.05": "device://",
    "query:ratio=0.05,k=2": "tiered:device://|memory://",
    "query:later=0.3": "device://",
}
FAMILIES = {  # what is peculiar about them: sliding windows, two RoPEs, sinks, layers without RoPE, experts, ...
    ("gemma3", "sdpa"): "query:ratio=0.05",
    ("gemma2", "eager"): "link:k=8",
    ("gpt-oss", "eager"): "cacheblend:ratio=0.15",
    ("smollm3", "sdpa"): "query:ratio=0.05",
    ("gpt-neox", "sdpa"): "cacheblend:ratio=0.15",
    ("cohere2", "eager"): "query:ratio=0.05,later=0.3",
    ("mistral-sliding", "sdpa"): "link:k=8",
    ("llama-yarn", "sdpa"): "link:k=8",
    ("llama-dynamic-ntk", "eager"): "query:ratio=0.05",
    ("qwen3-moe", "sdpa"): "cacheblend:ratio=0.15",
    ("glm4", "sdpa"): "link:k=8",
}


def run(where, policy, store, **options):
    """Return logits of a request over stored chunks, on the CPU, and the tokens of an answer."""
    llm = wrapped(where, store, **options)
    try:
        llm.precompute(CHUNKS, policy=policy)
        llm.prefill(QUESTION, CHUNKS[:2], policy=policy)  # another prompt before: versions, remembered chunks
        start = llm.prefill(QUESTION, CHUNKS[::-1], policy=policy)
        answer = llm.generate(QUESTION, CHUNKS[::-1], policy=policy, max_new_tokens=4)
        return start.logits.float().cpu(), answer.token_ids, start.stats
    finally:
        llm.store.close()


def agrees(policy, store, kind="cuda", **options):
    on_cpu = store if "device://" not in store else "memory://" + store.partition("device://")[2].partition("|")[0]
    wanted, ids, stats = run("cpu", policy, on_cpu, **options)
    with PretendDevice(kind=kind) as device:
        got, got_ids, got_stats = run(kind, policy, store, **options)
        assert not device.total.violations, device.total.violations
    assert got_stats.recomputed_share == pytest.approx(stats.recomputed_share, abs=0.02)
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
    assert got_ids == ids


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_every_policy_gives_what_it_gives_on_the_cpu(policy):
    agrees(policy, EVERY_POLICY[policy])


@pytest.mark.parametrize(("family", "attention"), FAMILIES)
def test_families_give_what_they_give_on_the_cpu(family, attention):
    assert (family, attention) in zoo.SERVED
    agrees(FAMILIES[family, attention], "memory://", family=family, attention=attention)


def test_apples_device_gives_what_the_cpu_gives():
    agrees("query:ratio=0.05", "memory://?codec=int8", kind="mps")


def test_intels_device_gives_what_the_cpu_gives():
    agrees("query:ratio=0.05", "memory://?codec=int8", kind="xpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", ["device://", "memory://?codec=int8"])
def test_half_precision(dtype, store):
    with PretendDevice() as device:
        got, _, _ = run("cuda:0", "query:ratio=0.05", store, dtype=dtype)
        assert not device.total.violations, device.total.violations
        assert torch.isfinite(got).all()


def test_a_batch_an_attached_model_a_stream_and_a_conversation():
    with PretendDevice() as device:
        llm = chunkcache.wrap(model().to("cuda:0"), chat_tokenizer(), policy="link:k=4")
        llm.precompute(CHUNKS)
        pairs = [(QUESTION, CHUNKS), ("Who opened it?", CHUNKS), (QUESTION, CHUNKS[:2])]
        llm.generate_batch(pairs, max_new_tokens=3)
        "".join(llm.stream(QUESTION, CHUNKS, max_new_tokens=3))
        ids = torch.tensor([llm.prompts.build(QUESTION, CHUNKS).token_ids]).to("cuda:0")
        with llm.attached():
            llm.model.generate(ids, max_new_tokens=3, pad_token_id=3)
        assert llm.last_stats.hits
        talk = llm.conversation()
        talk.generate(QUESTION, CHUNKS, max_new_tokens=2)
        talk.generate("And then?", CHUNKS[:1], max_new_tokens=2)
        llm.store.close()
        assert not device.total.violations, device.total.violations


def test_a_model_on_the_cpu_over_a_device_tier():
    with PretendDevice() as device:
        llm = wrapped("cpu", "device://")
        llm.precompute(CHUNKS, policy="link:k=4")
        llm.prefill(QUESTION, CHUNKS, policy="link:k=4")
        llm.store.close()
        assert not device.total.violations, device.total.violations


@pytest.mark.parametrize("broken", ["wait_event", "record_stream"])
def test_a_loader_that_does_not_keep_the_streams_apart_is_caught(broken, monkeypatch):
    with PretendDevice() as device:
        if broken == "wait_event":
            monkeypatch.setattr(Stream, "wait_event", lambda *_: None)
            monkeypatch.setattr(Event, "wait", lambda *_: None)
        else:
            monkeypatch.setattr(PretendTensor, "record_stream", lambda *_: None)
        llm = wrapped("cuda:0")
        llm.precompute(CHUNKS, policy="link:k=4")
        llm.prefill(QUESTION, CHUNKS, policy="link:k=4")
        llm.store.close()
        found = " ".join(what for what, _ in device.total.violations)
    assert ("no event between" if broken == "wait_event" else "no record_stream") in found


@pytest.mark.parametrize("policy", ["cacheblend:ratio=0.2,gradual=0.3,0.1", "cachecraft", "query:ratio=0.1"])
def test_layers_on_two_devices(policy):
    from accelerate import dispatch_model

    def sharded(layers=6):
        places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        places |= {f"model.layers.{index}": index // 3 for index in range(layers)}
        there = {name: torch.device("cuda", at) for name, at in places.items()}
        return dispatch_model(model(layers=layers), there)

    with PretendDevice(count=2) as device:
        llm = chunkcache.wrap(sharded(), chat_tokenizer())
        llm.precompute(CHUNKS, policy=policy)
        llm.prefill(QUESTION, CHUNKS[::-1], policy=policy)
        llm.store.close()
        assert not device.total.violations, device.total.violations
