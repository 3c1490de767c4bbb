"""Milliseconds to the first token id: the plain model, a prompt whose KV are there, and the policies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import chunkcache
from chunkcache.eval.gpu.check import Check

POLICIES = ("full", "prefix", "query", "cacheblend:ratio=0.15", "reuse", "link:k=8", "cachecraft")
TABLE = "Time to first token, ms"
Ask = Callable[[int], Tensor]


class Plain:
    """The model with a cache of transformers, and nothing of chunkcache.

    Args:
        model: the model.
        prompts: token ids of each prompt.
        questions: how many tokens at the end of each are its question.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], questions: Sequence[int]) -> None:
        self._model, self._prompts, self._questions = model, prompts, questions
        self._held: Any = None

    def prefill(self, number: int) -> Tensor:
        """Return the logits `[vocab]` behind a prompt."""
        return self._run(self._prompts[number], self._cache())

    def hold(self) -> None:
        """Prefill the first prompt, and keep its KV for `after_prefix`."""
        self._held = self._cache()
        self._run(self._prompts[0], self._held)

    def after_prefix(self, number: int) -> Tensor:
        """Return the logits behind a prompt of which all but the question is in the cache: what no reuse can beat."""
        ids = self._prompts[number][-self._questions[number] :]
        surplus = self._held.get_seq_length() - (len(self._prompts[0]) - self._questions[0])
        self._held.crop(-surplus)
        return self._run(ids, self._held)

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    @torch.no_grad()
    def _run(self, ids: Sequence[int], cache: Any) -> Tensor:
        tensor = torch.tensor([ids], device=self._model.device)
        logits: Tensor = self._model(input_ids=tensor, past_key_values=cache, logits_to_keep=1).logits
        return logits[0, -1]


@contextmanager
def cudnn(on: bool) -> Iterator[None]:
    """Let SDPA use cuDNN in the block, or not; in the whole process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def ttft(check: Check) -> None:
    """Measure every contender at each length, and at the shortest without cuDNN, too."""
    with check.wrapped(check.device_store()) as llm:
        for count in check.counts:
            if not check.has(3 * count / 10 + 5, f"TTFT at {count} chunks"):
                break
            _measure(check, llm, count, "default")
        if check.cuda and check.has(5, "TTFT without cuDNN"):
            with cudnn(False):
                _measure(check, llm, check.counts[0], "no cuDNN")


def _measure(check: Check, llm: chunkcache.CachedLLM, count: int, kernels: str) -> None:
    texts = check.texts(count, 100 + count)
    orders = [check.shuffled(texts, number) for number in range(check.rounds + 1)]
    prompts = [llm.prompts.build(check.question(n), order) for n, order in enumerate(orders)]
    plain = Plain(check.model(), [p.token_ids for p in prompts], [len(p.question) for p in prompts])
    tokens = len(prompts[0].token_ids)

    def timed(contender: str, ask: Ask, **more: Any) -> None:
        check.milliseconds(lambda: ask(0))
        new = [check.milliseconds(lambda n=n: ask(n)) for n in range(1, check.rounds + 1)]  # type: ignore[misc]
        again = [check.milliseconds(lambda n=n: ask(n)) for n in range(1, check.rounds + 1)]  # type: ignore[misc]
        figures = {"new": statistics.median(new), "again": min(again)}
        check.report.row(TABLE, tokens=tokens, kernels=kernels, contender=contender, **figures, **more)

    with check.step(f"TTFT of the plain model at {tokens} tokens"):
        timed("plain", plain.prefill)
        plain.hold()
        timed("plain, all but the question cached", plain.after_prefix)
    del plain
    for policy in POLICIES:
        if not check.has(3, f"TTFT of {policy} at {tokens} tokens"):
            continue
        with check.step(f"TTFT of {policy} at {tokens} tokens"):
            llm.store.clear()
            started = time.perf_counter()
            if policy != "full":
                llm.precompute(texts, policy=policy)
                check.wait()
            ready = time.perf_counter() - started
            stats = llm.prefill(check.question(0), orders[0], policy=policy).stats
            ask = _asker(check, llm, orders, policy)
            timed(policy, ask, own_clock=stats.ttft_s * 1e3, recomputed=stats.recomputed_share, precompute_s=ready)


def _asker(check: Check, llm: chunkcache.CachedLLM, orders: Sequence[list[str]], policy: str) -> Ask:
    return lambda number: llm.prefill(check.question(number), orders[number], policy=policy).logits
