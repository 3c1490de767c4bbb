"""What the rows of `eval.compare` come to: speed, fidelity and answers, each with how far it may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from chunkcache.errors import missing_extra
from chunkcache.eval.intervals import Interval, interval, paired, ratio_of_means
from chunkcache.eval.results import FULL, PEER, Results

Row = dict[str, Any]
SCORES = ("f1", "em", "rouge_l", "holds_gold")
ROUNDING = 1e-4  # nats; a divergence below is none
WORST = 3  # prompts of each policy that are listed


def summary(results: Results, against: str = FULL) -> dict[str, Any]:
    """Return what the rows of one file come to, as plain JSON values; every interval is `[value, low, high]`.

    Times are medians over prompts, of the medians of their rounds; fidelity and scores are means. `ttft_ratio` is the
    median of the ratios to full prefill of the same prompt, and `*_diff` are paired differences to it.

    `against` is another policy of the results that each is compared with: `against` has its name, and of each policy
    the median of the ratios of the times to first token, prompt by prompt, and the ratios of the mean divergences.
    """
    rows = _whole(results.rows)
    names = [*results.settings["policies"], *(PEER + name for name in results.settings["peers"])]
    by_policy = {name: [row for row in rows if row["policy"] == name] for name in names}
    full = _by_prompt(by_policy[FULL])
    return {
        "prompts": len(full),
        "tokens": _range(row["tokens"] for row in rows),
        "policies": {name: _policy(found, full) for name, found in by_policy.items() if found},
        "data": _data(full),
        "against": _against(by_policy, against) if against != FULL and by_policy.get(against) else None,
        "worst": _worst(by_policy, full),
        "peers": _peers(results),
        "growth": _growth(by_policy) if results.settings.get("tokens") else {},
    }


def fit_exponent(points: Sequence[tuple[float, float]]) -> Interval:
    """Return b of the power law `seconds = a tokens^b` through (tokens, seconds), by least squares of logarithms.

    The interval is the 95 % one of that regression; with two points or fewer lengths it is only the value.
    """
    x, y = np.log(np.array(points, dtype=float)).T
    if len(np.unique(x)) < 2:
        raise ValueError("an exponent needs two lengths or more")
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    freedom = len(x) - 2
    if freedom < 1:
        return Interval(slope, slope, slope)
    try:
        from scipy.stats import t
    except ImportError as error:
        raise missing_extra("eval", "a confidence interval", error) from None

    left = y - y.mean() - slope * centred
    half = float(t.ppf(0.975, freedom)) * math.sqrt(float((left**2).sum()) / freedom / float((centred**2).sum()))
    return Interval(slope, slope - half, slope + half)


def _peers(results: Results) -> dict[str, Any]:
    """Return of each peer its versions and settings, and why it failed, if it did."""
    errors = {row["policy"]: row["error"] for row in results.rows if row.get("error")}
    return {name: {**told, "error": errors.get(PEER + name)} for name, told in results.settings["peers"].items()}


def _whole(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that count: of prompts that full prefill has run on, each row once, and no failures."""
    latest = {(row["prompt"], row["round"], row["policy"]): row for row in rows if row["ttft_s"] is not None}
    there = {prompt for prompt, _, policy in latest if policy == FULL}
    return [row for row in latest.values() if row["prompt"] in there]


def _by_prompt(rows: Iterable[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["prompt"], []).append(row)
    return found


def _ttft(rows: Iterable[Row]) -> float:
    return float(statistics.median(row["ttft_s"] for row in rows))


def _policy(rows: Sequence[Row], full: dict[int, list[Row]]) -> dict[str, Any]:
    prompts = _by_prompt(rows)
    times = [_ttft(rounds) for rounds in prompts.values()]
    ratios = [_ttft(rounds) / _ttft(full[prompt]) for prompt, rounds in prompts.items()]
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "ttft_s": interval(times),
        "ttft_ratio": interval(ratios),
        "ttft_p90": _p90(times),
        "ttft_ratio_p90": _p90(ratios),
        "stages": _stages(rows),
        "recomputed_share": _mean(rows, "recomputed_share"),
        "later_s": _median(rows, "later_s"),
        "peak_ratio": _median(rows, "peak_ratio"),
        "fallbacks": sum(row["fallbacks"] or 0 for row in rows),
    }
    for name in ("kl_first", "kl_mean", "agreement", "same_answer", *SCORES):
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        found[name] = interval(values, "mean") if values else None
    for name in SCORES:
        scored = [row for row in rows if row.get(name) is not None]
        theirs = [full[row["prompt"]][0][name] for row in scored]
        found[f"{name}_diff"] = paired([row[name] for row in scored], theirs) if scored else None
    return found


