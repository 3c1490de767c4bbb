"""What the order of chunks is worth: reuse, time and answers when chunks may leave their rank to repeat an order.

Another order is another prompt. So three things are told apart, each against full prefill of the retriever's order:
what full prefill of the new order answers (the price of reordering alone), what the policy answers over the new order
(both together), and how far the policy is from full prefill of the very prompt that it was given.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.engine.engine import PrefillOutput
from chunkcache.eval.answers import f1
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS, Fidelity, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.machine import SEED
from chunkcache.eval.measure import OnStep, averages, finite, table, time_prefill, warm_up
from chunkcache.eval.results import FULL, Results, Row
from chunkcache.llm import CachedLLM
from chunkcache.retriever.order import ServedOrders

BENCH = "order"
POLICIES = ("prefix", "cachecraft:alpha=0.3", "query")
TOLERANCES = (0, 1, 2, 4)
STORE = "memory://?max_bytes=2GiB"  # one for each policy and tolerance


def bench_order(
    results: Results,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Case],
    policies: Sequence[str] = POLICIES,
    tolerances: Sequence[int] = TOLERANCES,
    on_request: OnStep | None = None,
) -> Results:
    """Serve `requests` one after the other, under each policy and tolerance with a store of its own.

    Args:
        results: gets a row of each request, policy and tolerance: the share of its chunks that `moved`; `exact_share`
            of the tokens reused exactly, `recomputed_share` of the token-layers; `ttft_s`, arranging included, and
            `ttft_ratio` over full prefill of the retriever's order, timed beside it. The policy over the new order
            against that full prefill: `kl` of the first token in nats, `agreement` (share of its greedy answer's
            tokens that the policy would have chosen too), `f1` of the policy's own answer (None without accepted
            ones). `order_kl`, `order_agreement`, `order_f1`: the same for full prefill of the new order; `own_kl`:
            from that to the policy. Requests that are there already are served again, but not measured.
        model: the model.
        tokenizer: its tokenizer.
        requests: questions and their chunks in the retriever's order; see `similar`.
        policies: the policies.
        tolerances: places that a chunk may move; 0 is the retriever's order.
        on_request: called with (requests done, requests in all).

    Raises:
        PolicyError: a policy is unknown.
    """
    torch.manual_seed(SEED)
    full = chunkcache.wrap(model, tokenizer, policy=FULL)
    runs = [
        _Run(policy, tolerance, chunkcache.wrap(model, tokenizer, store=STORE, policy=policy))
        for policy in policies
        for tolerance in tolerances
    ]
    warm_up([run.llm for run in runs], requests[0])
    for number, case in enumerate(requests):
        turn = number % len(runs)
        order = [*runs[turn:], *runs[:turn]]
        if sum(row["request"] == number for row in results.rows) < len(runs):
            reference = _FullPrefills(full, case)
            for run in order:
                results.add({"request": number, **run.measure(case, reference)})
        else:
            for run in order:
                run.replay(case)
        if on_request is not None:
            on_request(number + 1, len(requests))
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return means for each policy and tolerance, of the times medians, and a table of them."""
    means = ("moved", "exact_share", "recomputed_share", "kl", "agreement", "f1",
             "order_kl", "order_agreement", "order_f1", "own_kl")  # fmt: skip
    of = dict.fromkeys(means, statistics.mean) | dict.fromkeys(("ttft_s", "ttft_ratio"), statistics.median)
    sums = averages(results.rows, ("policy", "tolerance"), "request", of)
    columns = {
        "policy": "{policy}", "tolerance": "{tolerance}", "moved": "{moved:.3f}", "exact": "{exact_share:.3f}",
        "recomputed": "{recomputed_share:.3f}", "TTFT ratio": "{ttft_ratio:.3f}", "KL": "{kl:.3f}",
        "own KL": "{own_kl:.3f}", "agreement": "{agreement:.3f}", "F1": "{f1:.3f}", "full: KL": "{order_kl:.3f}",
        "full: agreement": "{order_agreement:.3f}", "full: F1": "{order_f1:.3f}",
    }  # fmt: skip
    title = "requests in sequence (KL to full prefill of the retriever's order, in nats; full: that of the new order)"
    return {"orders": sums, "tables": [table(title, columns, sums)], "plots": []}


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
        self.ttft_s, start = time_prefill(llm, case)
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

    def replay(self, case: Case) -> None:
        """Serve a request for what `measure` leaves in the store."""
        served = self._serve(case)[2]
        if case.answers:
            self.llm.prefill(served.question, served.chunks)

    def measure(self, case: Case, reference: _FullPrefills) -> Row:
        """Serve a request, and return the fields of its row."""
        ttft_s, order, served, start = self._serve(case)
        stats, first, new = start.stats, reference.first, reference.of(served.chunks)
        forced = forced_answer(self.llm, start, first.tokens)
        own_answer = None
        if case.answers:  # where the policy remembers, now all of the prompt is stored
            start = self.llm.prefill(served.question, served.chunks)
            own_answer = _f1(self.llm, greedy_answer(self.llm, start, ANSWER_TOKENS)[0], case)
        return {
            "policy": self.policy,
            "tolerance": self.tolerance,
            "moved": statistics.mean(place != i for place, i in enumerate(order)) if order else 0.0,
            "exact_share": stats.exact_tokens / stats.tokens,
            "recomputed_share": stats.recomputed_share,
            "ttft_s": ttft_s,
            "ttft_ratio": ttft_s / reference.ttft_s,
            **_fidelity("", measure_fidelity(first.forced, forced)),
            "f1": own_answer,
            **_fidelity("order_", measure_fidelity(first.forced, new.forced)),
            "order_f1": new.f1,
            "own_kl": finite(measure_fidelity(new.forced, forced).kl_first),
        }

    def _serve(self, case: Case) -> tuple[float, list[int], Case, PrefillOutput]:
        """Return the time to first token, the order of the chunks, the request in that order, and its prefill."""
        policy = self.llm.resolve_policy(None)
        if policy.reuses and not policy.stores_in_context:
            self.llm.precompute(case.chunks)
        started = time.perf_counter()
        order = self._orders.arrange(case.chunks, self.tolerance)
        served = replace(case, chunks=tuple(case.chunks[i] for i in order))
        arranged_s = time.perf_counter() - started
        ttft_s, start = time_prefill(self.llm, served)
        self._orders.record(served.chunks)
        return arranged_s + ttft_s, order, served, start


def _fidelity(prefix: str, fidelity: Fidelity) -> Row:
    return {f"{prefix}kl": finite(fidelity.kl_first), f"{prefix}agreement": fidelity.agreement}


def _f1(llm: CachedLLM, tokens: Sequence[int], case: Case) -> float | None:
    if not case.answers:
        return None
    return f1(str(llm.tokenizer.decode(list(tokens), skip_special_tokens=True)), case.answers)


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
