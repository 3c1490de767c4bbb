"""Stores side by side: how fast they take and give chunk KV, and what a request from each costs over memory.

Each prompt's chunks are computed once and put into every store. Then the same requests run from each store in turn,
in an order that rotates. The floor of a tier is a plain copy of as many bytes over the same medium.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.engine.engine import PrefillOutput
from chunkcache.errors import StoreURLError
from chunkcache.eval.contenders import kv_bytes
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import first_kl
from chunkcache.eval.measure import OnStep, averages, finite, measure_prompts, table, time_prefill, warm_up
from chunkcache.eval.memory import PeakMemory
from chunkcache.eval.raw_copy import raw_copy
from chunkcache.eval.results import Results, Row
from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.llm import CachedLLM
from chunkcache.store import DiskStore, MemoryStore, Store
from chunkcache.store.url import redacted

BENCH = "store"
MEMORY = "memory://"  # what the others are compared with
CODECS = ("", "?codec=bf16", "?codec=int8", "?codec=int4", "?compress=zstd", "?codec=bf16&compress=zstd")
TENANT = "chunkcache bench store"  # keeps what is measured apart from all else in a store
_REPEATS = 3


def bench_stores(
    results: Results,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    stores: Mapping[str, Store],
    policy: str,
    on_prompt: OnStep | None = None,
) -> Results:
    """Run the prompts of `cases` from each store.

    Args:
        results: gets a row of each prompt and store, with its URL as `store`. Times are medians of some repeats.
            For all chunks of the prompt, one after the other: `nbytes` as they are kept, `put_s`, `get_s` (all
            layers, verified), `floor_put_s` and `floor_get_s`. For requests: `ttft_s`, `ttft_ratio` over that from
            memory, `cold_ttft_s` when a disk's files are not in the page cache (None without a disk), `load_s` beside
            the prefill, `assemble_s` (waiting for what is loaded, and putting it in place), `peak_ratio` of memory
            over the prompt's own KV (None if unknown), `kl_first` to full prefill and `kl_memory` to the same request
            from memory, of the first token in nats, and how many chunks were `lost`.
        model: the model.
        tokenizer: its tokenizer.
        cases: the prompts.
        stores: the stores to compare with memory, by their URLs. What they hold already is left alone.
        policy: the policy of every request.
        on_prompt: called with (prompts done, prompts in all).

    Raises:
        StoreURLError: a store does not keep what is put into it.
    """
    for url, store in stores.items():
        _check_reachable(url, store)
    memory = MemoryStore()
    llms = {
        url: chunkcache.wrap(model, tokenizer, store=store, policy=policy, tenant=TENANT)
        for url, store in {MEMORY: memory, **stores}.items()
    }
    warm_up(llms.values(), cases[0])

    def measure(number: int, case: Case) -> Iterator[Row]:
        for llm in llms.values():
            llm.delete(tenant=True)
        llms[MEMORY].precompute(case.chunks)
        held = {entry.key: kv for entry in memory.entries() if (kv := memory.peek(entry.key)) is not None}
        return _rows(number, case, llms, held)

    measure_prompts(results, cases, len(llms), measure, on_prompt)
    for llm in llms.values():
        llm.delete(tenant=True)
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return, for each store and number of chunks, medians of the times and means of KL, and tables of them."""
    rows = [
        {
            **row,
            "bytes_per_token": row["nbytes"] / row["tokens"],
            "put_ms": 1e3 * row["put_s"],
            "get_ms": 1e3 * row["get_s"],
            "put_of_floor": row["floor_put_s"] / row["put_s"],
            "get_of_floor": row["floor_get_s"] / row["get_s"],
            "get_gb_per_s": row["nbytes"] / row["get_s"] / 1e9,
            "cold_ttft_ratio": row["cold_ttft_s"] and row["cold_ttft_s"] * row["ttft_ratio"] / row["ttft_s"],
        }
        for row in results.rows
    ]
    medians = ("bytes_per_token", "put_ms", "get_ms", "put_of_floor", "get_of_floor", "get_gb_per_s", "ttft_s",
               "ttft_ratio", "cold_ttft_ratio", "load_s", "peak_ratio")  # fmt: skip
    of = dict.fromkeys(medians, statistics.median) | dict.fromkeys(("kl_first", "kl_memory"), statistics.mean)
    sums = averages(rows, ("store", "chunks"), "prompt", {**of, "lost": sum})
    ids = {"store": "{store}", "chunks": "{chunks}"}
    columns = {
        "bytes/token": "{bytes_per_token:.0f}", "put ms": "{put_ms:.0f}", "get ms": "{get_ms:.0f}",
        "get GB/s": "{get_gb_per_s:.2f}", "put/floor": "{put_of_floor:.2f}", "get/floor": "{get_of_floor:.2f}",
    }  # fmt: skip
    requests = {
        "TTFT s": "{ttft_s:.3f}", "of memory": "{ttft_ratio:.3f}", "cold": "{cold_ttft_ratio:.3f}",
        "load s": "{load_s:.3f}", "peak/KV": "{peak_ratio:.2f}", "KL first": "{kl_first:.4f}",
        "KL to raw": "{kl_memory:.5f}", "lost": "{lost:.0f}",
    }  # fmt: skip
    tables = [
        table("all chunks of a prompt (medians; floor: a plain copy of as many bytes)", {**ids, **columns}, sums),
        table("requests (medians; KL: means, in nats)", {**ids, **requests}, sums),
    ]
    return {"stores": sums, "tables": tables, "plots": []}


