"""Computes the chunk KV of whole folders into a store, by one copy of the model here, or by many on a Ray cluster.

The work goes out in shares of a few thousand tokens. A share is in the store when it is done, so whatever is
interrupted, or dies, costs no more than the share in work; and what is stored already is not computed again.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from chunkcache.errors import ChunkCacheError, InputError
from chunkcache.kv import chunk_name, label
from chunkcache.llm import CachedLLM, Precomputed, wrap
from chunkcache.models import load_model
from chunkcache.retriever import Chunk, Document, split
from chunkcache.store import Store, Where
from chunkcache.store.bytestore import SECRET
from chunkcache.store.lasting import open_lasting

logger = logging.getLogger("chunkcache")

SHARE_TOKENS = 4096
SHARE_TEXTS = 32
CONNECT_S = 10.0
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
        tenant: salt that they will use.
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
        store = open_lasting(job.store)
        model, tokenizer = load_model(job.model, device=job.device, dtype=job.dtype, on_status=on_status)
        self._llm = wrap(model, tokenizer, store, job.policy, job.tenant)
        return f"process {os.getpid()} on {socket.gethostname()}"

    def plan(self, documents: Sequence[Document]) -> tuple[list[Chunk], set[str]]:
        """Cut documents into chunks; return these, and the documents that the store has other chunks of."""
        job, llm = self._job, self.llm
        chunks = [chunk for document in documents for chunk in split(document, llm.tokenizer, size=job.chunk_tokens)]
        ids = {label("document", document.id): document.id for document in documents}
        names: dict[str, set[str]] = {document.id: set() for document in documents}
        for chunk in chunks:
            names[chunk.document_id].add(chunk_name(llm.prompts.chunk(chunk.text)))
        stale: set[str] = set()
        for entry in llm.store.entries(Where(model=llm.fingerprint, tenant=label("tenant", job.tenant))):
            owners = [ids[owner] for owner in entry.documents if owner in ids] if len(entry.chunks) == 1 else []
            stale.update(owner for owner in owners if entry.chunks[0] not in names[owner])
        return chunks, stale

    def precompute(self, share: Share, on_progress: Callable[[int, int], None] | None = None) -> Precomputed:
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

    def precompute(self, shares: Sequence[Share], on_texts: Callable[[int], None]) -> Iterator[Precomputed]:
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
    store = open_lasting(job.store)
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


@contextmanager
def on_ray(
    job: Job, address: str, workers: int | None = None, cpus: int = 4, on_status: OnStatus | None = None
) -> Iterator[Crew]:
    """A crew on a Ray cluster, each with its own copy of the model.

    If the cluster has GPUs each gets one of them, which has not been tried out.

    Args:
        job: what they have to know. The model and a store in a folder must be there on every machine.
        address: of the cluster, such as `10.0.0.1:6379`; `local` starts one on this machine.
        workers: how many; None for as many as the cluster has CPUs (or GPUs) for.
        cpus: CPUs of each.
        on_status: called with a line before what may take long.

    Raises:
        InputError: Ray is not installed, the address does not answer, or the cluster is too small.
    """
    ray = _import_ray()
    if Path(job.model).exists():
        job = replace(job, model=str(Path(job.model).resolve()))
    if on_status is not None:
        on_status(f"connecting to Ray at {address}")
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, None if workers is None else workers * cpus)
    try:
        held = ray.cluster_resources()
        gpus = 0 if job.device == "cpu" else int(held.get("GPU", 0))
        fit = min(int(held.get("CPU", 0)) // cpus, gpus or 2**31)
        if fit < (workers or 1):
            raise InputError(
                f"{workers or 1} workers of {cpus} CPUs each do not fit the Ray cluster, which has "
                f"{held.get('CPU', 0):.0f} CPUs and {gpus} GPUs; lower --workers or --cpus-per-worker"
            )
        crew = _Cluster(ray, replace(job, threads=cpus), workers or fit, cpus, gpus > 0, on_status)
        try:
            yield crew
        finally:
            crew.close()
    finally:
        if started:
            ray.shutdown()


class _Alone:
    size = 1
    lost = 0

    def __init__(self, job: Job) -> None:
        self.worker = Worker(job)
        self._counted: Counter[str] | None = None

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def precompute(self, shares: Sequence[Share], on_texts: Callable[[int], None]) -> Iterator[Precomputed]:
        end = 0
        for share in shares:
            end += len(share)
            yield self.worker.precompute(share, partial(_within, on_texts, end))
            on_texts(end)

    def close(self) -> Counter[str]:
        if self._counted is None:
            self._counted = self.worker.close()
        return self._counted


class _Cluster:
    """Actors on a Ray cluster. One that dies is left out from then on, and its share goes to another."""

    def __init__(self, ray: Any, job: Job, size: int, cpus: int, gpu: bool, on_status: OnStatus | None) -> None:
        self._ray = ray
        self.size, self.lost = size, 0
        actor = ray.remote(num_cpus=cpus, num_gpus=int(gpu))(Worker)
        # the secret is an argument, since what a runtime environment holds goes to Ray's logs
        self._workers = [actor.remote(job, os.environ.get(SECRET, "")) for _ in range(size)]
        if on_status is not None:
            on_status(f"{size} workers load {job.model}")
        for _, where in self._all("load"):
            logger.info("a worker is %s", where)

    def ask(self, method: str, *args: Any) -> Any:
        while True:
            worker = self._workers[0]
            with self._surviving(worker):
                return self._answer(getattr(worker, method).remote(*args))

    def precompute(self, shares: Sequence[Share], on_texts: Callable[[int], None]) -> Iterator[Precomputed]:
        waiting, running = deque(shares), dict[Any, tuple[Any, Share]]()
        idle, done = deque(self._workers), 0
        while waiting or running:
            while waiting and idle:
                worker, share = idle.popleft(), waiting.popleft()
                running[worker.precompute.remote(share)] = (worker, share)
            [reference], _ = self._ray.wait(list(running))
            worker, share = running.pop(reference)
            answers = []
            with self._surviving(worker):
                answers.append(self._answer(reference))
                idle.append(worker)
                done += len(share)
            if not answers:
                waiting.append(share)  # last, in case it was the share that killed the worker
            yield from answers
            on_texts(done)

    def close(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for _, each in self._all("close"):
            counted += each
        self._workers = []
        return counted

    def _all(self, method: str) -> list[tuple[Any, Any]]:
        """Let all workers do something, at the same time; return those that live with their answers."""
        asked = [(worker, getattr(worker, method).remote()) for worker in self._workers]
        answers = []
        for worker, reference in asked:
            with self._surviving(worker):
                answers.append((worker, self._answer(reference)))
        return answers

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker itself raised

    @contextmanager
    def _surviving(self, worker: Any) -> Iterator[None]:
        """Leave out a worker that dies within; raises ChunkCacheError if it was the last."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            self._ray.kill(worker)  # perhaps it only cannot be reached
            self._workers.remove(worker)
            self.lost += 1
            logger.warning("a worker died (%s): its work goes to another", type(error).__name__)
            if not self._workers:
                raise ChunkCacheError(
                    f"all {self.size} workers died, the last of {type(error).__name__}: what they computed is stored "
                    "and the same command goes on from there; fewer workers need less memory"
                ) from error


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


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # its telemetry
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError("--ray needs Ray, which is not installed: pip install 'chunkcache[ray]'") from None


def _connect(ray: Any, address: str, cpus: int | None) -> None:
    local = {"include_dashboard": False, "num_cpus": cpus} if address == "local" else {}
    try:
        if ":" in address:  # Ray itself would wait for minutes for a host that does not answer
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address!r} ({error}); pass host:port of its head, or local"
        ) from None
