"""Computes the chunk KV of whole folders into a store, by one copy of the model here or by many (`warm.ray`).

The work goes out in shards of a few thousand tokens. A shard is in the store when it is done, so whatever is
interrupted, or dies, costs no more than the shard in work; and what is stored already is not computed again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch

from chunkcache.engine.chunks import PrecomputeResult
from chunkcache.engine.near import Lead
from chunkcache.errors import ContextLengthError
from chunkcache.kv import chunk_name, hashed_label
from chunkcache.library.neighbours import ASKED, Neighbours
from chunkcache.llm import CachedLLM, wrap
from chunkcache.models import load_model
from chunkcache.retriever import Chunk, Document, split
from chunkcache.retriever.nearest import nearest_texts
from chunkcache.store import EntryFilter, Store
from chunkcache.store.lasting import open_persistent

logger = logging.getLogger("chunkcache")

SHARD_TOKENS = 4096
SHARD_TEXTS = 32
TROUBLE = ("refused", "errors", "skipped")

OnStatus = Callable[[str], None]


@dataclass(frozen=True)
class Shard:
    """Texts that one worker computes at a time.

    Attributes:
        owners: the ids of the documents that have each text.
        nearest: the texts that each is to be computed behind, nearest first; empty for the packaged lead-in alone.
    """

    owners: dict[str, list[str]] = field(default_factory=dict)
    nearest: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.owners)


@dataclass(frozen=True)
class WarmConfig:
    """Model, store and kind of requests that KV are computed for; every worker gets it.

    Attributes:
        model: name of the model, as in `load_model`; `device` and `dtype` too.
        store: URL of the store.
        policy: policy that requests will use.
        system: system prompt that they will use.
        tenant: of these requests.
        chunk_tokens: length of a chunk at most.
        threads: CPU threads of a worker; None leaves them as they are.
        lead: what chunks are computed behind for a policy that wants a lead-in: `packaged`, or `neighbours`, too.
    """

    model: str
    store: str
    device: str | None = None
    dtype: str = "auto"
    policy: str = "query"
    system: str | None = None
    tenant: str = ""
    chunk_tokens: int = 256
    threads: int | None = None
    lead: Literal["packaged", "neighbours"] = "packaged"


@dataclass
class WarmReport:
    """Counts of what was done.

    Attributes:
        documents: documents that were read.
        chunks: different chunks that they have.
        computed: chunks computed; the others were in the store, or are too long.
        too_long: chunks that are longer than the model's context and were left out.
        near: those of the computed that were computed behind their nearest chunks.
        computed_tokens: tokens of the computed.
        deleted: entries deleted, of what is no longer in its document.
        nbytes: bytes by which the store grew, but for what was deleted.
        workers: copies of the model at work.
        lost_workers: how many of them died; others took over their work.
        store: what the workers' stores counted.
    """

    documents: int = 0
    chunks: int = 0
    computed: int = 0
    computed_tokens: int = 0
    deleted: int = 0
    nbytes: int = 0
    workers: int = 1
    lost_workers: int = 0
    too_long: int = 0
    near: int = 0
    store: Counter[str] = field(default_factory=Counter)

    @property
    def skipped(self) -> int:
        """Chunks that were in the store already."""
        return max(0, self.chunks - self.computed - self.too_long)

    @property
    def failures(self) -> int:
        """Operations of the store that failed: the store may lack chunks."""
        return sum(self.store[name] for name in TROUBLE)


class Worker:
    """One copy of the model, with the store open.

    Args:
        config: what is computed.
        secrets: environment variables to be set, where this is another machine.
    """

    def __init__(self, config: WarmConfig, secrets: Mapping[str, str] | None = None) -> None:
        self._config = config
        os.environ.update(secrets or {})
        self._llm: CachedLLM | None = None

    def load(self, on_status: OnStatus | None = None) -> str:
        """Load the model and open the store; return where this runs."""
        config = self._config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        store = open_persistent(config.store)
        model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype, on_status=on_status)
        self._llm = wrap(model, tokenizer, store=store, policy=config.policy, tenant=config.tenant)
        return f"process {os.getpid()} on {socket.gethostname()}"

    def plan(self, documents: Sequence[Document]) -> tuple[list[Chunk], set[str]]:
        """Cut documents into chunks; return these, and the documents that the store has other chunks of."""
        config, llm = self._config, self.llm
        chunks = [
            chunk for document in documents for chunk in split(document, llm.tokenizer, size=config.chunk_tokens)
        ]
        ids = {hashed_label("document", document.id): document.id for document in documents}
        names: dict[str, set[str]] = {document.id: set() for document in documents}
        for chunk in chunks:
            names[chunk.document_id].add(chunk_name(llm.prompts.chunk(chunk.text)))
        stale: set[str] = set()
        for entry in llm.store.entries(
            EntryFilter(model=llm.fingerprint, tenant=hashed_label("tenant", config.tenant))
        ):
            owners = [ids[owner] for owner in entry.documents if owner in ids]
            if len(entry.chunks) == 1:
                stale.update(owner for owner in owners if entry.chunks[0] not in names[owner])
            elif len(owners) == len(entry.documents):  # or it may be of the others what is not known here
                now = set().union(*(names[owner] for owner in owners))
                stale.update(owners if not now.issuperset(entry.chunks) else ())
        return chunks, stale

    def precompute(self, shard: Shard, on_progress: Callable[[int, int], None] | None = None) -> PrecomputeResult:
        """Compute what the store lacks of a shard."""
        pairs = ((text, owner) for text, owners in shard.owners.items() for owner in owners)
        texts, documents = zip(*pairs, strict=True)
        near = [shard.nearest[text] for text in texts] if shard.nearest else None
        lead: Lead = "packaged" if near is None else Neighbours(nearest=near)
        try:
            return self.llm.precompute(
                texts, system=self._config.system, documents=documents, on_progress=on_progress, lead=lead
            )
        except ContextLengthError:  # of one chunk alone; among others it would be left out, too
            return PrecomputeResult(1, 0, 0, skipped=1)

    def prune(self, document: str, texts: Sequence[str]) -> tuple[int, int]:
        """Delete what is no longer in a document; return how many entries and bytes went."""
        before = _last(self.llm.store).stats()
        with suppress(ContextLengthError):  # said by `precompute`
            self.llm.update_document(document, texts, system=self._config.system)
        after = _last(self.llm.store).stats()
        return before.entries - after.entries, before.nbytes - after.nbytes

    def close(self) -> Counter[str]:
        """Close the store, and return what its tiers counted."""
        if self._llm is None:
            return Counter()
        store = self._llm.store
        store.flush()
        counted = [tier.stats() for tier in store.tiers().values()]
        store.close()
        return Counter({name: sum(getattr(stats, name) for stats in counted) for name in (*TROUBLE, "evictions")})

    @property
    def llm(self) -> CachedLLM:
        """The wrapped model."""
        if self._llm is None:
            self.load()
        assert self._llm is not None
        return self._llm


class WorkerPool(Protocol):
    """Workers that compute chunk KV into one store.

    Attributes:
        size: number of workers at the start.
        lost: number of them that have died.
    """

    size: int
    lost: int

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of one worker, and return its result."""

    def precompute(self, shards: Sequence[Shard], on_texts: Callable[[int], None]) -> Iterator[PrecomputeResult]:
        """Let the workers compute shards; calls `on_texts` with the number of texts done so far."""

    def close(self) -> Counter[str]:
        """End all workers; return what their stores counted."""


