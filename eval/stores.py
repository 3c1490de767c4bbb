"""Stores side by side: how fast they take and give chunk KV, and what a request from each costs over memory.

Each prompt's chunks are computed once and put into every store. Then the same requests run from each store in turn,
in an order that rotates. The floor of a tier is a plain copy of as many bytes over the same medium.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.errors import StoreURLError
from chunkcache.eval.compare import kv_bytes
from chunkcache.eval.data import Case
from chunkcache.eval.machine import meta_data
from chunkcache.eval.memory import PeakMemory
from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.llm import CachedLLM, PrefillOutput
from chunkcache.store import DiskStore, MemoryStore, RedisStore, Store
from chunkcache.store.url import redacted

MEMORY = "memory://"  # what the others are compared with
CODECS = ("", "?codec=bf16", "?codec=int8", "?codec=int4", "?compress=zstd", "?codec=bf16&compress=zstd")
SALT = "chunkcache bench store"  # keeps what is measured apart from all else in a store
_REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One prompt from one store. Seconds, bytes, and nats for KL; times are medians of some repeats.

    Attributes:
        store: its URL.
        prompt: number of the prompt.
        chunks: chunks in it.
        tokens: tokens in it.
        nbytes: KV of its chunks as the store keeps them.
        put_s: storing all of them, one after the other.
        get_s: reading all layers of all of them, verified.
        floor_put_s: writing as many bytes over the same medium, with nothing else done to them.
        floor_get_s: reading them, likewise.
        ttft_s: time to first token.
        ttft_ratio: over that from memory.
        cold_ttft_s: time to first token when a disk's files are not in the page cache; None without a disk tier.
        load_s: loading, beside the prefill.
        assemble_s: waiting for what is loaded, and putting it in place.
        peak_ratio: peak memory of the request over the prompt's own KV; None if unknown.
        kl_first: KL of the first token to full prefill.
        kl_memory: KL of the first token to the same request from memory.
        lost: chunks that proved damaged or gone.
    """

    store: str
    prompt: int
    chunks: int
    tokens: int
    nbytes: int
    put_s: float
    get_s: float
    floor_put_s: float
    floor_get_s: float
    ttft_s: float
    ttft_ratio: float
    cold_ttft_s: float | None
    load_s: float
    assemble_s: float
    peak_ratio: float | None
    kl_first: float
    kl_memory: float
    lost: int


