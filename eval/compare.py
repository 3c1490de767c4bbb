"""Policies side by side on the same prompts: time to first token and fidelity, against full prefill.

The clock runs from the texts in hand to the first token id on the host. Full prefill and every policy see each
prompt in turn, in an order that rotates from prompt to prompt, so that a drift of the machine hits all alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Policy, layer_kv, parse_policy
from chunkcache.eval.answers import f1, rouge_l
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import Fidelity, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.memory import PeakMemory
from chunkcache.llm import CachedLLM, Prefilled
from chunkcache.store import Store

ANSWER_TOKENS = 16  # length of the greedy answer that fidelity is measured over
SEED = 0  # decoding is greedy; the seed is for models that draw something even so
FULL = "full"
Scores = tuple[float | None, float | None]  # F1 and ROUGE-L
_OWN_STORE = "memory://?max_bytes=4GiB"


@dataclass(frozen=True)
class Row:
    """One prompt under one policy; seconds, and nats for KL. `full_*` is full prefill's on the same prompt.

    `f1` and `rouge_l` are of the greedy answer against the accepted ones, None if the case has none. `peak_ratio` is
    the peak memory of the request over the size of the prompt's own KV, None if unknown.
    """

    policy: str
    prompt: int
    chunks: int
    tokens: int
    ttft_s: float
    full_ttft_s: float
    ttft_ratio: float
    assemble_ratio: float
    recomputed_share: float
    kl_first: float
    kl_mean: float
    agreement: float
    f1: float | None
    full_f1: float | None
    rouge_l: float | None
    full_rouge_l: float | None
    peak_ratio: float | None


@dataclass(frozen=True)
class Summary:
    """What the rows of one policy come to: medians of times and memory, means of fidelity and answer quality."""

    policy: str
    ttft_s: float
    ttft_ratio: float
    ttft_ratio_p90: float
    assemble_ratio: float
    recomputed_share: float
    kl_first: float
    kl_mean: float
    agreement: float
    f1: float | None
    rouge_l: float | None
    peak_ratio: float | None


@dataclass
class Comparison:
    """The rows of a comparison, and what it ran on."""

    meta: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def summaries(self) -> list[Summary]:
        """Return one summary per policy, in the order they were asked for."""
        by_policy: dict[str, list[Row]] = {}
        for row in self.rows:
            by_policy.setdefault(row.policy, []).append(row)
        return [_summarise(policy, by_policy[policy]) for policy in self.meta["policies"] if policy in by_policy]

    def as_dict(self) -> dict[str, Any]:
        """Return meta data, summaries and rows as plain dicts for JSON."""
        return {
            "meta": {**self.meta, "prompts": len({row.prompt for row in self.rows})},
            "summary": [asdict(summary) for summary in self.summaries()],
            "rows": [asdict(row) for row in self.rows],
        }


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    policies: Sequence[str],
    store: str | Store = "memory://?max_bytes=8GiB",
    on_prompt: Callable[[int, int], None] | None = None,
    on_rows: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Run full prefill and `policies` over `cases`, warm: a prompt's chunks are precomputed before its clock starts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: the prompts.
        policies: policy strings; full prefill always runs and need not be named.
        store: the store for the chunk KV, or its URL; large enough for the chunks of one prompt.
        on_prompt: called with (prompts done, prompts in all).
        on_rows: called with all there is so far, after every prompt.

    Raises:
        PolicyError: a policy is unknown, or needs a calibration that there is none of.
        DocumentError: cases have answers, but the package that scores them is not installed.
    """
    torch.manual_seed(SEED)
    names = list(dict.fromkeys([FULL, *policies]))
    runners = _runners(model, tokenizer, names, store)
    if any(case.answers for case in cases):
        rouge_l("a", ["a"])
    _warm_up(runners, cases[0])
    comparison = Comparison(meta_data(model, names, cases))
    for index, case in enumerate(cases):
        for name, llm in runners.items():
            if _reuses_chunks(llm.chosen(name)):
                llm.precompute(case.chunks, policy=name)
        turn = index % len(names)
        results = {name: _measure(runners[name], name, case) for name in [*names[turn:], *names[:turn]]}
        answer, full = greedy_answer(runners[FULL], results[FULL].start, ANSWER_TOKENS)
        full_scores = _scores(runners[FULL], case, answer)
        for name in names:
            llm, result = runners[name], results[name]
            forced = full if name == FULL else forced_answer(llm, result.start, answer)
            fidelity = measure_fidelity(full, forced)
            scores = full_scores if fidelity.agreement == 1 else _own_scores(llm, case, name)
            comparison.rows.append(_row(index, case, name, result, results[FULL], fidelity, scores, full_scores))
        if on_rows is not None:
            on_rows(comparison)
        if on_prompt is not None:
            on_prompt(index + 1, len(cases))
    return comparison


