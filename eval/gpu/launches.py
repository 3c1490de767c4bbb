"""What one request costs: launches, time on the device, and places where the host waits for it."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from chunkcache.eval.gpu.check import OWN, Check
from chunkcache.eval.gpu.ttft import Plain

LAUNCHING = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
POLICIES = ("full", "reuse", "cacheblend:ratio=0.15", "cachecraft", "query")
TABLE = "Launches and device time of a request"
TOP = 5


def launches(check: Check) -> None:
    """Profile the plain model and policies, with few chunks and with many."""
    with check.wrapped(check.device_store()) as llm:
        for count in (check.counts[0], check.counts[-1]):
            texts = check.texts(count, 300 + count)
            prompt = llm.prompts.build(check.question(1), texts)
            plain = Plain(check.model(), [prompt.token_ids], [len(prompt.question)])
            works: dict[str, Callable[[], Any]] = {"plain": lambda plain=plain: plain.prefill(0)}  # type: ignore[misc]
            for policy in POLICIES:
                works[policy] = lambda texts=texts, policy=policy: (
                    llm.prefill(  # type: ignore[misc]
                        check.question(1), texts[::-1], policy=policy
                    ).logits
                )
            for name, work in works.items():
                if not check.has(5, f"launches of {name} at {count} chunks"):
                    continue
                with check.step(f"launches of {name} at {count} chunks"):
                    llm.store.clear()
                    if name not in ("plain", "full"):
                        llm.precompute(texts, policy=name)
                    _profile(check, name, count, lambda work=work: int(work().argmax()))  # type: ignore[misc]


def _profile(check: Check, name: str, count: int, work: Callable[[], int]) -> None:
    work()
    waits = _waits(check, work)
    check.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.cuda else [])]
    with profile(activities=activities) as profiled:
        started = time.perf_counter()
        work()
        wall = (time.perf_counter() - started) * 1e3
    events: Any = profiled.events()
    on_device = [event for event in events if str(event.device_type).endswith("CUDA")]
    launched = sum(event.name in LAUNCHING if check.cuda else event.name.startswith("aten::") for event in events)
    figures: dict[str, Any] = {"launches" if check.cuda else "operations": launched, "wall_ms": wall}
    if check.cuda:
        figures["device_ms"] = sum(event.device_time for event in on_device) / 1e3
        figures["waits"] = sum(waits.values())
        figures["copies"] = sum(event.name == "cudaMemcpyAsync" for event in events)
    check.report.row(TABLE, chunks=count, contender=name, **figures)
    for where, times in waits.most_common():
        check.report.row("Where the host waits", chunks=count, contender=name, where=where, times=times)
    spent: Counter[str] = Counter()
    for event in on_device:
        spent[event.name[:60]] += int(event.device_time)
    for kernel, microseconds in spent.most_common(TOP):
        check.report.row("Kernels", chunks=count, contender=name, kernel=kernel, ms=microseconds / 1e3)


def _waits(check: Check, work: Callable[[], int]) -> Counter[str]:
    """Return how often the host waits in a request, by line; torch knows it on CUDA only."""
    found: Counter[str] = Counter()
    if not check.cuda:
        return found
    with _noting_waits(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    for each in caught:
        if "called a synchronizing" in str(each.message):
            place = "/".join(each.filename.split("/")[-2:]) if OWN.search(each.filename) else each.filename[-40:]
            found[f"{place}:{each.lineno}"] += 1
    return found


@contextmanager
def _noting_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(1)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(0)
