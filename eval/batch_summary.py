"""What the rows of `eval.batch` come to: throughput, memory, loads and answers of each way.

A gain is the median over the rounds of how many times as fast a way is as another of the same round, whose passes ran
next to one another. It has an interval where there are `intervals.LEAST` rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from chunkcache.eval.intervals import LEAST, interval
from chunkcache.eval.measure import lines, table
from chunkcache.eval.results import FULL, Results

ONE_BY_ONE, BATCHED, GROUPED = "one by one", "plain batches", "grouped"
WAYS = (ONE_BY_ONE, BATCHED, GROUPED)  # plain batches are under full prefill only


def summary(results: Results) -> dict[str, Any]:
    """Return throughput, memory, loads and answers of every policy and way, with tables and plots of them."""
    passes = [row for row in results.rows if row["kind"] == "pass"]
    policies = {
        policy: {way: _summarise(rows) for way in WAYS if (rows := _of(passes, policy, way))}
        for policy in results.settings["policies"]
    }
    for policy, ways in policies.items():
        for name, found in ways.items():
            alone, rows = _of(passes, policy, ONE_BY_ONE), _of(passes, policy, name)
            found["gain"] = _gain(alone, rows)
            found["gain_over_batches"] = _gain(_of(passes, FULL, BATCHED), rows)
            found["equal"] = _equal(alone, rows) if alone else None
    attention = [row for row in results.rows if row["kind"] == "attention"]
    return {
        "requests": results.settings["requests"],
        "policies": policies,
        "attention": attention,
        "tables": [_passes_table(policies), *([_attention_table(attention)] if attention else [])],
        "plots": _plots(policies, attention),
    }


def _of(rows: Sequence[dict[str, Any]], policy: str, way: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["policy"] == policy and row["way"] == way]


def _gain(slow: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[float] | None:
    """Return how many times as fast `rows` are: the median, and its interval where there are enough rounds."""
    by_round = {row["round"]: row["seconds"] for row in slow}
    ratios = [by_round[row["round"]] / row["seconds"] for row in rows if row["round"] in by_round]
    if not ratios:
        return None
    return list(interval(ratios)) if len(ratios) >= LEAST else [statistics.median(ratios)]


def _summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = statistics.median(row["seconds"] for row in rows)
    answers = rows[0]["answers"]  # other rounds ask the same again
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    scores = [answer["f1"] for answer in answers if answer["f1"] is not None]
    return {
        "seconds": seconds,
        "requests_per_s": len(rows[0]["answers"]) / seconds,
        "prompt_tokens_per_s": rows[0]["prompt_tokens"] / seconds,
        "new_tokens_per_s": rows[0]["new_tokens"] / seconds,
        "kv_bytes": max(row["kv_bytes"] for row in rows),
        "peak_bytes": max(peaks) if peaks else None,
        "loads": rows[0]["loads"],
        "recomputed_share": statistics.mean(answer["recomputed_share"] for answer in answers),
        "kl_first": list(interval([answer["kl_first"] for answer in answers], "mean")),
        "f1": list(interval(scores, "mean")) if scores else None,
    }


def _equal(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """Return the share of requests whose answers are the same token ids."""
    ids = [[answer["token_ids"] for answer in rows[0]["answers"]] for rows in (one, other)]
    return statistics.mean(float(a == b) for a, b in zip(*ids, strict=True))


def _passes_table(policies: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    columns = {
        "policy": "{policy}", "way": "{way}", "requests/s": "{requests_per_s:.3f}", "gain": "{gain_text}",
        "over plain": "{over_plain}", "new tokens/s": "{new_tokens_per_s:.1f}",
        "prompt tokens/s": "{prompt_tokens_per_s:.0f}", "KV MiB, computed": "{kv_mib:.0f}",
        "peak MiB, with store": "{peak_mib:.0f}", "loads": "{all_loads}", "computed": "{recomputed_share:.1%}",
        "KL first": "{kl_first[0]:.4f}", "F1": "{f1[0]:.3f}", "equal": "{equal:.2f}",
    }  # fmt: skip
    rows = [
        {
            **found, "policy": policy, "way": way, "gain_text": _times(found["gain"]),
            "over_plain": _times(found["gain_over_batches"]), "all_loads": sum(found["loads"].values()),
            "kv_mib": found["kv_bytes"] / 2**20, "peak_mib": found["peak_bytes"] and found["peak_bytes"] / 2**20,
        }
        for policy, ways in policies.items()
        for way, found in ways.items()
    ]  # fmt: skip
    title = "offline batches (gain over one by one, and over plain batches; equal: answers as one by one)"
    return table(title, columns, rows)


def _times(gain: list[float] | None) -> str:
    if gain is None:
        return "n/a"
    return f"{gain[0]:.2f}" + (f" [{gain[1]:.2f}, {gain[2]:.2f}]" if len(gain) > 1 else "")


def _attention_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    title = "attention of a decoding step, per layer: KV shared once against a copy for each sequence"
    columns = {
        "sequences": "{sequences}", "shared tokens": "{tokens}", "shared ms": "{shared_ms:.3f}",
        "copies ms": "{copies_ms:.3f}", "ratio": "{ratio:.2f}",
    }  # fmt: skip
    return table(title, columns, [
        {**row, "shared_ms": row["shared_s"] * 1e3, "copies_ms": row["repeated_s"] * 1e3,
         "ratio": row["shared_s"] / row["repeated_s"]} for row in rows
    ])  # fmt: skip


def _plots(
    policies: dict[str, dict[str, dict[str, Any]]], attention: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    whole = {policy: ways for policy, ways in policies.items() if ONE_BY_ONE in ways and GROUPED in ways}
    rates = {policy: {way: found["requests_per_s"] for way, found in ways.items()} for policy, ways in whole.items()}
    plain = rates.get(FULL, {}).get(BATCHED)
    plots: list[dict[str, Any]] = []
    if whole:
        caption = (
            "Questions over recurring chunks: in the order they come; in plain left-padded batches, which prefill "
            "every prompt in full whatever the policy; and grouped by what they share."
        )
        shown = [way for way in WAYS if way != BATCHED or plain is not None]
        bars = [{"name": way, "values": [by_way.get(way, plain) for by_way in rates.values()]} for way in shown]
        plots.append(
            {"kind": "bars", "title": "Offline batches", "y": "requests per second", "caption": caption,
             "groups": list(whole), "series": bars}
        )  # fmt: skip
    if attention:
        gains = [(row["sequences"], row["tokens"], row["repeated_s"] / row["shared_s"]) for row in attention]
        series = [
            {
                "name": f"{count} sequences", "policy": None, "simulated": False,
                "points": [[tokens, gain] for sequences, tokens, gain in gains if sequences == count],
            }
            for count in sorted({sequences for sequences, *_ in gains})
        ]  # fmt: skip
        caption = "Attention of one decoding step over one copy of the shared KV, against SDPA over copies."
        title, y = "Shared-prefix attention", "times as fast as copies"
        plots.append(lines(title, "shared tokens", y, caption, series, "x"))
    return plots
