"""Tables of what `chunkcache.eval.serving` measured."""

from __future__ import annotations

import statistics
from typing import Any

from chunkcache.eval.results import Results


def summary(results: Results) -> dict[str, Any]:
    """Return tables of what was measured, and the figures that they show."""
    rows = results.rows
    by = {
        part: [row for row in rows if row["part"] == part] for part in ("overhead", "throughput", "decode", "stall")
    }
    tables, found = [], {}
    if by["overhead"]:
        extra = [1000 * (row["served_s"] - row["alone_s"]) for row in by["overhead"]]
        found["overhead_ms"] = statistics.median(extra)
        tables.append({
            "title": "One client, against the wrapper alone", "columns": ["requests", "HTTP and scheduling, ms"],
            "rows": [[len(extra), found["overhead_ms"]]],
        })  # fmt: skip
    if by["throughput"]:
        rates = {row["reuse"]: row for row in by["throughput"]}
        found["requests_per_s"] = {name: row["requests"] / row["wall_s"] for name, row in rates.items()}
        tables.append({
            "title": "Clients at once", "columns": ["reuse", "clients", "requests/s", "TTFT p50, s", "TTFT p90, s"],
            "rows": [
                [name, row["clients"], found["requests_per_s"][name], row["ttft_p50_s"], row["ttft_p90_s"]]
                for name, row in rates.items()
            ],
        })  # fmt: skip
    if by["decode"]:
        speeds = {row["clients"]: row["tokens"] / row["wall_s"] for row in by["decode"]}
        found["tokens_per_s"] = speeds
        tables.append({
            "title": "Decoding", "columns": ["clients", "tokens/s"], "rows": [[n, v] for n, v in speeds.items()],
        })  # fmt: skip
    if by["stall"]:
        steps = [row["longest_gap_s"] / row["median_gap_s"] for row in by["stall"]]
        found["stall_steps"] = max(steps)
        tables.append({
            "title": "Longest gap of a running answer while another prompt is prefilled",
            "columns": ["prompts", "longest, in decoding steps", "median step, ms"],
            "rows": [[len(steps), max(steps), 1000 * statistics.median(row["median_gap_s"] for row in by["stall"])]],
        })  # fmt: skip
    return {**found, "tables": tables}
