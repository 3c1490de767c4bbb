"""What the order of chunks is worth: reuse, time and answers when chunks may leave their rank to repeat an order.

Another order is another prompt. So three things are told apart, each against full prefill of the retriever's order:
what full prefill of the new order answers (the price of reordering alone), what the policy answers over the new order
(both together), and how far the policy is from full prefill of the very prompt that it was given.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.eval.answers import f1
from chunkcache.eval.compare import FULL
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.machine import SEED, meta_data
from chunkcache.llm import CachedLLM, PrefillOutput
from chunkcache.retriever.order import ServedOrders

POLICIES = ("prefix", "cachecraft:alpha=0.3", "query")
TOLERANCES = (0, 1, 2, 4)


@dataclass(frozen=True)
class Row:
    """One request under one policy and tolerance. KL in nats, of the first token.

    Attributes:
        policy: the policy.
        tolerance: places that a chunk could move.
        request: number of the request.
        moved: share of its chunks that did.
        exact_share: tokens reused exactly, of all.
        recomputed_share: token-layers computed, of all.
        ttft_s: time to first token, arranging included.
        ttft_ratio: over that of full prefill of the retriever's order, timed beside it.
        kl: full prefill of the retriever's order against the policy over the new order.
        agreement: share of the tokens of that full prefill's greedy answer that the policy would have chosen too.
        f1: of the policy's greedy answer against the accepted ones; None if there are none.
        order_kl, order_agreement, order_f1: the same for full prefill of the new order.
        own_kl: full prefill of the new order against the policy over it.
    """

    policy: str
    tolerance: int
    request: int
    moved: float
    exact_share: float
    recomputed_share: float
    ttft_s: float
    ttft_ratio: float
    kl: float
    agreement: float
    f1: float | None
    order_kl: float
    order_agreement: float
    order_f1: float | None
    own_kl: float


@dataclass
class OrderBench:
    """The rows of a run, and what it ran on."""

    meta: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def summaries(self) -> list[dict[str, Any]]:
        """Return means for each policy and tolerance, of the times medians."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.policy, row.tolerance), []).append(row)
        return [_summary(policy, tolerance, rows) for (policy, tolerance), rows in groups.items()]

    def as_dict(self) -> dict[str, Any]:
        """Return meta data, summaries and rows as plain dicts for JSON."""
        return {"meta": self.meta, "summary": self.summaries(), "rows": [asdict(row) for row in self.rows]}


def bench_order(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Case],
    policies: Sequence[str] = POLICIES,
    tolerances: Sequence[int] = TOLERANCES,
    store: str = "memory://?max_bytes=2GiB",
    on_request: Callable[[int, int], None] | None = None,
    on_rows: Callable[[OrderBench], None] | None = None,
) -> OrderBench:
    """Serve `requests` one after the other, under each policy and tolerance with a store of its own.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        requests: questions and their chunks in the retriever's order; see `similar`.
        policies: the policies.
        tolerances: places that a chunk may move; 0 is the retriever's order.
        store: URL of each store.
        on_request: called with (requests done, requests in all).
        on_rows: called with all there is so far, after every request.

    Raises:
        PolicyError: a policy is unknown.
    """
    torch.manual_seed(SEED)
    full = chunkcache.wrap(model, tokenizer, policy=FULL)
    runs = [
        _Run(policy, tolerance, chunkcache.wrap(model, tokenizer, store=store, policy=policy))
        for policy in policies
        for tolerance in tolerances
    ]
    for run in runs:  # kernels and allocators settle on a short prompt that is not measured
        run.llm.prefill("Is this only to warm up?", [chunk[:200] for chunk in requests[0].chunks[:2]])
    meta = meta_data(model, [FULL, *policies], requests)
    bench = OrderBench({**meta, "tolerances": list(tolerances), "store": store})
    for index, case in enumerate(requests):
        over = _FullPrefills(full, case)
        turn = index % len(runs)
        for run in [*runs[turn:], *runs[:turn]]:
            bench.rows.append(run.serve(index, case, over))
        if on_rows is not None:
            on_rows(bench)
        if on_request is not None:
            on_request(index + 1, len(requests))
    return bench


@dataclass(frozen=True)
class _Answered:
    """A greedy answer by full prefill: its tokens, the log-probabilities along the first order's answer, its F1."""

    tokens: list[int]
    forced: Tensor
    f1: float | None


class _FullPrefills:
    """Full prefill of one request, in whichever orders it is served."""

    def __init__(self, llm: CachedLLM, case: Case) -> None:
        self._llm, self._case = llm, case
        started = time.perf_counter()
        start = llm.prefill(case.question, case.chunks)
        int(start.logits.argmax())  # the first token id, on the host
        self.ttft_s = time.perf_counter() - started
        tokens, forced = greedy_answer(llm, start, ANSWER_TOKENS)
        self.first = _Answered(tokens, forced, _f1(llm, tokens, case))
        self._by_order = {case.chunks: self.first}

    def of(self, chunks: tuple[str, ...]) -> _Answered:
        """Return what full prefill of `chunks` in this order answers."""
        if chunks not in self._by_order:
            forced = forced_answer(self._llm, self._llm.prefill(self._case.question, chunks), self.first.tokens)
            start = self._llm.prefill(self._case.question, chunks)
            tokens, _ = greedy_answer(self._llm, start, ANSWER_TOKENS)
            self._by_order[chunks] = _Answered(tokens, forced, _f1(self._llm, tokens, self._case))
        return self._by_order[chunks]


