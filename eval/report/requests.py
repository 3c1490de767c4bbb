"""The tables and plots of a `requests` section: speed, fidelity and answers of policies and peers."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from chunkcache.eval.fidelity import ANSWER_TOKENS
from chunkcache.eval.report.parts import Cell, Plot, Series, Table, number
from chunkcache.eval.results import FULL, PEER

Section = dict[str, Any]
EXACT = 1e-4  # nats; what is not above it is drawn at the edge of the Pareto plot
LONGEST = 300  # characters of a question or an answer
QUALITY = {"f1": "F1", "em": "exact match", "rouge_l": "ROUGE-L", "holds_gold": "holds gold"}


def tables(section: Section) -> list[Table]:
    """Return the tables of a section; those of which nothing is known are absent."""
    summary = section["summary"]
    made = [growth_table(section)] if summary.get("growth") else [_speed(section)]
    policies = summary["policies"].values()
    if any(each["agreement"] is not None or each["kl_first"] is not None for each in policies):
        made.append(_fidelity(summary))
    if scores := [score for score in QUALITY if any(each.get(score) is not None for each in policies)]:
        made.append(_quality(section, scores))
    if summary.get("against"):
        made.append(_against(summary["against"]))
    if summary.get("data", {}).get("repeated_chunks") is not None:
        made.append(prompts_table("Prompts", [section]))
    if summary.get("worst"):
        made.append(_worst(summary))
    if summary.get("peers"):
        made.append(_peers(summary))
    return made


def plots(section: Section) -> list[Plot]:
    """Return the plots of a section; those of which nothing is known are absent."""
    summary = section["summary"]
    if summary.get("growth"):
        made = [_growth_plot(summary), _pareto(summary), _scatter(section)]
    else:
        made = [_pareto(summary), _breakdown(summary), _scatter(section)]
    return [plot for plot in made if plot is not None]


def by_policy(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what is known of each policy, peers last."""
    return dict(sorted(summary["policies"].items(), key=lambda item: item[0].startswith(PEER)))


def any_later(summary: dict[str, Any]) -> bool:
    """Return whether a policy recomputes something once the first token is out."""
    return any(each.get("later_s") for each in summary["policies"].values())


def name_of(policy: str) -> str:
    """Return how a policy is called in a report."""
    return f"{policy.removeprefix(PEER)} (peer)" if policy.startswith(PEER) else policy


def token_range(summary: dict[str, Any]) -> str:
    """Return how long the prompts are, such as `2,870 to 3,278 tokens`."""
    low, high = summary["tokens"]
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"


def growth_table(section: Section) -> Table:
    """Return the times to first token by context length, and the exponents fitted to them."""
    lengths = sorted(section["settings"]["tokens"])
    rows = []
    for policy, each in section["summary"]["growth"].items():
        at: dict[int, list[float]] = {length: [] for length in lengths}
        for tokens, seconds in each["points"]:
            at[min(lengths, key=lambda length: abs(length - tokens))].append(seconds)
        medians = [number(statistics.median(found) if found else None) for found in at.values()]
        rows.append([Cell(name_of(policy)), number(each["exponent"], 2), *medians])
    note = (
        "Exponent: the slope of the logarithm of TTFT over the logarithm of the length; 1 is linear. "
        "The other columns: median TTFT in seconds at about so many tokens."
    )
    columns = ["policy", "exponent", *(f"{length:,}" for length in lengths)]
    return Table("Time to first token by context length", columns, rows, note)


def prompts_table(title: str, sections: Sequence[Section]) -> Table:
    """Return what there is to know of the prompts of each section before policies are compared on them."""
    rows = []
    for section in sections:
        summary = section["summary"]
        data = summary["data"]
        shares = (data["full_zero"], data["gold_in_chunks"], data["repeated_chunks"])
        rows.append(
            [
                Cell(section["name"]),
                number(summary["prompts"], 0),
                number(data["answered"], 0),
                *(number(share, 1, percent=True) for share in shares),
            ]
        )
    note = (
        "Full's F1 is 0: share of the prompts with accepted answers on which full prefill itself scores 0, so no "
        "policy can lose anything there. Gold in chunks: share of them where an accepted answer stands in a chunk. "
        "Repeated chunks: share of all chunks that stand by 90% of their words in another chunk of their prompt."
    )
    columns = ["data set", "prompts", "with answers", "full's F1 is 0", "gold in chunks", "repeated chunks"]
    return Table(title, columns, rows, note)