def _data(full: dict[int, list[Row]]) -> dict[str, Any]:
    """Return what there is to know of the prompts themselves before policies are compared on them.

    `answered` prompts have accepted answers; of these, `full_zero` is the share that full prefill scores 0 in F1 on,
    and `gold_in_chunks` the share whose chunks hold an accepted answer. `repeated_chunks` is the share of all chunks
    that stand in another chunk of their prompt.
    """
    rows = [rounds[0] for rounds in full.values()]
    scores = [row["f1"] for row in rows if row["f1"] is not None]
    gold = [row["gold_in_chunks"] for row in rows if row.get("gold_in_chunks") is not None]
    known = [row for row in rows if row.get("repeated_chunks") is not None]
    chunks = sum(row["chunks"] for row in known)
    return {
        "answered": max(len(scores), len(gold)),
        "full_zero": statistics.mean(float(score == 0) for score in scores) if scores else None,
        "gold_in_chunks": statistics.mean(map(float, gold)) if gold else None,
        "repeated_chunks": sum(row["repeated_chunks"] * row["chunks"] for row in known) / chunks if chunks else None,
    }


def _against(by_policy: dict[str, list[Row]], name: str) -> dict[str, Any]:
    """Return how each policy stands to the one called `name` on the prompts that both have run on.

    A divergence of rounding errors is nothing to compare with: the ratios to it are None.
    """
    theirs = _by_prompt(by_policy[name])
    found = {}
    for policy, rows in by_policy.items():
        both = {prompt: rounds for prompt, rounds in _by_prompt(rows).items() if prompt in theirs}
        if policy == name or not both:
            continue
        ratios = [_ttft(rounds) / _ttft(theirs[prompt]) for prompt, rounds in both.items()]
        found[policy] = {"prompts": len(both), "ttft_ratio": interval(ratios)}
        for kl in ("kl_first", "kl_mean"):
            pairs = [(rounds[0][kl], theirs[prompt][0][kl]) for prompt, rounds in both.items()]
            known = [pair for pair in pairs if None not in pair]
            ours, others = [pair[0] for pair in known], [pair[1] for pair in known]
            comparable = bool(known) and statistics.mean(others) > ROUNDING
            found[policy][f"{kl}_ratio"] = ratio_of_means(ours, others) if comparable else None
    return {"policy": name, "policies": found}


def _stages(rows: Sequence[Row]) -> dict[str, float] | None:
    """Return the mean seconds of each stage."""
    known = [row["stages"] for row in rows if row["stages"] is not None]
    return {name: statistics.mean(each[name] for each in known) for name in known[0]} if known else None


def _worst(by_policy: dict[str, list[Row]], full: dict[int, list[Row]]) -> list[Row]:
    """Return of each policy the prompts on which it is furthest from full prefill, the furthest first."""
    worst = []
    for name in by_policy:
        if name != FULL and not name.startswith(PEER):
            judged = [row for row in by_policy[name] if (row["kl_first"] or 0) > ROUNDING]
            worst += sorted(judged, key=lambda row: -row["kl_first"])[:WORST]
    found = []
    for row in worst:
        theirs = full[row["prompt"]][0]
        names = ("prompt", "policy", "kl_first", "kl_mean", "question", "answer", "f1")
        found.append({name: row[name] for name in names} | {"full_answer": theirs["answer"], "full_f1": theirs["f1"]})
    return found


def _growth(by_policy: dict[str, list[Row]]) -> dict[str, Any]:
    """Return how the time to first token grows with the prompt: the exponent of each policy, and its points."""
    found = {}
    for name, rows in by_policy.items():
        points = sorted((rounds[0]["tokens"], _ttft(rounds)) for rounds in _by_prompt(rows).values())
        if len({tokens for tokens, _ in points}) > 1:
            found[name] = {"exponent": fit_exponent(points), "points": points}
    return found


def _range(values: Iterable[int]) -> list[int]:
    known = list(values)
    return [min(known), max(known)]


def _p90(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.9))


def _mean(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return statistics.mean(known) if known else None


def _median(rows: Sequence[Row], name: str) -> float | None:
    known = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(known) if known else None