def warm(
    config: WarmConfig,
    documents: Sequence[Document],
    pool: WorkerPool,
    on_progress: Callable[[int, int], None] | None = None,
) -> WarmReport:
    """Compute the chunk KV of `documents` that the store lacks, and delete those of what is no longer in them.

    Args:
        config: the model, the store, and what requests will look like.
        documents: what requests will find chunks of.
        pool: the workers that compute; see `local_pool` and `ray_pool`.
        on_progress: called with (chunks done, chunks in all).

    Raises:
        ChunkCacheError: no worker is left, or what one of them raised.
    """
    store = open_persistent(config.store)
    before = _last(store).stats().nbytes
    chunks, stale = pool.ask("plan", documents)
    edited = [chunk for chunk in chunks if chunk.document_id in stale]
    nearest = _nearest(chunks) if config.lead == "neighbours" else {}
    first, shards = list(_shards(edited, nearest)), list(_shards(chunks, nearest))
    total, behind = sum(map(len, [*first, *shards])), sum(map(len, first))
    done = WarmReport(len(documents), sum(map(len, shards)), workers=pool.size)

    def run(shards: list[Shard], offset: int) -> int:
        too_long = 0
        for computed in pool.precompute(shards, lambda n: on_progress(offset + n, total) if on_progress else None):
            done.computed += computed.computed
            done.computed_tokens += computed.computed_tokens
            done.near += computed.near
            too_long += computed.skipped
        return too_long

    # A chunk that goes from one document may be part of another: so what is deleted is deleted before the rest is
    # computed, and new chunks of edited documents before that, shared out, or pruning would compute them one by one.
    run(first, 0)
    for document in sorted(stale):
        entries, nbytes = pool.ask("prune", document, [c.text for c in edited if c.document_id == document])
        done.deleted += entries
        before -= nbytes
    done.too_long = run(shards, behind)
    done.store = pool.close()
    done.lost_workers = pool.lost
    done.nbytes = _last(store).stats().nbytes - before
    store.close()
    return done