def _check_reachable(url: str, store: Store) -> None:
    key, kv = ChunkKey.of(TENANT, (), ()), ChunkKV.of((), 0, [torch.zeros(1, dtype=torch.uint8)])
    store.put(key, kv)
    store.flush()
    if not all(key in tier for tier in store.tiers().values()):
        raise StoreURLError(f"{redacted(url)} does not keep what is put into it; is it up, and not full?")
    store.delete(key)


def _rows(number: int, case: Case, llms: Mapping[str, CachedLLM], held: Mapping[ChunkKey, ChunkKV]) -> Iterator[Row]:
    """Measure one prompt from all stores; `held` is what the first, in memory, has of it."""
    memory = llms[MEMORY]
    wanted = {memory.prompts.chunk(text) for text in case.chunks}
    chunk_kv = {key: kv for key, kv in held.items() if kv.token_ids in wanted}
    data = torch.empty(max(kv.nbytes for kv in chunk_kv.values()), dtype=torch.uint8).random_(255)
    costs: dict[str, Row] = {}
    for url, llm in llms.items():
        for key in held.keys() - chunk_kv.keys():
            llm.store.put(key, held[key])
        costs[url] = _costs(url, llm.store, chunk_kv, data)
        llm.store.flush()
    full = memory.prefill(case.question, case.chunks, policy="full").logits
    measured: dict[str, list[tuple[float, PrefillOutput]]] = {url: [] for url in llms}
    urls = list(llms)
    for repeat in range(_REPEATS + 1):
        turn = (number + repeat) % len(urls)
        for url in (*urls[turn:], *urls[:turn]):
            result = _timed(llms[url], case)
            if repeat:  # the first fills what a tier fills on demand
                measured[url].append(result)
    by_memory = statistics.median(ttft_s for ttft_s, _ in measured[MEMORY])
    reference = measured[MEMORY][0][1].logits
    for url, llm in llms.items():
        outputs = [output for _, output in measured[url]]
        ttft_s = statistics.median(seconds for seconds, _ in measured[url])
        yield {
            "store": redacted(url),
            "chunks": len(case.chunks),
            "tokens": outputs[-1].stats.tokens,
            **costs[url],
            "ttft_s": ttft_s,
            "ttft_ratio": ttft_s / by_memory,
            "cold_ttft_s": _timed(llm, case)[0] if _drop_from_page_cache(llm.store) else None,
            "load_s": statistics.median(output.stats.load_s for output in outputs),
            "assemble_s": statistics.median(output.stats.assemble_s for output in outputs),
            "peak_ratio": _peak_ratio(llm, case),
            "kl_first": _kl(full, outputs[-1].logits),
            "kl_memory": _kl(reference, outputs[-1].logits),
            "lost": sum(output.stats.lost + output.stats.misses for output in outputs),
        }


def _costs(url: str, store: Store, chunk_kv: Mapping[ChunkKey, ChunkKV], data: torch.Tensor) -> Row:
    """Return the bytes kept, and seconds to put, to get, and of both floors, for all chunks together."""
    names = ("put_s", "get_s", "floor_put_s", "floor_get_s")
    times: list[tuple[float, ...]] = []
    for _ in range(_REPEATS):
        steps = []
        for key, kv in chunk_kv.items():
            store.delete(key)
            started = time.perf_counter()
            store.put(key, replace(kv, origin=replace(kv.origin, created=time.time())))
            store.flush()
            put_s, started = time.perf_counter() - started, time.perf_counter()
            got = store.get(key, kv.token_ids)
            layers = [] if got is None else list(got.layers)
            get_s = time.perf_counter() - started
            steps.append((put_s, get_s, *raw_copy(url, store, data[: sum(layer.nbytes for layer in layers)])))
        times.append(tuple(map(sum, zip(*steps, strict=True))))
    medians = map(statistics.median, zip(*times, strict=True))
    nbytes = sum(entry.nbytes for entry in list(store.tiers().values())[-1].entries() if entry.key in chunk_kv)
    return {"nbytes": nbytes, **dict(zip(names, medians, strict=True))}


def _timed(llm: CachedLLM, case: Case) -> tuple[float, PrefillOutput]:
    ttft_s, output = time_prefill(llm, case)
    llm.store.flush()
    return ttft_s, replace(output, past_key_values=DynamicCache())  # several at once would fill the memory


def _peak_ratio(llm: CachedLLM, case: Case) -> float | None:
    """Return the peak memory of a request over its KV; measuring it would slow down a request that is timed."""
    with PeakMemory(llm.model.device) as peak:
        cache = llm.prefill(case.question, case.chunks).past_key_values
    return None if peak.nbytes is None else peak.nbytes / kv_bytes(cache)


def _drop_from_page_cache(store: Store) -> bool:
    """Let the system forget the files of disk tiers; return whether there are any."""
    disks = [tier for tier in store.tiers().values() if isinstance(tier, DiskStore)]
    for path in (path for disk in disks for path in disk.folder.rglob("*.ckv")):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return bool(disks)


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> float | None:
    return finite(first_kl(reference.float().log_softmax(-1), logits))