def _speed(section: Section) -> Table:
    summary = section["summary"]
    later = any_later(summary)
    rows = [
        [
            Cell(name_of(policy)),
            number(each["prompts"], 0),
            number(each["ttft_s"]),
            number(each["ttft_ratio"]),
            number(each["ttft_p90"]),
            number(each["recomputed_share"], 1, percent=True),
            *([number(each["later_s"])] if later else []),
            number(each["peak_ratio"], 2),
        ]
        for policy, each in by_policy(summary).items()
    ]
    note = (
        "TTFT: time to first token, median, from the texts in hand to the first token id. Of full: median over the "
        "prompts of the ratio to full prefill's on the same prompt. Recomputed: mean share of all tokens in all "
        "layers. Memory: what the request adds to the process over the size of the prompt's own KV. A peer's clock "
        "starts with the token ids in hand."
    )
    if later:
        note += " Then: what is recomputed once the first token is out, before the second; median."
    columns = ["policy", "prompts", "TTFT, s", "of full", "p90, s", "recomputed", *(["then, s"] if later else [])]
    return Table("Time to first token", [*columns, "memory / KV"], rows, note)


def _fidelity(summary: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(name_of(policy)),
            number(each["kl_first"], 4),
            number(each["kl_mean"], 4),
            number(each["agreement"], 1, percent=True),
            number(each["same_answer"], 1, percent=True),
        ]
        for policy, each in by_policy(summary).items()
    ]
    note = (
        "KL: KL(full || policy) in nats, of the first token and averaged over full prefill's greedy answer. "
        "Agreement: share of that answer's tokens that the policy would have chosen too. Same answer: share of the "
        "prompts on which its own greedy answer is full prefill's, token by token. Means."
    )
    columns = ["policy", "KL first", "KL mean", "agreement", "same answer"]
    return Table("Fidelity to full prefill", columns, rows, note)


def _quality(section: Section, scores: Sequence[str]) -> Table:
    rows = [
        [Cell(name_of(policy)), *(number(each[name]) for score in scores for name in (score, f"{score}_diff"))]
        for policy, each in by_policy(section["summary"]).items()
    ]
    columns = ["policy", *(column for score in scores for column in (QUALITY[score], f"{QUALITY[score]} − full"))]
    tokens = section["settings"].get("answer_tokens", ANSWER_TOKENS)
    note = (
        f"Greedy answers of at most {tokens} tokens against the accepted ones, means. “− full”: the difference"
        " to full prefill's score, paired by prompt; where its interval holds 0, the two cannot be told apart."
    )
    if "holds_gold" in scores:
        note += " Holds gold: an accepted answer's words stand in the answer, one behind the other."
    return Table("Answers", columns, rows, note)


def _against(told: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(name_of(policy)),
            number(each["prompts"], 0),
            *(number(each[name]) for name in ("ttft_ratio", "kl_first_ratio", "kl_mean_ratio")),
        ]
        for policy, each in told["policies"].items()
    ]
    note = (
        "TTFT: median over the prompts of the ratio on the same prompt. KL: ratio of the means over the same "
        f"prompts, with the interval of drawing prompts. Below 1 is better than {told['policy']}."
    )
    columns = ["policy", "prompts", "TTFT ratio", "KL first ratio", "KL mean ratio"]
    return Table(f"Against {told['policy']}", columns, rows, note)


def _worst(summary: dict[str, Any]) -> Table:
    worst = summary["worst"]
    texts = {"question": "question", "answer": "answer", "full_answer": "full prefill's answer"}
    texts = {key: column for key, column in texts.items() if any(key in row for row in worst)}
    rows = [
        [
            Cell(name_of(row["policy"])),
            Cell(str(row["prompt"]), row["prompt"]),
            number(row["kl_first"]),
            number(row["kl_mean"]),
            number(row["f1"], 2),
            number(row["full_f1"], 2),
            *(Cell(_ending(row.get(key) or "")) for key in texts),
        ]
        for row in worst
    ]
    columns = ["policy", "prompt", "KL first", "KL mean", "F1", "full's F1", *texts.values()]
    return Table("Worst prompts", columns, rows, "The prompts on which a policy is farthest from full prefill.")


def _ending(text: str) -> str:
    """Return the end of a text as a table can hold it: the question of a conversation is its last line."""
    return text if len(text) <= LONGEST else f"… {text[-LONGEST:]}"