@dataclass
class StoreBench:
    """The rows of a run, and what it ran on."""

    meta: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def summaries(self) -> list[dict[str, Any]]:
        """Return, for each store and number of chunks, medians of the times and means of KL."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.store, row.chunks), []).append(row)
        return [_summary(store, chunks, rows) for (store, chunks), rows in groups.items()]

    def as_dict(self) -> dict[str, Any]:
        """Return meta data, summaries and rows as plain dicts for JSON."""
        return {"meta": self.meta, "summary": self.summaries(), "rows": [asdict(row) for row in self.rows]}


def bench_stores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    stores: Mapping[str, Store],
    policy: str,
    on_prompt: Callable[[int, int], None] | None = None,
    on_rows: Callable[[StoreBench], None] | None = None,
) -> StoreBench:
    """Run the prompts of `cases` from each store.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: the prompts.
        stores: the stores to compare with memory, by their URLs. What they hold already is left alone.
        policy: the policy of every request.
        on_prompt: called with (prompts done, prompts in all).
        on_rows: called with all there is so far, after every prompt.

    Raises:
        StoreURLError: a store does not keep what is put into it.
    """
    for url, store in stores.items():
        _check_reachable(url, store)
    memory = MemoryStore()
    stores = {MEMORY: memory, **stores}
    llms = {
        name: chunkcache.wrap(model, tokenizer, store=store, policy=policy, tenant=SALT)
        for name, store in stores.items()
    }
    bench = StoreBench(meta_data(model, [policy], cases))
    for llm in llms.values():  # kernels and allocators settle on a short prompt
        llm.prefill("Is this only to warm up?", [chunk[:200] for chunk in cases[0].chunks[:2]])
    for index, case in enumerate(cases):
        for llm in llms.values():
            llm.forget()
        llms[MEMORY].precompute(case.chunks)
        bench.rows += _rows(index, case, llms, stores, memory)
        if on_rows is not None:
            on_rows(bench)
        if on_prompt is not None:
            on_prompt(index + 1, len(cases))
    for llm in llms.values():
        llm.forget()
    return bench


def _check_reachable(url: str, store: Store) -> None:
    key, kv = ChunkKey.of(SALT, (), ()), ChunkKV.of((), 0, [torch.zeros(1, dtype=torch.uint8)])
    store.put(key, kv)
    store.flush()
    if not all(key in tier for tier in store.tiers().values()):
        raise StoreURLError(f"{redacted(url)} does not keep what is put into it; is it up, and not full?")
    store.delete(key)


def raw_copy(url: str, store: Store, data: torch.Tensor) -> tuple[float, float]:
    """Return the seconds to write and to read `data` (bytes) over the medium of `store`, with nothing else done."""
    last = list(store.tiers().values())[-1]
    if isinstance(last, DiskStore):
        return _raw_file(last.folder, data)
    if isinstance(last, RedisStore):
        return _raw_redis(url, data)
    started = time.perf_counter()
    copied = data.clone()
    middle = time.perf_counter()
    copied.clone()
    return middle - started, time.perf_counter() - middle


def _rows(
    index: int, case: Case, llms: Mapping[str, CachedLLM], stores: Mapping[str, Store], memory: MemoryStore
) -> list[Row]:
    wanted = {llms[MEMORY].prompts.chunk(text) for text in case.chunks}
    held = {entry.key: kv for entry in memory.entries() if (kv := memory.peek(entry.key)) is not None}
    chunk_kv = {key: kv for key, kv in held.items() if kv.token_ids in wanted}
    data = torch.empty(max(kv.nbytes for kv in chunk_kv.values()), dtype=torch.uint8).random_(255)
    costs: dict[str, dict[str, Any]] = {}
    for name, store in stores.items():
        for key in held.keys() - chunk_kv.keys():
            store.put(key, held[key])
        costs[name] = _costs(name, store, chunk_kv, data)
        store.flush()
    full = _log_probs(llms[MEMORY].prefill(case.question, case.chunks, policy="full"))
    measured: dict[str, list[tuple[float, PrefillOutput]]] = {name: [] for name in stores}
    names = list(stores)
    for repeat in range(_REPEATS + 1):
        turn = (index + repeat) % len(names)
        for name in (*names[turn:], *names[:turn]):
            result = _request(llms[name], case)
            if repeat:  # the first fills what a tier fills on demand
                measured[name].append(result)
    by_memory = statistics.median(ttft_s for ttft_s, _ in measured[MEMORY])
    reference = _log_probs(measured[MEMORY][0][1])
    rows = []
    for name, results in measured.items():
        last = results[-1][1]
        stats, log_probs = last.stats, _log_probs(last)
        ttft_s = statistics.median(ttft_s for ttft_s, _ in results)
        rows.append(
            Row(
                name,
                index,
                len(case.chunks),
                stats.tokens,
                **costs[name],
                ttft_s=ttft_s,
                ttft_ratio=ttft_s / by_memory,
                cold_ttft_s=_request(llms[name], case)[0] if _drop_from_page_cache(stores[name]) else None,
                load_s=statistics.median(result.stats.load_s for _, result in results),
                assemble_s=statistics.median(result.stats.assemble_s for _, result in results),
                peak_ratio=_peak_ratio(llms[name], case),
                kl_first=_kl(full, log_probs),
                kl_memory=_kl(reference, log_probs),
                lost=sum(result.stats.lost + result.stats.misses for _, result in results),
            )
        )
    return rows


def _costs(url: str, store: Store, chunk_kv: Mapping[ChunkKey, ChunkKV], data: torch.Tensor) -> dict[str, Any]:
    """Return the bytes kept, and seconds to put, to get, and of both floors, for all chunks together."""
    times: list[list[float]] = []
    for _ in range(_REPEATS):
        sums = [0.0, 0.0, 0.0, 0.0]
        for key, kv in chunk_kv.items():
            store.delete(key)
            started = time.perf_counter()
            store.put(key, replace(kv, origin=replace(kv.origin, created=time.time())))
            store.flush()
            sums[0] += time.perf_counter() - started
            started = time.perf_counter()
            got = store.get(key, kv.token_ids)
            layers = [] if got is None else list(got.layers)
            sums[1] += time.perf_counter() - started
            written, read = raw_copy(url, store, data[: sum(layer.nbytes for layer in layers)])
            sums[2] += written
            sums[3] += read
        times.append(sums)
    put_s, get_s, floor_put_s, floor_get_s = (statistics.median(column) for column in zip(*times, strict=True))
    nbytes = sum(entry.nbytes for entry in list(store.tiers().values())[-1].entries() if entry.key in chunk_kv)
    return {
        "nbytes": nbytes,
        "put_s": put_s,
        "get_s": get_s,
        "floor_put_s": floor_put_s,
        "floor_get_s": floor_get_s,
    }


def _request(llm: CachedLLM, case: Case) -> tuple[float, PrefillOutput]:
    started = time.perf_counter()
    prefilled = llm.prefill(case.question, case.chunks)
    int(prefilled.logits.argmax())  # the first token id, on the host
    ttft_s = time.perf_counter() - started
    llm.store.flush()
    return ttft_s, replace(prefilled, cache=DynamicCache())  # several at once would fill the memory


def _peak_ratio(llm: CachedLLM, case: Case) -> float | None:
    """Return the peak memory of a request over its KV; measuring it would slow down a request that is timed."""
    with PeakMemory(llm.model.device) as peak:
        cache = llm.prefill(case.question, case.chunks).cache
    return None if peak.nbytes is None else peak.nbytes / kv_bytes(cache)


def _drop_from_page_cache(store: Store) -> bool:
    """Let the system forget the files of disk tiers; return whether there are any."""
    disks = [tier for tier in store.tiers().values() if isinstance(tier, DiskStore)]
    for path in (path for disk in disks for path in disk.folder.rglob("*.ckv")):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return bool(disks)


def _raw_file(folder: Path, data: torch.Tensor) -> tuple[float, float]:
    view = data.numpy().data
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        file.write(view)
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        file.seek(0)
        started = time.perf_counter()
        file.readinto(torch.empty_like(data).numpy().data)
        return written, time.perf_counter() - started


def _raw_redis(url: str, data: torch.Tensor) -> tuple[float, float]:
    """SET and GET one value over a plain socket; TLS and passwords are not spoken here."""
    address = urlsplit(url)
    name = b"chunkcache-bench"
    view = data.numpy().data
    with socket.socket(socket.AF_UNIX if "unix" in address.scheme else socket.AF_INET) as server:
        server.connect(address.path if "unix" in address.scheme else (address.hostname, address.port or 6379))
        started = time.perf_counter()
        server.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(view)))
        server.sendall(view)
        server.sendall(b"\r\n")
        _receive(server, memoryview(bytearray(5)))
        written = time.perf_counter() - started
        started = time.perf_counter()
        server.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
        reply = torch.empty(len(b"$%d\r\n" % len(view)) + len(view) + 2, dtype=torch.uint8)
        _receive(server, reply.numpy().data)
        read = time.perf_counter() - started
        server.sendall(b"*2\r\n$3\r\nDEL\r\n$%d\r\n%b\r\n" % (len(name), name))
        _receive(server, memoryview(bytearray(4)))
    return written, read


def _receive(server: socket.socket, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += server.recv_into(buffer[done:])


def _log_probs(prefilled: PrefillOutput) -> torch.Tensor:
    return prefilled.logits.float().log_softmax(-1)


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum())


def _summary(store: str, chunks: int, rows: Sequence[Row]) -> dict[str, Any]:
    def median(value: Callable[[Row], float]) -> float:
        return statistics.median(map(value, rows))

    peaks = [row.peak_ratio for row in rows if row.peak_ratio is not None]
    colds = [row.cold_ttft_s * row.ttft_ratio / row.ttft_s for row in rows if row.cold_ttft_s is not None]
    return {
        "store": store,
        "chunks": chunks,
        "prompts": len(rows),
        "bytes_per_token": median(lambda r: r.nbytes / r.tokens),
        "put_s": median(lambda r: r.put_s),
        "get_s": median(lambda r: r.get_s),
        "put_of_floor": median(lambda r: r.floor_put_s / r.put_s),
        "get_of_floor": median(lambda r: r.floor_get_s / r.get_s),
        "get_bytes_per_s": median(lambda r: r.nbytes / r.get_s),
        "ttft_s": median(lambda r: r.ttft_s),
        "ttft_ratio": median(lambda r: r.ttft_ratio),
        "cold_ttft_ratio": statistics.median(colds) if colds else None,
        "load_s": median(lambda r: r.load_s),
        "peak_ratio": statistics.median(peaks) if peaks else None,
        "kl_first": statistics.mean(row.kl_first for row in rows),
        "kl_memory": statistics.mean(row.kl_memory for row in rows),
        "lost": sum(row.lost for row in rows),
    }
