"""Policies side by side on the same prompts: time to first token and fidelity, against full prefill.

The clock runs from the texts in hand to the first token id on the host. Full prefill and every policy see each
prompt in turn, in an order that rotates from prompt to prompt, so that a drift of the machine hits all alike.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Policy, layer_kv, parse_policy
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.memory import PeakMemory
from chunkcache.llm import CachedLLM, Prefilled
from chunkcache.store import Store

ANSWER_TOKENS = 16  # length of the greedy answer that fidelity is measured over
FULL = "full"
_OWN_STORE = "memory://?max_bytes=4GiB"


@dataclass(frozen=True)
class Row:
    """One prompt under one policy; seconds, and nats for KL. `full_*` is full prefill's on the same prompt.

    `peak_ratio` is the peak memory of the request over the size of the prompt's own KV, None if unknown.
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
    peak_ratio: float | None


@dataclass(frozen=True)
class Summary:
    """What the rows of one policy come to: medians of times and memory, means of fidelity."""

    policy: str
    ttft_s: float
    ttft_ratio: float
    ttft_ratio_p90: float
    assemble_ratio: float
    recomputed_share: float
    kl_first: float
    kl_mean: float
    agreement: float
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
            "meta": self.meta,
            "summary": [asdict(summary) for summary in self.summaries()],
            "rows": [asdict(row) for row in self.rows],
        }


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    policies: Sequence[str],
    store: str | Store = "memory://?max_bytes=8GiB",
    on_precompute: Callable[[int, int], None] | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run full prefill and `policies` over `cases`, warm: every chunk is precomputed before the clock starts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: the prompts.
        policies: policy strings; full prefill always runs and need not be named.
        store: the store for the chunk KV, or its URL; large enough for all chunks.
        on_precompute: called with (chunks done, chunks in all).
        on_prompt: called with (prompts done, prompts in all).
    """
    names = list(dict.fromkeys([FULL, *(str(parse_policy(policy)) for policy in policies)]))
    runners = _runners(model, tokenizer, names, store)
    reusing = {id(llm): llm for name, llm in runners.items() if _reuses_chunks(parse_policy(name))}
    texts = list(dict.fromkeys(chunk for case in cases for chunk in case.chunks))
    for llm in reusing.values():
        llm.precompute(texts, on_progress=on_precompute)
    _warm_up(runners, cases[0])
    comparison = Comparison(_meta(model, names, cases))
    for index, case in enumerate(cases):
        turn = index % len(names)
        results = {name: _measure(runners[name], name, case) for name in [*names[turn:], *names[:turn]]}
        answer, full = greedy_answer(runners[FULL], results[FULL].start, ANSWER_TOKENS)
        for name in names:
            result = results[name]
            forced = full if name == FULL else forced_answer(runners[name], result.start, answer)
            comparison.rows.append(_row(index, case, name, result, results[FULL], measure_fidelity(full, forced)))
        if on_prompt is not None:
            on_prompt(index + 1, len(cases))
    return comparison


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
    return {
        name: chunkcache.wrap(model, tokenizer, store=_OWN_STORE) if parse_policy(name).remembers else shared
        for name in names
    }


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
    cache = prefilled.cache
    kv_bytes = sum(part.nbytes for index in range(len(cache.layers)) for part in layer_kv(cache, index))
    return _Result(prefilled, ttft_s, None if peak.nbytes is None else peak.nbytes / kv_bytes)


def _row(index: int, case: Case, policy: str, result: _Result, full: _Result, fidelity: Any) -> Row:
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
        peak_ratio=statistics.median(peaks) if peaks else None,
    )


def _meta(model: PreTrainedModel, policies: Sequence[str], cases: Sequence[Case]) -> dict[str, Any]:
    device = model.device
    return {
        "policies": list(policies),
        "prompts": len(cases),
        "model": model.config._name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "chunkcache": chunkcache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
