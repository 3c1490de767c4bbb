"""Milliseconds per token of an answer: plain `generate()`, chunkcache, and both with a static cache."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch

from chunkcache.eval.gpu.check import Check

TABLE = "Decoding"


def decode(check: Check) -> None:
    """Decode behind the shortest and the longest prompt."""
    with check.wrapped(check.device_store(), policy="link:k=8") as llm:
        for count in (check.counts[0], check.counts[-1]):
            texts = check.texts(count, 700 + count)
            llm.precompute(texts)
            ids = torch.tensor([llm.prompts.build(check.question(1), texts).token_ids], device=check.device)
            ways = _ways(check, llm, texts, ids)
            for name, way in ways.items():
                if check.has(4, f"decoding of {name} at {count} chunks"):
                    with check.step(f"decoding of {name} at {count} chunks"):
                        first, each = _measure(check, way)
                        check.report.row(TABLE, tokens=ids.shape[1], way=name, ms_per_token=each, first_two_ms=first)


def _ways(check: Check, llm: Any, texts: list[str], ids: torch.Tensor) -> dict[str, Callable[[int], object]]:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    question, mask = check.question(1), torch.ones_like(ids)

    def plain(tokens: int, **more: Any) -> object:
        return llm.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options, **more)

    def static(tokens: int) -> object:
        return plain(tokens, cache_implementation="static", disable_compile=True)

    def ours(tokens: int) -> object:
        return llm.generate(question, texts, max_new_tokens=tokens, **options)

    def streamed(tokens: int) -> object:
        return list(llm.stream(question, texts, max_new_tokens=tokens, **options))

    def handed_over(tokens: int) -> object:
        inputs = llm.prepare_inputs(question, texts, cache="static", max_new_tokens=tokens)
        return llm.model.generate(**inputs, disable_compile=True, **options)

    ways: dict[str, Callable[[int], object]] = {
        "plain": plain,
        "chunkcache": ours,
        "chunkcache, streamed": streamed,
        "plain, static": static,
    }
    if "cache" in inspect.signature(llm.prepare_inputs).parameters:
        ways["chunkcache, static"] = handed_over
    return ways


def _measure(check: Check, way: Callable[[int], object]) -> tuple[float, float]:
    """Return the milliseconds up to the second token, and of each token behind it."""
    steps = 4 if check.options.smoke else 24
    way(2)
    seconds = []
    for tokens in (2, 2 + steps):
        check.wait()
        started = time.perf_counter()
        way(tokens)
        check.wait()
        seconds.append(time.perf_counter() - started)
    return seconds[0] * 1e3, (seconds[1] - seconds[0]) / steps * 1e3
