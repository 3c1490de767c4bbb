"""Eight threads ask at once for overlapping chunks while the Redis server is killed and started again."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_redis import Valkey
from support.llm import QUESTION, own_model, wrapped

from chunkcache.library.encoder import Encoder

REQUESTS = int(os.environ.get("CHUNKCACHE_SOAK_REQUESTS", "240"))
THREADS = 8
TEXTS = [
    f"Passage {number} tells of the {number} boats that left the harbour, and of who came back."
    for number in range(24)
]


@pytest.fixture
def computed(monkeypatch):
    """Count how often each chunk is computed."""
    counts, encode = Counter(), Encoder.encode

    def counted(self, context, chunks, record=False):
        for kv in encode(self, context, chunks, record):
            counts[kv.token_ids] += 1
            yield kv

    monkeypatch.setattr(Encoder, "encode", counted)
    return counts


@pytest.fixture
def server():
    server = Valkey()
    yield server
    server.close()


class Trouble:
    """Kills the server and starts it again, twice, when so many requests have been answered."""

    def __init__(self, server):
        self._lock, self._answered = threading.Lock(), 0
        steps = (server.kill, server.start, server.kill, server.start)
        self._steps = {REQUESTS * (index + 1) // 6: step for index, step in enumerate(steps)}

    def answered(self):
        with self._lock:
            self._answered += 1
            self._steps.get(self._answered, bool)()


@pytest.mark.parametrize("memory", ["16MiB", "64KiB"], ids=["all in memory", "most on the server"])
def test_no_request_fails_and_each_missing_chunk_is_computed_once(memory, computed, server):
    model = own_model()
    exact = wrapped(model, policy="reuse")
    requests = [[TEXTS[(start + step) % len(TEXTS)] for step in range(3)] for start in range(len(TEXTS))]
    expected = [exact.prefill(QUESTION, chunks).logits for chunks in requests]
    computed.clear()
    llm = wrapped(model, store=f"tiered:memory://?max_bytes={memory}|{server.url}", policy="reuse")
    trouble = Trouble(server)

    def ask(seed):
        rng, lost = random.Random(seed), 0
        for _ in range(REQUESTS // THREADS):
            index = rng.randrange(len(TEXTS))
            got = llm.prefill(QUESTION, requests[index])
            if not got.stats.lost:  # else a chunk was computed with the prompt, which is nearer to full prefill
                torch.testing.assert_close(got.logits, expected[index])
            lost += got.stats.lost
            trouble.answered()
        return lost

    with ThreadPoolExecutor(THREADS) as pool:
        lost = sum(pool.map(ask, range(THREADS)))
    assert lost <= 2 * THREADS * 3  # the chunks of the requests that were under way when the server was killed
    llm.store.flush()
    stats = llm.store.tiers()["redis"].stats()
    if memory == "16MiB":  # else what the server loses is missing once more
        assert set(computed.values()) == {1}
    else:
        assert stats.hits > 0
    assert stats.damaged == 0
    llm.store.close()
