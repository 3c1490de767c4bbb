"""A load test on the real model: what each request takes of the server, in the cache state that it really meets.

There are two ways to run, on the same requests:

    measure     every request runs at once when the one before it is done, under each policy with a store of its own;
                its times then feed `chunkcache.eval.queueing`, which finds the waiting at any rate
    real_run    every request comes at its time on the wall clock, whatever became of those before, and waits for
                the one worker. It proves the first way right, at one rate

A *group* is one byte budget with one set of tiers. In a group all policies take turns, request by request and in an
order that rotates, so that a drift of the machine hits all alike; groups run one after the other. What a store writes
behind a request is waited for outside of the clock, since the next request measured is another policy's.

A run that was interrupted goes on at its group: what a cache holds can only be found again by sending it the requests
that were measured already, which is done, unmeasured. Groups that are complete are left.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Policy, parse_policy
from chunkcache.errors import InputError
from chunkcache.eval.results import Results
from chunkcache.eval.workload import Request, Workload, at_rate
from chunkcache.kv import ChunkKey, ChunkKV, TokenIds
from chunkcache.llm import CachedLLM
from chunkcache.store import Budget, DiskStore, MemoryStore, Store, Tier, TieredStore
from chunkcache.store.base import Heads

BENCH = "load"
MEMORY, DISK = "memory", "memory+disk"
TIERS = (MEMORY, DISK)
MEASURED, REAL = "measured", "real"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Group:
    """A byte budget of the nearest tier, as a share of all chunks' bytes, and which tiers there are."""

    budget: float
    tiers: str


@dataclass(frozen=True)
class Sizes:
    """Bytes of KV: of each chunk of the workload, and of the system prompt's prefix."""

    chunks: tuple[int, ...]
    prefix: int

    def budget(self, share: float) -> int:
        """Return the byte budget that holds this share of the chunks, and the prefix.

        Raises:
            InputError: it does not hold the largest chunk.
        """
        if not 0 < share < float("inf"):
            raise InputError(f"a budget of {share} is not above 0; pass a share of all chunks' bytes, such as 0.5")
        nbytes = int(share * sum(self.chunks))
        if nbytes < max(self.chunks):
            raise InputError(
                f"a budget of {share} is {nbytes} bytes, and the largest chunk has {max(self.chunks)}: nothing would "
                f"be kept; pass at least {max(self.chunks) / sum(self.chunks):.3f}, or more documents"
            )
        return nbytes + self.prefix

    def fitting(self, share: float) -> int:
        """Return how many of the first chunks fit in the budget of this share."""
        room, fit = self.budget(share) - self.prefix, 0
        for nbytes in self.chunks:
            room -= nbytes
            if room < 0:
                break
            fit += 1
        return fit


