"""A model whose layers lie on two devices gives the logits that it gives on the CPU, under every policy."""

from __future__ import annotations

import pytest
import torch
import zoo
from accelerate import dispatch_model
from pretend import PretendDevice
from support.llm import QUESTION, TEXTS, chat_tokenizer

import chunkcache

POLICIES = ["full", "prefix", "reuse", "link:k=8", "cacheblend:ratio=0.3", "cacheblend:ratio=0.2,gradual=0.3,0.1",
            "cachecraft", "cachecraft:focus=1", "query:ratio=0.1", "query:later=0.3", "fusionrag", "prophetkv",
            "kvshift", "exact"]  # fmt: skip
LAYERS = 6


def new():
    return zoo.new("llama", vocab_size=512, max_position_embeddings=4096, num_hidden_layers=LAYERS)


def sharded(first: int):
    """Return a model whose layers from `first` on lie on the second device."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": int(index >= first) for index in range(LAYERS)}
    return dispatch_model(new(), {name: torch.device("cuda", at) for name, at in places.items()})


def logits(model, policy: str, store: str):
    llm = chunkcache.wrap(model, chat_tokenizer(), store=store, policy=policy)
    llm.precompute(TEXTS)
    found = llm.prefill(QUESTION, TEXTS[::-1]).logits.cpu()
    answer = llm.generate(QUESTION, TEXTS[::-1], max_new_tokens=3).token_ids
    llm.store.close()
    return found, answer


@pytest.mark.parametrize("policy", POLICIES)
def test_the_logits_are_the_cpus(policy):
    wanted, answer = logits(new(), policy, "memory://")
    for first, store in ((1, "memory://"), (4, "device://")):  # 4: a scout of `query` looks on both
        with PretendDevice(count=2) as device:
            found, theirs = logits(sharded(first), policy, store)
            assert not device.total.violations, device.total.violations
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert theirs == answer
