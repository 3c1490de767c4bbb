"""The same request with its KV in each tier: how long filling takes, and how long the first token."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from chunkcache.eval.gpu.check import Check

TABLE = "Tiers, query"
SHARED_MEMORY = Path("/dev/shm")  # a disk tier there is measured without a disk


def tiers(check: Check) -> None:
    """Measure each tier at the middle length."""
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        stores = {
            "device": check.device_store(),
            "device, int8": check.device_store("&codec=int8"),
            "memory": "memory://?max_bytes=30GiB",
            "memory, int8": "memory://?max_bytes=30GiB&codec=int8",
            "memory, int4": "memory://?max_bytes=30GiB&codec=int4",
            "disk": f"disk://{folder}/plain?sync=no",
            "disk, int4": f"disk://{folder}/int4?sync=no&codec=int4",
            "tiered": f"tiered:{check.device_store()}|memory://?max_bytes=30GiB",
        }
        for name, store in stores.items():
            if check.has(6, f"tier {name}"):
                with check.step(f"tier {name}"):
                    _measure(check, name, store)


def pinned_bytes() -> int | None:
    """Return the page-locked bytes that torch holds; None where it does not say."""
    known = torch.cuda.is_available() and hasattr(torch.cuda, "host_memory_stats")
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)) if known else None


def _measure(check: Check, name: str, store: str) -> None:
    count = check.counts[1]
    texts, others = check.texts(count, 500), check.texts(count, 501)
    pinned = pinned_bytes()
    with check.wrapped(store) as llm:
        started = time.perf_counter()
        llm.precompute(texts, policy="query")
        check.wait()
        fill = time.perf_counter() - started
        held = llm.store.stats().nbytes

        def ask(number: int, chunks: list[str]) -> float:
            return check.milliseconds(lambda: llm.prefill(check.question(number), chunks, policy="query").logits)

        ask(0, texts)
        times = [ask(number, check.shuffled(texts, number)) for number in range(1, check.rounds + 2)]
        stats = llm.prefill(check.question(1), texts, policy="query").stats
        now = pinned_bytes()
        more = {} if pinned is None or now is None else {"pinned_over_held": (now - pinned) / held}
        check.report.row(
            TABLE,
            store=name,
            GB=held / 1e9,
            fill_s=fill,
            ttft_ms=statistics.median(times),
            wait_ms=stats.wait_s * 1e3,
            assemble_ms=stats.assemble_s * 1e3,
            cold_ms=ask(1, others),
            **more,
        )