def _own_scores(llm: CachedLLM, case: Case, policy: str) -> Scores:
    """Score what the policy itself answers; where each of its tokens is full prefill's, so is its answer."""
    if not case.answers:
        return None, None
    start = llm.prefill(case.question, case.chunks, policy=policy)
    return _scores(llm, case, greedy_answer(llm, start, ANSWER_TOKENS)[0])


def _scores(llm: CachedLLM, case: Case, answer: Sequence[int]) -> Scores:
    text = str(llm.tokenizer.decode(list(answer), skip_special_tokens=True))
    return (f1(text, case.answers), rouge_l(text, case.answers)) if case.answers else (None, None)


@dataclass(frozen=True)
class _Result:
    start: Prefilled
    ttft_s: float
    peak_ratio: float | None


def _reuses_chunks(policy: Policy) -> bool:
    return policy.reuses and not policy.remembers


def _runners(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], store: str | Store
) -> dict[str, CachedLLM]:
    """A policy that stores chunks in their context gets a store of its own: others would find exact hits there."""
    shared = chunkcache.wrap(model, tokenizer, store=store)
    own = {name for name in names if parse_policy(name).remembers or parse_policy(name).contextual}
    return {name: chunkcache.wrap(model, tokenizer, store=_OWN_STORE) if name in own else shared for name in names}


def _warm_up(runners: dict[str, CachedLLM], case: Case) -> None:
    """Let kernels and allocators settle on a short prompt that is not measured."""
    for name, llm in runners.items():
        llm.prefill("Is this only to warm up?", [chunk[:200] for chunk in case.chunks[:2]], policy=name)


def _measure(llm: CachedLLM, policy: str, case: Case) -> _Result:
    with PeakMemory(llm.model.device) as peak:
        started = time.perf_counter()
        prefilled = llm.prefill(case.question, case.chunks, policy=policy)
        int(prefilled.logits.argmax())  # the first token id, on the host
        ttft_s = time.perf_counter() - started
    return _Result(prefilled, ttft_s, None if peak.nbytes is None else peak.nbytes / kv_bytes(prefilled.cache))


def kv_bytes(cache: Cache) -> int:
    """Return the size of all keys and values in `cache`."""
    return sum(part.nbytes for index in range(len(cache.layers)) for part in layer_kv(cache, index))


def _row(
    index: int,
    case: Case,
    policy: str,
    result: _Result,
    full: _Result,
    fidelity: Fidelity,
    scores: Scores,
    full_scores: Scores,
) -> Row:
    stats = result.start.stats
    return Row(
        policy=policy,
        prompt=index,
        chunks=len(case.chunks),
        tokens=stats.tokens,
        ttft_s=result.ttft_s,
        full_ttft_s=full.ttft_s,
        ttft_ratio=result.ttft_s / full.ttft_s,
        assemble_ratio=stats.assemble_s / full.ttft_s,
        recomputed_share=stats.recomputed_share,
        f1=scores[0],
        full_f1=full_scores[0],
        rouge_l=scores[1],
        full_rouge_l=full_scores[1],
        peak_ratio=result.peak_ratio,
        **asdict(fidelity),
    )


def _summarise(policy: str, rows: Sequence[Row]) -> Summary:
    peaks = [row.peak_ratio for row in rows if row.peak_ratio is not None]
    ratios = [row.ttft_ratio for row in rows]
    return Summary(
        policy=policy,
        ttft_s=statistics.median(row.ttft_s for row in rows),
        ttft_ratio=statistics.median(ratios),
        ttft_ratio_p90=statistics.quantiles(ratios, n=10)[-1] if len(ratios) > 1 else ratios[0],
        assemble_ratio=statistics.median(row.assemble_ratio for row in rows),
        recomputed_share=statistics.mean(row.recomputed_share for row in rows),
        kl_first=statistics.mean(row.kl_first for row in rows),
        kl_mean=statistics.mean(row.kl_mean for row in rows),
        agreement=statistics.mean(row.agreement for row in rows),
        f1=_mean_of([row.f1 for row in rows]),
        rouge_l=_mean_of([row.rouge_l for row in rows]),
        peak_ratio=statistics.median(peaks) if peaks else None,
    )


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def meta_data(model: PreTrainedModel, policies: Sequence[str], cases: Sequence[Case]) -> dict[str, Any]:
    """Return what a measurement ran on, and with which settings."""
    device = model.device
    return {
        "policies": list(policies),
        "options": {policy: str(parse_policy(policy)) for policy in policies},
        "seed": SEED,
        "answer_tokens": ANSWER_TOKENS,
        "prompts": len(cases),
        "model": model.config._name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "chunkcache": chunkcache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
