"""What the tests of the device room share: models and requests on a pretend device, and what one request costs."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
import zoo
from pretend import PretendDevice, Seen
from support.llm import QUESTION, chat_tokenizer

import chunkcache

VOCAB = 512
WORDS = ["bridge", "river", "ferry", "winter", "bread", "keeper", "weather", "lighthouse", "flour", "water", "opened"]


@cache
def texts(count: int, words: int = 20) -> list[str]:
    """Return `count` different texts of about so many words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words + rng.randrange(7))) + "." for _ in range(count)]


def model(family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, layers: int = 4) -> Any:
    """Return a tiny model of its own whose context is long enough for many chunks."""
    limit = {} if "longrope" in family else {"max_position_embeddings": 16384}
    return zoo.new(family, attention, dtype, VOCAB, num_hidden_layers=layers, **limit)


def wrapped(where: str, store: str = "memory://", **options: Any) -> chunkcache.CachedLLM:
    """Wrap a tiny model on the device `where`; `options` are those of `model`."""
    return chunkcache.wrap(model(**options).to(where), chat_tokenizer(), store=store)


def cost(device: PretendDevice, llm: chunkcache.CachedLLM, policy: str, chunks: int) -> Seen:
    """Return what a request costs whose chunks are stored as `policy` stores them, after others over the same."""
    given = texts(chunks)
    llm.delete(tenant=True)
    llm.precompute(given, policy=policy)
    llm.prefill(QUESTION, given[:1], policy=policy)
    order = given if policy == "prefix" else given[::-1]
    llm.prefill(QUESTION, order, policy=policy)
    with device.watch() as seen:
        llm.prefill(QUESTION, order, policy=policy)
    return seen
