"""Load on machines that are not here: everything that comes out of this is simulated, and says so.

Requests of Zipf popularity arrive by a Poisson process at a cluster (`eval.cluster`), whose service times come from a
cost model (`eval.costs`) with published figures, or with figures that were fitted to measured requests. A fit also
says how well the model foretells what it was not fitted to: the other policies' times in the same measurements.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chunkcache.errors import InputError
from chunkcache.eval.cluster import POLICIES, ROUTES, Cluster, Run, Sizes
from chunkcache.eval.costs import Costs, Machine, Reuse, Shape, fit, predicted
from chunkcache.eval.measure import lines, table
from chunkcache.eval.queueing import percentile
from chunkcache.eval.results import Results, read_folder
from chunkcache.eval.workload import at_rate, check_rate, poisson, zipf_draws

BENCH = "simulation"
LOADS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)  # rates, as shares of full prefill's capacity
PERCENTS = (50, 90, 99)
BUSY = 0.99  # load from which on the queue grows for as long as requests come
SAME = ("model", "dtype", "device", "threads", "cores", "system")  # of what measured requests ran on
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Progress = Callable[[int, int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Population:
    """Whose requests are simulated.

    Attributes:
        documents: different chunks there are.
        k: different chunks of a request.
        skew: exponent of the Zipf law over them.
        requests: how many arrive; the first tenth fills the caches and is not counted.
        seed: of what is drawn.
    """

    documents: int
    k: int
    skew: float
    requests: int
    seed: int

    def draw(self) -> list[tuple[int, ...]]:
        """Return the chunks of every request, by their numbers.

        Raises:
            InputError: there are fewer chunks than a request has, or the skew is out of range.
        """
        if self.documents < self.k:
            raise InputError(f"{self.documents} chunks are too few for requests of {self.k}")
        drawn = zipf_draws(self.documents, self.k, self.skew, random.Random(self.seed))
        return [next(drawn) for _ in range(self.requests)]


def check_cluster(cluster: Cluster, policies: Sequence[str]) -> None:
    """Refuse what cannot be simulated.

    Raises:
        InputError: a policy has no cost model, a figure is not above 0, or the route is unknown.
    """
    for policy in policies:
        if policy not in POLICIES:
            raise InputError(f"{policy!r} has no cost model; those that have one are {', '.join(POLICIES)}")
    if cluster.route not in ROUTES:
        raise InputError(f"requests cannot be routed {cluster.route!r}; the ways are {', '.join(ROUTES)}")
    for name in ("replicas", "memory_bytes", "redis_bandwidth"):
        if not getattr(cluster, name) > 0:
            raise InputError(f"{name}={getattr(cluster, name)} is not above 0")
    if not 0 < cluster.costs.machine.utilisation <= 1:
        raise InputError(f"utilisation={cluster.costs.machine.utilisation} is not a share of the peak, 0 to 1")


def default_rates(cluster: Cluster, population: Population) -> list[float]:
    """Return rates around what full prefill can keep up with."""
    sizes = cluster.sizes
    whole = cluster.costs.full_s(sizes.prefix + population.k * sizes.chunk + sizes.question)
    return [load * cluster.replicas / whole for load in LOADS]


def settings(cluster: Cluster, population: Population, policies: Sequence[str], rates: Sequence[float]) -> Row:
    """Return the settings of a simulation, as its results file keeps them."""
    for rate in rates:
        check_rate(rate)
    return {
        "simulated": True,
        "cluster": asdict(cluster),
        "kv_bytes": cluster.costs.shape.kv_bytes,
        "population": asdict(population),
        "policies": list(policies),
        "rates": list(rates),
        "reuse": {name: asdict(reuse) for name in policies if (reuse := POLICIES[name]) is not None},
    }


def simulate(cluster: Cluster, population: Population, results: Results, on_run: Progress | None = None) -> None:
    """Simulate each policy at each rate of the settings of `results`, that has no row yet; one row per run."""
    requests, pattern = population.draw(), poisson(population.requests, population.seed)
    warm_up = population.requests // 10
    runs = [(policy, rate) for policy in results.settings["policies"] for rate in results.settings["rates"]]
    for done, (policy, rate) in enumerate(runs, 1):
        if not results.done(policy=policy, rate=rate):
            found = Run(cluster, policy).serve(at_rate(pattern, rate), requests, warm_up)
            counted = found.ttfts[warm_up:]
            total = sum(found.chunks.values())
            results.add(
                {
                    "simulated": True,
                    "policy": policy,
                    "rate": rate,
                    "ttft_s": {f"p{percent}": percentile(counted, percent) for percent in PERCENTS},
                    "chunks": {name: count / total for name, count in found.chunks.items()},
                    "link_busy": found.link_busy,
                    "busy": found.busy,
                    "load": rate * statistics.mean(found.services[warm_up:]) / cluster.replicas,
                }
            )
        if on_run is not None:
            on_run(done, len(runs))


# --- fitted to measured requests


def fit_folder(
    folder: Path, name: str, shape: Shape, sizes: Sizes, memory_bandwidth: float, hbm_bandwidth: float
) -> tuple[Machine, list[Row]]:
    """Fit a machine to the full prefills in a results folder, and try it on the other policies there.

    Args:
        folder: with results of `chunkcache bench ttft` or `quality`, warm.
        name: of the shape.
        shape: of the model that was measured.
        sizes: its prefix and its question are taken for those of the measured prompts.
        memory_bandwidth: bytes/s at which stored KV are put in place.
        hbm_bandwidth: bytes/s at which weights are read.

    Returns:
        The machine; and for full prefill and each policy that is modelled the median seconds that were measured where
        all chunks were stored, those that the model expects, and the median of the relative errors of single
        requests, with their signs (`error`) and without (`error_size`).

    Raises:
        InputError: there are no such rows, or they are of several machines or models, or of another than the shape.
    """
    found = [results for results in read_folder(folder).values() if results.bench == "requests"]
    found = [results for results in found if not results.settings["cold"]]
    _check_measured(folder, found, name, shape)
    rows = [row for results in found for row in results.rows if row["policy"] in POLICIES and not row["fallbacks"]]
    full = [(float(row["tokens"]), float(row["ttft_s"])) for row in rows if row["policy"] == "full"]
    machine = fit(shape, full, memory_bandwidth, hbm_bandwidth, str(folder))
    costs = Costs(shape, machine)
    checks = []
    for policy, reuse in POLICIES.items():
        own = [row for row in rows if row["policy"] == policy and (reuse is None or not row["misses"])]
        if not own:
            continue
        expected = [_expected(costs, reuse, sizes, row) for row in own]
        errors = [seconds / row["ttft_s"] - 1 for seconds, row in zip(expected, own, strict=True)]
        checks.append(
            {
                "policy": policy,
                "requests": len(own),
                "measured_s": statistics.median(row["ttft_s"] for row in own),
                "predicted_s": statistics.median(expected),
                "error": statistics.median(errors),
                "error_size": statistics.median(map(abs, errors)),
            }
        )
    return machine, checks


def _expected(costs: Costs, reuse: Reuse | None, sizes: Sizes, row: Row) -> float:
    stored = row["tokens"] - sizes.prefix - sizes.question
    if stored <= 0:
        raise InputError(
            f"a measured prompt of {row['tokens']} tokens has no room for a prefix of {sizes.prefix} and a question "
            f"of {sizes.question}; pass those of the measured prompts as --prefix-tokens and --question-tokens"
        )
    return predicted(costs, reuse, sizes.prefix, stored, sizes.question)


def _check_measured(folder: Path, found: Sequence[Results], name: str, shape: Shape) -> None:
    """Refuse requests that cannot be fitted together, or not to this shape."""
    if not found:
        raise InputError(f"{folder} has no warm results of `chunkcache bench ttft` or `quality` to fit to")
    first = found[0]
    for other in found[1:]:
        for field in SAME:
            there, here = other.ran_on.get(field), first.ran_on.get(field)
            if there != here:
                raise InputError(
                    f"{folder} has results of {field}={here!r} and of {there!r}; pass a folder of one machine and "
                    "model"
                )
    model, dtype = str(first.ran_on["model"]), first.ran_on["dtype"]
    if name not in model.lower():
        raise InputError(f"{folder} was measured on the model {model!r}, which is not --shape {name}")
    if DTYPE_BYTES.get(dtype) != shape.dtype_bytes:
        raise InputError(
            f"{folder} was measured in {dtype}; {name} is built in with {shape.dtype_bytes} bytes a value"
        )


# --- what it comes to


def summary(results: Results) -> dict[str, Any]:
    """Return tables and plots of a simulation, all of them marked as simulated."""
    asked = results.settings
    by_policy = {name: [row for row in results.rows if row["policy"] == name] for name in asked["policies"]}
    by_policy = {name: sorted(rows, key=lambda row: float(row["rate"])) for name, rows in by_policy.items() if rows}
    cluster, population = asked["cluster"], asked["population"]
    machine = cluster["costs"]["machine"]
    redis = f"one Redis at {cluster['redis_bandwidth'] / 1e9:g} GB/s" if cluster["redis_bytes"] else "no Redis"
    speed = "speed fitted" if asked.get("fit") else f"utilisation of {machine['utilisation']:g} assumed"
    about = (
        f"Simulated: {cluster['replicas']} replicas, {redis}, {population['documents']:,} chunks of "
        f"{cluster['sizes']['chunk']} tokens, {population['k']} a request. {cluster['costs']['shape']['source']}; "
        f"{machine['source']}; {speed}. At an overload the TTFT grows with the length of the run; curves leave it "
        "out."
    )
    plots = [_plot(by_policy, f"p{percent}", about) for percent in PERCENTS] if by_policy else []
    tables = [*_tables(by_policy), *_fit_tables(asked.get("fit", []))]
    return {"simulated": True, "policies": by_policy, "notes": [about], "tables": tables, "plots": plots}


def _tables(by_policy: Mapping[str, Sequence[Row]]) -> list[Row]:
    if not by_policy:
        return []
    base = next(iter(by_policy.values()))
    chosen = [row["rate"] for row in base][:: max(1, len(base) // 5)]
    rows = []
    for name, own in by_policy.items():
        at = {row["rate"]: row for row in own}
        rows.append([name, *(_cell(at[rate]) if rate in at else "" for rate in chosen)])
    columns = ["policy", *(f"{rate:.3g} requests/s" for rate in chosen)]
    origins = {
        "policy": "{policy}", "from memory": "{chunks[memory]:.0%}", "from Redis": "{chunks[redis]:.0%}",
        "computed": "{chunks[computed]:.0%}", "reading from Redis": "{link_busy:.0%}", "load": "{load:.0%}",
    }  # fmt: skip
    return [
        {"title": "Simulated: TTFT p50 / p90 / p99 in seconds", "columns": columns, "rows": rows},
        table(
            "Simulated: where chunks came from, at the highest rate", origins, [own[-1] for own in by_policy.values()]
        ),
    ]


def _cell(row: Row) -> str:
    ttfts = " / ".join(f"{row['ttft_s'][f'p{percent}']:.3g}" for percent in PERCENTS)
    return f"{ttfts} (overload)" if row["load"] >= BUSY else ttfts


def _fit_tables(checks: Sequence[Row]) -> list[Row]:
    columns = {
        "policy": "{policy}", "requests": "{requests}", "measured s": "{measured_s:.3g}",
        "expected s": "{predicted_s:.3g}", "error": "{error:+.0%}", "its size": "{error_size:.0%}",
    }  # fmt: skip
    title = "The cost model, fitted to full prefill, on other policies (medians)"
    return [table(title, columns, checks)] if checks else []


def _plot(by_policy: Mapping[str, Sequence[Row]], name: str, about: str) -> Row:
    series = [
        {"name": policy, "policy": policy, "points": points, "simulated": True}
        for policy, rows in by_policy.items()
        if (points := [[row["rate"], row["ttft_s"][name]] for row in rows if row["load"] < BUSY])
    ]
    title, y = f"Simulated: TTFT {name} against request rate", f"TTFT {name}, s"
    return lines(title, "requests per second", y, about, series, "xy")