def _peers(summary: dict[str, Any]) -> Table:
    rows = []
    for name, told in summary["peers"].items():
        texts = [
            ", ".join(f"{key} {value}" for key, value in told[what].items()) for what in ("versions", "settings")
        ]
        rows.append([Cell(name_of(PEER + name)), *map(Cell, texts), Cell(told["error"] or "")])
    columns = ["peer", "versions", "settings", "failed with"]
    if not any(row[-1].text for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Peers", columns, rows, "Other systems, each in an environment of its own, on the same token ids.")


def _growth_plot(summary: dict[str, Any]) -> Plot:
    series = [
        Series(f"{name_of(policy)}, exponent {each['exponent'][0]:.2f}", policy, each["points"], fit=_fit(**each))
        for policy, each in summary["growth"].items()
    ]
    caption = (
        "A mark for each prompt, and the power law fitted to them. Both axes are logarithmic: a slope of 1 is linear "
        "growth. Lower and flatter is better. `query` looks behind long questions, and from "
        "8,192 chunk tokens on; else it does less."
    )
    x, y = "tokens of the prompt", "TTFT, s"
    return Plot("points", "Time to first token against context length", y, caption, series, x, logx=True, logy=True)


def _fit(exponent: Sequence[float], points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the ends of the fitted line: it goes through the mean of the logarithms."""
    x = [math.log(tokens) for tokens, _ in points]
    mean_x, mean_y = statistics.mean(x), statistics.mean(math.log(seconds) for _, seconds in points)
    return [[math.exp(end), math.exp(mean_y + exponent[0] * (end - mean_x))] for end in (min(x), max(x))]


def _pareto(summary: dict[str, Any]) -> Plot | None:
    series = []
    for policy, each in by_policy(summary).items():
        if each["kl_first"] is not None and each["ttft_ratio"] is not None:
            (kl, *kl_span), (ratio, *span) = each["kl_first"], each["ttft_ratio"]
            series.append(Series(name_of(policy), policy, [[kl, ratio]], [[*kl_span, *span]]))
    if not series:
        return None
    caption = (
        "Nearer to the lower left corner is better: faster, and closer to what full prefill says. Thin lines are "
        f"95 % intervals. Points on the dotted edge are exact (KL of {EXACT:g} nats or less)."
    )
    x, y = "KL of the first token, nats", "TTFT / full prefill's"
    return Plot("points", "Speed against fidelity", y, caption, series, x, logx=True, logy=True, floor=EXACT)


def _breakdown(summary: dict[str, Any]) -> Plot | None:
    timed = {policy: each["stages"] for policy, each in by_policy(summary).items() if each["stages"]}
    total = {policy: sum(stages.values()) for policy, stages in timed.items()}
    fast = {policy: timed[policy] for policy in timed if total[policy] < total.get(FULL, float("inf")) / 2} or timed
    if not fast:
        return None
    stages = list(dict.fromkeys(stage for each in fast.values() for stage in each))
    series = [Series(stage, values=[each.get(stage, 0.0) for each in fast.values()]) for stage in stages]
    left_out = [f"{name_of(policy)} ({total[policy]:.2f} s)" for policy in timed if policy not in fast]
    caption = "Mean seconds in each stage; a bar's length is the mean TTFT."
    if left_out:
        caption += f" Left out, as more than half of full prefill's: {', '.join(left_out)}."
    groups = [name_of(policy) for policy in fast]
    return Plot("bars", "Where the time goes", "mean time, s", caption, series, groups=groups, stacked=True)


def _scatter(section: Section) -> Plot | None:
    times: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    tokens: dict[int, int] = {}
    for row in section["rows"]:
        if row["ttft_s"] is not None:
            times[row["policy"]][row["prompt"]].append(row["ttft_s"])
        tokens[row["prompt"]] = row["tokens"]
    full = times.get(FULL, {})
    series = []
    for policy in by_policy(section["summary"]):
        prompts = sorted(times[policy].keys() & full.keys())
        points = [
            [tokens[p], statistics.median(times[policy][p]) / statistics.median(full[p])]
            for p in prompts
            if policy != FULL
        ]
        if points:
            series.append(Series(name_of(policy), policy, points))
    if not series:
        return None
    caption = "One mark for each prompt and policy. Below the line is faster than full prefill on the same prompt."
    x, y = "tokens of the prompt", "TTFT / full prefill's"
    logx = bool(section["summary"].get("growth"))
    return Plot("points", "Every prompt", y, caption, series, x, logx=logx, logy=True, line=1.0)
