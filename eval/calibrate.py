"""Finds what `query`, `query:guard=X` and `cachecraft:alpha=auto` need to know of a model."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import FusedCache, Policy, parse_policy
from chunkcache.blend.cachecraft import CacheCraft
from chunkcache.blend.guard import GuardModel, Signals, guard_steps
from chunkcache.blend.query import Query
from chunkcache.engine.calibration import Calibration
from chunkcache.engine.lead_check import LeadCheck, check_lead_in
from chunkcache.engine.look_check import LookCheck, check_look
from chunkcache.engine.packaged import packaged
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import PolicyError
from chunkcache.eval.contenders import PolicyContender, lead_for, parse_contender
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS, Fidelity, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.neighbours import ChunkPool
from chunkcache.llm import CachedLLM

ALPHAS = (0.1, 0.15, 0.2, 0.3, 0.45, 0.7)
BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2)  # that the guard is fitted to keep, KL in nats
BROKEN = 0.05  # share of prompts that may end above their bound
FOLDS = 5
PACKAGED = ("lead", "look")  # parts that are measured on packaged documents
PARTS = (*PACKAGED, "guard", "cachecraft")
_STORE = "memory://?max_bytes=4GiB"

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class _Full:
    """What full prefill answers to one case."""

    case: Case
    answer: list[int]
    log_probs: Tensor


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    target: str = "cacheblend:ratio=0.15",
    guarded: str = "query",
    parts: Collection[str] = PARTS,
    on_step: OnStep | None = None,
    pool: Sequence[str] | None = None,
) -> Calibration:
    """Measure `cases` and fit.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: prompts of the kind that will be asked; the lead-in and the look are measured on packaged ones.
        target: the policy whose KL Cache-Craft has to reach, on average over the cases.
        guarded: the query policy whose guard is fitted; `query@neighbours` for chunks that are computed behind their
            nearest of `pool`.
        parts: what to look for, of `PARTS`.
        on_step: called with (cases done, cases in all); without cases, with sets of packaged documents, and then with
            policies.
        pool: all chunks that there are, those of `cases` among them; by default these alone.

    Raises:
        PolicyError: `guarded` is no query policy, or a policy is unknown.
    """
    base, lead = parse_contender(guarded)
    if not isinstance(base, Query):
        raise PolicyError(f"only a query policy can be guarded, and {guarded!r} is none")
    llm = chunkcache.wrap(model, tokenizer, store=_STORE)
    lead_in, look = _packaged(llm, parts, None if cases else on_step)
    if base.lead is None:
        base = replace(base, lead=llm.engine.tuning.lead if lead_in is None else lead_in.lead)
    base = replace(base if look is None else base.fitted(look.look), guard=None)
    chunks = ChunkPool(pool or [chunk for case in cases for chunk in case.chunks])
    contender = PolicyContender(guarded, base, llm, False, ANSWER_TOKENS, lead_for(guarded, chunks.nearest))
    versions = chunkcache.wrap(model, tokenizer, store=_STORE, policy=CacheCraft())
    steps: list[list[tuple[Signals, float]]] = []
    wanted: list[Fidelity] = []
    reached: dict[float, list[tuple[Fidelity, float]]] = {alpha: [] for alpha in ALPHAS}
    for index, case in enumerate(cases):
        full = _full(llm, case)
        if "guard" in parts:
            steps.append(_rungs(contender, full))
        if "cachecraft" in parts:
            wanted.append(_measure(llm, full, parse_policy(target))[0])
            for alpha in ALPHAS:
                reached[alpha].append(_measure(versions, full, CacheCraft(alpha=alpha)))
        if on_step is not None:
            on_step(index + 1, len(cases))
    report: dict[str, Any] = {"prompts": len(cases)} if cases else {}
    report |= {"lead": asdict(lead_in)} if lead_in is not None else {}
    report |= {"look": asdict(look)} if look is not None else {}
    found: float | None = None
    guard: GuardModel | None = None
    if "cachecraft" in parts:
        found, report["cachecraft"] = _least_alpha(target, wanted, reached)
    if "guard" in parts:
        guard = GuardModel.fit(steps, BOUNDS, BROKEN)
        outcomes = [[[signals.moved, signals.entropy, kl] for signals, kl in pairs] for pairs in steps]
        report |= {
            "guarded": f"{base}@{lead}" if lead else str(base),
            "guard": _cross_validated(steps),
            "climbed": outcomes,
        }
    return Calibration(
        llm.fingerprint, found, guard, report, None if lead_in is None else lead_in.lead,
        None if look is None else look.look,
    )  # fmt: skip


def _packaged(
    llm: CachedLLM, parts: Collection[str], on_step: OnStep | None
) -> tuple[LeadCheck | None, LookCheck | None]:
    """Return what packaged documents say of the model: of the lead-in, and of how to look over chunks behind it."""
    decoder, wanted = llm.engine.decoder, [part for part in PACKAGED if part in parts]
    asked = packaged(decoder, llm.prompts, on_step) if wanted else []
    if not asked:
        return None, None
    lead_in = check_lead_in(decoder, asked) if "lead" in wanted else None
    lead = llm.engine.tuning.lead if lead_in is None else lead_in.lead
    return lead_in, check_look(decoder, asked, lead > 0, on_step) if "look" in wanted else None


def _full(llm: CachedLLM, case: Case) -> _Full:
    answer, log_probs = greedy_answer(llm, llm.prefill(case.question, case.chunks, policy="full"), ANSWER_TOKENS)
    return _Full(case, answer, log_probs)


def _measure(llm: CachedLLM, full: _Full, policy: Policy) -> tuple[Fidelity, float]:
    """Return the fidelity of one request, and the share of token-layers that it computed."""
    llm.precompute(full.case.chunks, policy=policy)
    start = llm.prefill(full.case.question, full.case.chunks, policy=policy)
    share = start.stats.recomputed_share
    return measure_fidelity(full.log_probs, forced_answer(llm, start, full.answer)), share


def _rungs(contender: PolicyContender, full: _Full) -> list[tuple[Signals, float]]:
    """Return the signals and the true KL of the first token at every step of a guarded prefill."""
    llm, policy = contender.llm, contender.policy
    contender.prepare(full.case, again=False)
    prompt = llm.prompts.build(full.case.question, full.case.chunks)
    plan = llm.engine.planner.plan(prompt, policy, RequestStats(str(policy)))
    decoder = llm.engine.decoder.shadow()
    cache = FusedCache(decoder.config, plan, decoder.rotaries)
    steps = guard_steps(decoder, plan, len(plan), cache, policy.escalation())
    first = full.log_probs[:1]
    return [(step.signals, measure_fidelity(first, step.log_probs[None]).kl_first) for step in steps]


def _least_alpha(
    target: str, wanted: Sequence[Fidelity], reached: dict[float, list[tuple[Fidelity, float]]]
) -> tuple[float, dict[str, Any]]:
    """Return the least alpha whose mean KL, of the first token and of the answer, are both within the target's."""
    first = statistics.mean(fidelity.kl_first for fidelity in wanted)
    mean = statistics.mean(fidelity.kl_mean for fidelity in wanted)
    tried = [
        {
            "alpha": alpha,
            "kl_first": statistics.mean(fidelity.kl_first for fidelity, _ in results),
            "kl_mean": statistics.mean(fidelity.kl_mean for fidelity, _ in results),
            "recomputed_share": statistics.mean(share for _, share in results),
        }
        for alpha, results in reached.items()
    ]
    good = [row for row in tried if row["kl_first"] <= first and row["kl_mean"] <= mean]
    best = min(good, key=lambda row: row["alpha"]) if good else max(tried, key=lambda row: row["alpha"])
    report = {"target": target, "target_kl_first": first, "target_kl_mean": mean, "met": bool(good), "tried": tried}
    return best["alpha"], report


def _cross_validated(prompts: Sequence[Sequence[tuple[Signals, float]]]) -> list[dict[str, Any]]:
    """Return, per bound, what the guard did on prompts that it was not fitted to."""
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    ended: dict[float, list[tuple[float, int]]] = {bound: [] for bound in BOUNDS}  # true KL, rung it ended at
    folds = [order[fold::FOLDS] for fold in range(min(FOLDS, len(order)))]
    for held_out in folds:
        fitted = GuardModel.fit([prompts[i] for i in order if i not in held_out], BOUNDS, BROKEN)
        for index in held_out:
            for bound in BOUNDS:
                steps = enumerate(prompts[index])
                accepted = ((kl, at) for at, (signals, kl) in steps if fitted.predict(at, signals, bound) <= bound)
                ended[bound].append(next(accepted, (0.0, len(prompts[index]))))
    return [
        {
            "bound": bound,
            "broken": statistics.mean(kl > bound for kl, _ in results),
            "full": statistics.mean(at == len(prompts[0]) for _, at in results),
            "passes": statistics.mean(min(at + 1, len(prompts[0])) for _, at in results),
            "kl_first": statistics.mean(kl for kl, _ in results),
        }
        for bound, results in ended.items()
    ]
