"""Peak memory of a request, pinned memory beside what a store holds, and what requests leave reserved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from chunkcache.eval.gpu.check import Check
from chunkcache.eval.gpu.tiers import pinned_bytes
from chunkcache.eval.gpu.ttft import Plain
from chunkcache.eval.memory import PeakMemory

TABLE = "Memory, GB"
REQUESTS = 34  # more than the 32 streams that torch hands out by turns


def memory(check: Check) -> None:
    """Measure the longest prompt with KV in host memory."""
    texts = check.texts(check.counts[-1], 800)
    pinned = pinned_bytes()
    with check.wrapped("memory://?max_bytes=30GiB") as llm:
        prompt = llm.prompts.build(check.question(1), texts)
        plain = Plain(check.model(), [prompt.token_ids], [len(prompt.question)])
        works: dict[str, Callable[[], Any]] = {
            "plain": plain.hold,
            "full": lambda: llm.prefill(check.question(1), texts, policy="full"),
            "query": lambda: llm.prefill(check.question(1), texts, policy="query"),
        }
        llm.precompute(texts, policy="query")
        held = llm.store.stats().nbytes
        check.report.row(TABLE, what=f"KV of {len(prompt.token_ids)} tokens, as stored", GB=held / 1e9)
        for name, work in works.items():
            if check.has(4, f"peak memory of {name}"):
                with check.step(f"peak memory of {name}"):
                    check.free()
                    with PeakMemory(check.device) as peak:
                        kept = work()
                        check.wait()
                    check.report.row(
                        TABLE, what=f"peak of {name}", GB=None if peak.nbytes is None else peak.nbytes / 1e9
                    )
                    del kept
        now = pinned_bytes()
        if pinned is not None and now is not None:
            check.report.row(TABLE, what="pinned for the store", GB=(now - pinned) / 1e9)
        if check.has(4, "memory after many requests"):
            _after_requests(check, llm, texts)


def _after_requests(check: Check, llm: Any, texts: list[str]) -> None:
    """Ask several short prompts, and note what the process holds more than after the first."""
    requests = 4 if check.options.smoke else REQUESTS
    check.free()
    with PeakMemory(check.device) as peak:
        before = torch.cuda.memory_reserved(check.device) if check.cuda else 0
        for number in range(requests):
            if check.left < 1 and not check.options.smoke:
                requests = number
                break
            llm.prefill(check.question(number), texts[:6], policy="query")
        check.wait()
    if check.cuda:
        more = torch.cuda.memory_reserved(check.device) - before
        check.report.row(TABLE, what=f"reserved more after {requests} requests", GB=more / 1e9)
    elif peak.nbytes is not None:
        check.report.row(TABLE, what=f"peak of {requests} requests", GB=peak.nbytes / 1e9)
