"""What a load test comes to: times to first token against the rate of arrivals, simulated from measured services.

Measured are the service times, the hits and the bytes; the waiting at each rate is simulated (`eval.queueing`). Only
what is in a table of real runs has been waited for on the wall clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chunkcache.eval.load import MEASURED, REAL
from chunkcache.eval.measure import lines, table
from chunkcache.eval.queueing import Queue, Service, percentile, serve
from chunkcache.eval.results import FULL, Results
from chunkcache.eval.workload import poisson

SEEDS = 20  # patterns of arrival that are pooled
PERCENTS = (50, 90, 99)
POINTS = 14  # rates of a curve
TABLE_LOADS = (0.5, 0.8, 0.95)  # rates of the table, as shares of what full prefill can keep up with
OVERLOAD = "overload"
CLOSE = 0.1  # how far a simulation may be off the real run
WINDOWS = 10  # of the hit rate over time
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Stand:
    """One policy in one group: its rows, and the queue of its requests."""

    policy: str
    budget: float
    tiers: str
    rows: Rows
    queue: Queue

    @property
    def group(self) -> tuple[float, str]:
        """Its budget and tiers."""
        return self.budget, self.tiers


def summary(results: Results, rates: Sequence[float] = (), bound_s: float | None = None) -> dict[str, Any]:
    """Return tables and plots of a load test, and the figures that they show as plain JSON values.

    Groups that were not measured to the end are left out. At rates that a policy cannot keep up with it has no TTFT.

    Args:
        results: of `chunkcache.eval.load`.
        rates: requests per second of the curves; by default a range that fits.
        bound_s: TTFT that 90 % of the requests shall meet; by default twice the slowest policy's without load.
    """
    stands = list(_stands(results))
    if not stands:
        return {"policies": {}, "tables": [], "plots": []}
    doubled = {s.group: s.queue.highest_rate(2 * s.queue.unloaded(90)) for s in stands if s.policy == FULL}
    bound = bound_s or 2 * max(s.queue.unloaded(90) for s in stands)
    found = [_figures(stand, bound, doubled.get(stand.group)) for stand in stands]
    checks = [_check(row, stands) for row in results.rows if row["kind"] == REAL]
    return {
        "requests": results.settings["requests"],
        "bound_s": bound,
        "policies": found,
        "validation": [check for check in checks if check is not None],
        "tables": _tables(found, stands, bound, checks),
        "plots": [*_curves(stands, sorted(rates) or _rates(stands)), *_budgets(found, bound), *_over_time(stands)],
    }


def _stands(results: Results) -> Iterable[Stand]:
    settings = results.settings
    count, recorded = settings["requests"], settings["arrivals"]
    patterns = [recorded] if recorded else [poisson(count, settings["seed"] + n) for n in range(SEEDS)]
    rows: dict[tuple[str, float, str], Rows] = {}
    for row in results.rows:
        if row["kind"] == MEASURED:
            rows.setdefault((row["policy"], row["budget"], row["tiers"]), []).append(row)
    for (policy, budget, tiers), own in rows.items():
        if len(own) == count:
            services = [Service(row["ttft_service_s"], row["service_s"]) for row in own]
            yield Stand(policy, budget, tiers, own, Queue(services, patterns))


def _figures(stand: Stand, bound: float, doubled: float | None) -> dict[str, Any]:
    """Return one policy's figures; `doubled` is the rate at which full prefill's p90 is twice its unloaded one."""
    queue, rows = stand.queue, stand.rows
    unloaded = queue.unloaded(90)
    asked = sum(row["chunks"] for row in rows)
    tiers = rows[0]["tier_hits"]
    moved = None
    if doubled is not None and doubled < queue.capacity:
        moved = percentile(queue.ttfts(doubled), 90) / unloaded - 1
    return {
        "policy": stand.policy,
        "budget": stand.budget,
        "tiers": stand.tiers,
        "unloaded_s": {f"p{percent}": queue.unloaded(percent) for percent in PERCENTS},
        "capacity": queue.capacity,
        "rate_p90_doubled": queue.highest_rate(2 * unloaded),
        "rate_at_bound": queue.highest_rate(bound),
        "rate_full_doubled": doubled,
        "p90_moved": moved,
        "hit_rate": sum(row["hits"] for row in rows) / asked if asked else 0.0,
        "tier_hit_rate": {name: sum(row["tier_hits"][name] for row in rows) / max(asked, 1) for name in tiers},
        "stored_bytes": {name: max(row["stored_bytes"][name] for row in rows) for name in tiers},
    }


def _check(row: dict[str, Any], stands: Sequence[Stand]) -> dict[str, Any] | None:
    """Compare a real run with the simulation of its arrivals: with the services measured apart, and with its own.

    The first says how far the whole method is off, the second how far only the queue is.
    """
    place = (row["policy"], row["budget"], row["tiers"])
    stand = next((s for s in stands if (s.policy, s.budget, s.tiers) == place), None)
    if stand is None:
        return None
    own = [Service(*times) for times in zip(row["ttft_service_s"], row["service_s"], strict=True)]
    apart, same = serve(row["arrivals_s"], stand.queue.services), serve(row["arrivals_s"], own)
    found: dict[str, Any] = {"policy": row["policy"], "rate": row["rate"]}
    found["load"] = row["rate"] / stand.queue.capacity
    for percent in (50, 90):
        real = percentile(row["ttft_s"], percent)
        found[f"p{percent}"] = {
            "real_s": real,
            "simulated_s": percentile(apart, percent),
            "difference": percentile(apart, percent) / real - 1,
            "difference_own_services": percentile(same, percent) / real - 1,
        }
    found["within_10_percent"] = all(abs(found[p]["difference"]) <= CLOSE for p in ("p50", "p90"))
    return found


def _rates(stands: Sequence[Stand]) -> list[float]:
    """Return rates from where nobody waits to what the fastest can just not keep up with."""
    low = 0.1 * min(stand.queue.capacity for stand in stands)
    high = max(stand.queue.capacity for stand in stands)
    return [low * (high / low) ** (step / (POINTS - 1)) for step in range(POINTS)]


# --- tables


def _tables(
    found: Sequence[Mapping[str, Any]], stands: Sequence[Stand], bound: float, checks: Sequence[dict[str, Any] | None]
) -> list[dict[str, Any]]:
    place = {"policy": "{policy}", "budget": "{budget:g}", "tiers": "{tiers}"}
    under_load = {
        **place, "unloaded p50 s": "{unloaded_s[p50]:.3g}", "p90 s": "{unloaded_s[p90]:.3g}",
        "requests/s where p90 doubles": "{rate_p90_doubled:.3g}",
        f"requests/s with p90 within {_number(bound)} s": "{rate_at_bound:.3g}",
        "p90 where full's has doubled": "{moved}",
    }  # fmt: skip
    caches = {
        **place, "hit rate": "{hit_rate:.0%}", "of each tier": "{shares}", "stored at most": "{sizes}",
    }  # fmt: skip
    tables = [
        table(
            "Under load: service times measured, waiting simulated", under_load,
            [{**figures, "moved": _moved(figures)} for figures in found],
        ),
        _rate_table(stands),
        table("Caches: measured", caches, [_in_tiers(figures) for figures in found if figures["policy"] != FULL]),
    ]  # fmt: skip
    compared = {"policy": "{policy}", "requests/s": "{rate:.3g}", "load": "{load:.0%}"}
    for p in ("p50", "p90"):
        compared |= {f"{p} real s": f"{{{p}[real_s]:.3g}}", f"{p} simulated s": f"{{{p}[simulated_s]:.3g}}"}
        compared |= {f"{p} difference": f"{{{p}[difference]:+.1%}}"}
    compared["within 10 %"] = "{within}"
    compared["with the real run's own service times, p50 / p90"] = (
        "{p50[difference_own_services]:+.1%} / {p90[difference_own_services]:+.1%}"
    )
    rows = [{**check, "within": "yes" if check["within_10_percent"] else "no"} for check in checks if check]
    return [*tables, *([table("Real runs beside their simulation", compared, rows)] if rows else [])]


def _in_tiers(figures: Mapping[str, Any]) -> dict[str, Any]:
    shares = " + ".join(f"{share:.0%}" for share in figures["tier_hit_rate"].values())
    return {**figures, "shares": shares, "sizes": " + ".join(map(_size, figures["stored_bytes"].values()))}


def _moved(each: Mapping[str, Any]) -> str:
    if each["rate_full_doubled"] is None:
        return "n/a"
    return OVERLOAD if each["p90_moved"] is None else f"{each['p90_moved']:+.0%}"


def _rate_table(stands: Sequence[Stand]) -> dict[str, Any]:
    group = _largest(stands)
    compared = [stand for stand in stands if stand.group == group]
    base = next((stand for stand in compared if stand.policy == FULL), compared[0])
    rates = [share * base.queue.capacity for share in TABLE_LOADS]
    rows = [[stand.policy, *(_cell(stand.queue, rate) for rate in rates)] for stand in compared]
    columns = ["policy", *(f"{_number(rate)} requests/s" for rate in rates)]
    return {"title": f"TTFT p50 / p90 / p99 in seconds, {_named(group)}", "columns": columns, "rows": rows}


def _cell(queue: Queue, rate: float) -> str:
    if rate >= queue.capacity:
        return OVERLOAD
    ttfts = queue.ttfts(rate)
    return " / ".join(_number(percentile(ttfts, percent)) for percent in PERCENTS)


# --- plots


def _curves(stands: Sequence[Stand], rates: Sequence[float]) -> list[dict[str, Any]]:
    group = _largest(stands)
    curves = {
        stand.policy: [(rate, stand.queue.ttfts(rate)) for rate in rates if rate < stand.queue.capacity]
        for stand in stands
        if stand.group == group
    }
    caption = (
        f"{_named(group)}; service times measured one by one, waiting simulated, up to what each can keep up with."
    )
    plots = []
    for percent in PERCENTS:
        series = [
            _line(policy, policy, [[rate, percentile(ttfts, percent)] for rate, ttfts in points], simulated=True)
            for policy, points in curves.items()
            if points
        ]
        title, y = f"TTFT p{percent} against request rate", f"TTFT p{percent}, s"
        plots.append(lines(title, "requests per second", y, caption, series, "xy"))
    return plots


def _budgets(found: Sequence[Mapping[str, Any]], bound: float) -> list[dict[str, Any]]:
    """Return throughput at the TTFT bound against the cache budget, a line per policy and tiers."""
    points: dict[tuple[str, str], list[list[float]]] = {}
    for figures in found:
        if figures["rate_at_bound"]:
            place = (figures["policy"], figures["tiers"])
            points.setdefault(place, []).append([figures["budget"], figures["rate_at_bound"]])
    if len({figures["budget"] for figures in found}) < 2:
        return []
    series = [_line(f"{policy}, {tiers}", policy, sorted(own), True) for (policy, tiers), own in points.items()]
    title, x = "Throughput at the TTFT bound against the cache budget", "memory, share of all chunks' bytes"
    caption = f"The highest rate whose p90 TTFT stays within {_number(bound)} s; waiting simulated."
    return [lines(title, x, "requests per second", caption, series, "y")]


def _over_time(stands: Sequence[Stand]) -> list[dict[str, Any]]:
    """Return a plot per group of where the chunks of each policy came from."""
    plots = []
    for group in dict.fromkeys(stand.group for stand in stands):
        series = [
            _line(f"{stand.policy}, from {tier}", stand.policy, _rolling(stand.rows, tier), simulated=False)
            for stand in stands
            if stand.group == group and stand.policy != FULL
            for tier in stand.rows[0]["tier_hits"]
        ]
        title, caption = f"Hit rate over time, {_named(group)}", "Measured; each point is the mean over a window."
        plots.append(lines(title, "requests", "share of the chunks asked for", caption, series))
    return plots


def _line(name: str, policy: str, points: list[list[float]], simulated: bool) -> dict[str, Any]:
    return {"name": name, "policy": policy, "points": points, "simulated": simulated}


def _rolling(rows: Rows, tier: str) -> list[list[float]]:
    size = max(1, len(rows) // WINDOWS)
    windows = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        [
            window[-1]["request"] + 1,
            sum(row["tier_hits"][tier] for row in window) / max(1, sum(row["chunks"] for row in window)),
        ]
        for window in windows
    ]


def _largest(stands: Sequence[Stand]) -> tuple[float, str]:
    """Return the group with the largest budget, of these the first."""
    return max(stands, key=lambda stand: stand.budget).group


def _named(group: tuple[float, str]) -> str:
    return f"budget {group[0]:g}, {group[1]}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
