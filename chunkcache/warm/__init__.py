"""Computes the chunk KV of whole folders into a store, by one copy of the model here or by many (`warm_ray`).

The work goes out in shares of a few thousand tokens. A share is in the store when it is done, so whatever is
interrupted, or dies, costs no more than the share in work; and what is stored already is not computed again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from chunkcache.engine.precompute import PrecomputeResult
from chunkcache.kv import chunk_name, hashed_label
from chunkcache.llm import CachedLLM, wrap
from chunkcache.models import load_model
from chunkcache.retriever import Chunk, Document, split
from chunkcache.store import EntryFilter, Store
from chunkcache.store.bytestore import SECRET
from chunkcache.store.lasting import open_persistent

logger = logging.getLogger("chunkcache")

SHARE_TOKENS = 4096
SHARE_TEXTS = 32
TROUBLE = ("refused", "errors", "skipped")

Share = dict[str, list[str]]  # texts, and the ids of the documents that have them
OnStatus = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What every worker has to know.

    Attributes:
        model: name of the model, as in `load_model`; `device` and `dtype` too.
        store: URL of the store.
        policy: policy that requests will use.
        system: system prompt that they will use.
        tenant: theirs.
        chunk_tokens: length of a chunk at most.
        threads: CPU threads of a worker; None leaves them as they are.
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


@dataclass
class Warmed:
    """What was done.

    Attributes:
        documents: documents that were read.
        chunks: different chunks that they have.
        computed: chunks computed; the others were in the store.
        computed_tokens: tokens of these.
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
    store: Counter[str] = field(default_factory=Counter)

    @property
    def skipped(self) -> int:
        """Chunks that were in the store already."""
        return max(0, self.chunks - self.computed)

    @property
    def failures(self) -> int:
        """Operations of the store that failed: the store may lack chunks."""
        return sum(self.store[name] for name in TROUBLE)


class Worker:
    """One copy of the model, with the store open."""

    def __init__(self, job: Job, secret: str = "") -> None:
        self._job = job
        if secret:  # on another machine
            os.environ[SECRET] = secret
        self._llm: CachedLLM | None = None

    def load(self, on_status: OnStatus | None = None) -> str:
        """Load the model and open the store; return where this runs."""
        job = self._job
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        store = open_persistent(job.store)
        model, tokenizer = load_model(job.model, device=job.device, dtype=job.dtype, on_status=on_status)
        self._llm = wrap(model, tokenizer, store, job.policy, job.tenant)
        return f"process {os.getpid()} on {socket.gethostname()}"

    def plan(self, documents: Sequence[Document]) -> tuple[list[Chunk], set[str]]:
        """Cut documents into chunks; return these, and the documents that the store has other chunks of."""
        job, llm = self._job, self.llm
        chunks = [chunk for document in documents for chunk in split(document, llm.tokenizer, size=job.chunk_tokens)]
        ids = {hashed_label("document", document.id): document.id for document in documents}
        names: dict[str, set[str]] = {document.id: set() for document in documents}
        for chunk in chunks:
            names[chunk.document_id].add(chunk_name(llm.prompts.chunk(chunk.text)))
        stale: set[str] = set()
        for entry in llm.store.entries(EntryFilter(model=llm.fingerprint, tenant=hashed_label("tenant", job.tenant))):
            owners = [ids[owner] for owner in entry.documents if owner in ids] if len(entry.chunks) == 1 else []
            stale.update(owner for owner in owners if entry.chunks[0] not in names[owner])
        return chunks, stale

    def precompute(self, share: Share, on_progress: Callable[[int, int], None] | None = None) -> PrecomputeResult:
        """Compute what the store lacks of a share."""
        texts, documents = zip(*((text, owner) for text, owners in share.items() for owner in owners), strict=True)
        return self.llm.precompute(texts, self._job.system, on_progress, documents=documents)

    def prune(self, document: str, texts: Sequence[str]) -> tuple[int, int]:
        """Delete what is no longer in a document; return how many entries and bytes went."""
        before = _last(self.llm.store).stats()
        self.llm.update_document(document, texts, self._job.system)
        after = _last(self.llm.store).stats()
        return before.entries - after.entries, before.nbytes - after.nbytes

    def close(self) -> Counter[str]:
        """Close the store, and return what its tiers counted."""
        if self._llm is None:
            return Counter()
        store = self._llm.store
        store.flush()
        each = [tier.stats() for tier in store.tiers().values()]
        store.close()
        return Counter({name: sum(getattr(s, name) for s in each) for name in (*TROUBLE, "evictions")})

    @property
    def llm(self) -> CachedLLM:
        """The wrapped model."""
        if self._llm is None:
            self.load()
        assert self._llm is not None
        return self._llm