class _Counts(Tier):
    """Counts which chunks of the request under way were found in a tier; prefixes and lead-ins are none."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wanted: frozenset[TokenIds] = frozenset()
        self.chunk_hits = 0

    def get(self, key: ChunkKey, token_ids: Sequence[int] | None, heads: Heads | None = None) -> ChunkKV | None:
        kv = super().get(key, token_ids, heads)
        self.chunk_hits += kv is not None and kv.token_ids in self.wanted
        return kv


class _Memory(_Counts, MemoryStore):
    pass


class _Disk(_Counts, DiskStore):
    pass


@dataclass(frozen=True)
class Server:
    """One policy with its store, of which `tiers` are the parts by their names."""

    llm: CachedLLM
    policy: Policy
    tiers: Mapping[str, _Counts]

    def answer(self, question: str, chunks: Sequence[str], tokens: int) -> tuple[dict[str, Any], float, float]:
        """Answer with exactly so many tokens; return the request's counts, its TTFT and its whole time in seconds."""
        started = time.perf_counter()
        found = self.llm.generate(
            question, chunks, policy=self.policy, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        whole_s = time.perf_counter() - started
        stats = found.stats
        counts = {"tokens": stats.tokens, "chunks": stats.chunks, "hits": stats.hits, "misses": stats.misses}
        return counts, found.ttft_s, whole_s

    def measure(self, question: str, chunks: Sequence[str], tokens: int) -> dict[str, Any]:
        """Answer; return what a row says of it."""
        wanted = frozenset(self.llm.prompts.chunk(text) for text in chunks)
        for tier in self.tiers.values():
            tier.wanted, tier.chunk_hits = wanted, 0
        counts, ttft_s, whole_s = self.answer(question, chunks, tokens)
        self.llm.store.flush()
        return {
            **counts,
            "tier_hits": {name: tier.chunk_hits for name, tier in self.tiers.items()},
            "service_s": whole_s,
            "ttft_service_s": ttft_s,
            "stored_bytes": {name: tier.stats().nbytes for name, tier in self.tiers.items()},
        }


class LoadBench:
    """A workload on a model.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        workload: the requests.
        policies: policy strings; `full` for the baseline must be among them if it is wanted.
        groups: budgets and tiers.
        warm: whether stores hold all chunks that fit, the most popular ones, before the first request.
        answer_tokens: length of every answer; the server is held for all of it.

    Attributes:
        about: what tells this model and these policies from others: its fingerprint, and the policies with nothing
            left open.

    Raises:
        PolicyError: a policy is unknown.
        InputError: a budget is not above 0 or holds no chunk, or the answers have no tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        workload: Workload,
        policies: Sequence[str],
        groups: Sequence[Group],
        warm: bool = False,
        answer_tokens: int = 1,
    ) -> None:
        if answer_tokens < 1:
            raise InputError(f"answers of {answer_tokens} tokens have no first token; pass at least 1")
        self._model, self._tokenizer = model, tokenizer
        self._workload = workload
        self._policies = {name: parse_policy(name) for name in policies}
        self._groups = list(groups)
        self._warm, self._answer_tokens = warm, answer_tokens
        probe = chunkcache.wrap(model, tokenizer, store=MemoryStore())
        options = {name: str(probe.resolve_policy(policy)) for name, policy in self._policies.items()}
        self.about = {"fingerprint": probe.fingerprint, "options": options}
        self._sizes = _sizes(probe, workload)
        for group in self._groups:
            self._sizes.budget(group.budget)
        for policy in self._policies.values():  # kernels and allocators settle
            probe.prefill("Is this only to warm up?", [workload.chunks[0][:200]], policy=policy)

    def measure(self, results: Results, on_step: Progress | None = None) -> None:
        """Serve all requests one after the other in each group; one row per request, policy and group."""
        turns = len(self._workload.requests) * len(self._policies)
        for index, group in enumerate(self._groups):
            complete = all(results.done(**self._about(name, group, -1)) for name in self._policies)
            for turn, _ in enumerate(() if complete else self._group(group, results), 1):
                if on_step is not None:
                    on_step(index * turns + turn, turns * len(self._groups))

    def real_run(self, name: str, group: Group, load: float, pattern: Sequence[float], results: Results) -> None:
        """Send all requests on the wall clock, to one policy in one group; one row for the whole run.

        Args:
            name: the policy.
            group: budget and tiers.
            load: rate, as a share of what this policy was measured to keep up with.
            pattern: arrival times at one request per second.
            results: with the measured rows; takes the row, and nothing is done if it is there.

        Raises:
            InputError: the requests were not measured in this group yet.
        """
        about = {"kind": REAL, "policy": name, "budget": group.budget, "tiers": group.tiers, "load": load}
        if results.done(**about):
            return
        measured = {**about, "kind": MEASURED}
        del measured["load"]
        services = [row["service_s"] for row in results.rows if measured.items() <= row.items()]
        if len(services) < len(self._workload.requests):
            raise InputError(f"{name} was measured for {len(services)} requests of {group} only; measure all first")
        rate = load * len(services) / sum(services)
        arrivals = at_rate(pattern, rate)
        with self._server(name, group) as server:
            served = _open_loop(arrivals, lambda number: self._answer(server, self._workload.requests[number]))
        columns = ("waiting_s", "ttft_service_s", "service_s")
        rows = {column: [each[index] for each in served] for index, column in enumerate(columns)}
        ttfts = [waiting + first for waiting, first, _ in served]
        results.add({**about, "rate": rate, "arrivals_s": arrivals, "ttft_s": ttfts, **rows})

    def _group(self, group: Group, results: Results) -> Iterator[None]:
        """Serve all requests in a group; yields after each."""
        with ExitStack() as opened:
            servers = {name: opened.enter_context(self._server(name, group)) for name in self._policies}
            names = list(servers)
            for number, request in enumerate(self._workload.requests):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    self._turn(servers[name], self._about(name, group, number), request, results)
                    yield

    def _turn(self, server: Server, about: dict[str, Any], request: Request, results: Results) -> None:
        if not results.done(**about):
            texts = self._workload.texts(request)
            results.add({**about, **server.measure(request.question, texts, self._answer_tokens)})
        elif server.policy.reuses:
            self._answer(server, request)
            server.llm.store.flush()

    def _answer(self, server: Server, request: Request) -> tuple[float, float]:
        return server.answer(request.question, self._workload.texts(request), self._answer_tokens)[1:]

    def _about(self, name: str, group: Group, number: int) -> dict[str, Any]:
        """Return what tells a row from others; of the last request for -1."""
        number %= len(self._workload.requests)
        return {"kind": MEASURED, "request": number, "policy": name, "budget": group.budget, "tiers": group.tiers}

    @contextmanager
    def _server(self, name: str, group: Group) -> Iterator[Server]:
        policy, max_bytes = self._policies[name], self._sizes.budget(group.budget)
        with tempfile.TemporaryDirectory(prefix="chunkcache-load-") as folder:
            tiers: dict[str, _Counts] = {"memory": _Memory(Budget(max_bytes))}
            if group.tiers == DISK:
                tiers["disk"] = _Disk(folder)
            store: Store = TieredStore(list(tiers.values())) if len(tiers) > 1 else tiers["memory"]
            with store:
                llm = chunkcache.wrap(self._model, self._tokenizer, store=store)
                if self._warm and policy.reuses:
                    everything = len(self._workload.chunks)
                    fit = everything if group.tiers == DISK else self._sizes.fitting(group.budget)
                    llm.precompute(self._workload.chunks[:fit][::-1], policy=policy)  # the most popular is used last
                yield Server(llm, llm.resolve_policy(policy), tiers)


def _sizes(llm: CachedLLM, workload: Workload) -> Sizes:
    """Return what the workload's KV come to, by what one of its chunks does."""
    shortest = min(workload.chunks, key=len)
    llm.precompute([shortest], policy="reuse")
    [key] = llm.keys([shortest], policy="reuse")
    [entry] = [entry for entry in llm.store.entries() if entry.key == key]
    per_token = entry.nbytes / entry.tokens
    tokens = [len(llm.prompts.chunk(text)) for text in workload.chunks]
    return Sizes(tuple(int(per_token * n) for n in tokens), int(per_token * len(llm.prompts.prefix(None))))


def _open_loop(
    arrivals: Sequence[float], answer: Callable[[int], tuple[float, float]]
) -> list[tuple[float, float, float]]:
    """Serve requests one by one in the order they come; each comes at its time, whatever became of those before.

    Returns:
        of each request the seconds that it waited, and what `answer` returned.
    """
    served = []
    started = time.perf_counter()
    for number, arrival in enumerate(arrivals):
        time.sleep(max(0.0, started + arrival - time.perf_counter()))
        waited = max(0.0, time.perf_counter() - started - arrival)
        served.append((waited, *answer(number)))
    return served