@contextmanager
def local_pool(config: WarmConfig, on_status: OnStatus | None = None) -> Iterator[WorkerPool]:
    """Yield a pool of one worker, in this process."""
    pool = _LocalPool(config)
    try:
        pool.worker.load(on_status)
        yield pool
    finally:
        pool.close()


class _LocalPool:
    size = 1
    lost = 0

    def __init__(self, config: WarmConfig) -> None:
        self.worker = Worker(config)
        self._counted: Counter[str] | None = None

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def precompute(self, shards: Sequence[Shard], on_texts: Callable[[int], None]) -> Iterator[PrecomputeResult]:
        end = 0
        for shard in shards:
            end += len(shard)
            yield self.worker.precompute(shard, partial(_within, on_texts, end))
            on_texts(end)

    def close(self) -> Counter[str]:
        if self._counted is None:
            self._counted = self.worker.close()
        return self._counted


def _nearest(chunks: Sequence[Chunk]) -> dict[str, list[str]]:
    """Return the nearest texts of each text."""
    texts = list(dict.fromkeys(chunk.text.strip() for chunk in chunks))
    found = nearest_texts(texts, texts, ASKED) if texts else []
    return {text: [texts[place] for place in near] for text, near in zip(texts, found, strict=True)}


def _shards(chunks: Iterable[Chunk], nearest: Mapping[str, list[str]] | None = None) -> Iterator[Shard]:
    """Group chunks into shards. All documents of a text are in one: else workers would overwrite labels."""
    texts: dict[str, tuple[int, dict[str, None]]] = {}
    for chunk in chunks:
        texts.setdefault(chunk.text.strip(), (chunk.tokens, {}))[1][chunk.document_id] = None
    shard = Shard()
    tokens = 0
    for text, (length, owners) in texts.items():
        if shard and (tokens + length > SHARD_TOKENS or len(shard) == SHARD_TEXTS):
            yield shard
            shard, tokens = Shard(), 0
        shard.owners[text] = list(owners)
        if nearest:
            shard.nearest[text] = nearest[text]
        tokens += length
    if shard:
        yield shard


def _within(on_texts: Callable[[int], None], end: int, done: int, todo: int) -> None:
    on_texts(end - todo + done)


def _last(store: Store) -> Store:
    return [*store.tiers().values()][-1]