class _Run:
    """One policy and tolerance, with what it has stored and served so far."""

    def __init__(self, policy: str, tolerance: int, llm: CachedLLM) -> None:
        self.policy, self.tolerance, self.llm = policy, tolerance, llm
        self._orders = ServedOrders()

    def serve(self, index: int, case: Case, over: _FullPrefills) -> Row:
        chosen = self.llm.resolve_policy(None)
        if chosen.reuses and not chosen.stores_in_context:
            self.llm.precompute(case.chunks)
        started = time.perf_counter()
        order = self._orders.arrange(case.chunks, self.tolerance)
        chunks = tuple(case.chunks[i] for i in order)
        start = self.llm.prefill(case.question, chunks)
        int(start.logits.argmax())  # the first token id, on the host
        ttft_s = time.perf_counter() - started
        self._orders.record(chunks)
        stats, first, new = start.stats, over.first, over.of(chunks)
        forced = forced_answer(self.llm, start, first.tokens)
        both, alone = measure_fidelity(first.forced, forced), measure_fidelity(first.forced, new.forced)
        return Row(
            policy=self.policy,
            tolerance=self.tolerance,
            request=index,
            moved=statistics.mean(place != i for place, i in enumerate(order)) if order else 0.0,
            exact_share=stats.exact_tokens / stats.tokens,
            recomputed_share=stats.recomputed_share,
            ttft_s=ttft_s,
            ttft_ratio=ttft_s / over.ttft_s,
            kl=both.kl_first,
            agreement=both.agreement,
            f1=self._own_f1(case, chunks),
            order_kl=alone.kl_first,
            order_agreement=alone.agreement,
            order_f1=new.f1,
            own_kl=measure_fidelity(new.forced, forced).kl_first,
        )

    def _own_f1(self, case: Case, chunks: tuple[str, ...]) -> float | None:
        """Score what the policy answers itself; where it remembers, now all of the prompt is stored."""
        if not case.answers:
            return None
        start: PrefillOutput = self.llm.prefill(case.question, chunks)
        return _f1(self.llm, greedy_answer(self.llm, start, ANSWER_TOKENS)[0], case)


def _f1(llm: CachedLLM, tokens: Sequence[int], case: Case) -> float | None:
    if not case.answers:
        return None
    return f1(str(llm.tokenizer.decode(list(tokens), skip_special_tokens=True)), case.answers)


def _summary(policy: str, tolerance: int, rows: Sequence[Row]) -> dict[str, Any]:
    found: dict[str, Any] = {"policy": policy, "tolerance": tolerance, "requests": len(rows)}
    for name in asdict(rows[0]):
        if name in ("policy", "tolerance", "request"):
            continue
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        mean = statistics.median if name.startswith("ttft") else statistics.mean
        found[name] = mean(values) if values else None
    return found


def similar(
    cases: Sequence[Case], visits: int = 3, noise: float = 1.0, swap: float = 0.2, seed: int = 0
) -> list[Case]:
    """Make the requests of several users with similar questions: each case comes `visits` times, among the others.

    Args:
        cases: questions and chunks, best ranked first.
        visits: how often each comes.
        noise: standard deviation, in ranks, of what a chunk's rank is off by each time.
        swap: chance that the last chunk is another case's instead.
        seed: of all that is drawn.
    """
    draw = random.Random(seed)
    requests = []
    for case in cases:
        for _ in range(visits):
            off = [index + draw.gauss(0, noise) for index in range(len(case.chunks))]
            chunks = [case.chunks[index] for index in sorted(range(len(off)), key=off.__getitem__)]
            if len(cases) > 1 and draw.random() < swap:
                other = draw.choice([each for each in cases if each is not case])
                chunks[-1] = draw.choice(other.chunks)
            requests.append(Case(case.question, tuple(chunks), case.answers))
    draw.shuffle(requests)
    return requests


def repeated_share(sequences: Iterable[Sequence[Hashable]], tolerance: int) -> float:
    """Return the share of chunks that begin a request just as they began an earlier one, without any model.

    Args:
        sequences: names of the chunks of each request, in the retriever's order.
        tolerance: places that a chunk may move.
    """
    orders = ServedOrders(limit=100_000)
    served: set[tuple[Hashable, ...]] = set()
    repeated = total = 0
    for names in sequences:
        new = [names[i] for i in orders.arrange(names, tolerance)]
        orders.record(new)
        beginnings = [tuple(new[: i + 1]) for i in range(len(new))]
        repeated += sum(beginning in served for beginning in beginnings)
        total += len(new)
        served.update(beginnings)
    return repeated / total if total else 0.0