class Crew(Protocol):
    """Workers, wherever they are.

    Attributes:
        size: how many there were at the start.
        lost: how many of them have died.
    """

    size: int
    lost: int

    def ask(self, method: str, *args: Any) -> Any:
        """Let one worker do something, and return what it answers."""

    def precompute(self, shares: Sequence[Share], on_texts: Callable[[int], None]) -> Iterator[PrecomputeResult]:
        """Let the workers compute shares; calls `on_texts` with the number of texts done so far."""

    def close(self) -> Counter[str]:
        """Let all workers go; return what their stores counted."""


def warm(
    job: Job, documents: Sequence[Document], crew: Crew, on_progress: Callable[[int, int], None] | None = None
) -> Warmed:
    """Compute the chunk KV of `documents` that the store lacks, and delete those of what is no longer in them.

    Args:
        job: the job of the crew.
        documents: what requests will find chunks of.
        crew: who does it; see `alone` and `on_ray`.
        on_progress: called with (chunks done, chunks in all).

    Raises:
        ChunkCacheError: no worker is left, or what one of them raised.
    """
    store = open_persistent(job.store)
    before = _last(store).stats().nbytes
    chunks, stale = crew.ask("plan", documents)
    edited = [chunk for chunk in chunks if chunk.document_id in stale]
    first, shares = list(_shares(edited)), list(_shares(chunks))
    total, behind = sum(map(len, [*first, *shares])), sum(map(len, first))
    done = Warmed(len(documents), sum(map(len, shares)), workers=crew.size)

    def run(shares: list[Share], offset: int) -> None:
        for computed in crew.precompute(shares, lambda n: on_progress(offset + n, total) if on_progress else None):
            done.computed += computed.computed
            done.computed_tokens += computed.computed_tokens

    # A chunk that goes from one document may be part of another: so what is deleted is deleted before the rest is
    # computed, and new chunks of edited documents before that, shared out, or pruning would compute them one by one.
    run(first, 0)
    for document in sorted(stale):
        entries, nbytes = crew.ask("prune", document, [c.text for c in edited if c.document_id == document])
        done.deleted += entries
        before -= nbytes
    run(shares, behind)
    done.store = crew.close()
    done.lost_workers = crew.lost
    done.nbytes = _last(store).stats().nbytes - before
    store.close()
    return done


@contextmanager
def alone(job: Job, on_status: OnStatus | None = None) -> Iterator[Crew]:
    """A crew of one, in this process."""
    crew = _Alone(job)
    try:
        crew.worker.load(on_status)
        yield crew
    finally:
        crew.close()


class _Alone:
    size = 1
    lost = 0

    def __init__(self, job: Job) -> None:
        self.worker = Worker(job)
        self._counted: Counter[str] | None = None

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def precompute(self, shares: Sequence[Share], on_texts: Callable[[int], None]) -> Iterator[PrecomputeResult]:
        end = 0
        for share in shares:
            end += len(share)
            yield self.worker.precompute(share, partial(_within, on_texts, end))
            on_texts(end)

    def close(self) -> Counter[str]:
        if self._counted is None:
            self._counted = self.worker.close()
        return self._counted


def _shares(chunks: Iterable[Chunk]) -> Iterator[Share]:
    """Group chunks into shares; all documents of a text are in one, or workers would undo each other's notes."""
    texts: dict[str, tuple[int, dict[str, None]]] = {}
    for chunk in chunks:
        texts.setdefault(chunk.text.strip(), (chunk.tokens, {}))[1][chunk.document_id] = None
    share: Share = {}
    tokens = 0
    for text, (length, owners) in texts.items():
        if share and (tokens + length > SHARE_TOKENS or len(share) == SHARE_TEXTS):
            yield share
            share, tokens = {}, 0
        share[text] = list(owners)
        tokens += length
    if share:
        yield share


def _within(on_texts: Callable[[int], None], end: int, done: int, todo: int) -> None:
    on_texts(end - todo + done)


def _last(store: Store) -> Store:
    return [*store.tiers().values()][-1]
