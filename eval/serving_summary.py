"""Tables of what `chunkcache.eval.serving` measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from chunkcache.eval.results import Results

OURS = "chunkcache"
LIMIT_S = 2.0  # for the 90th percentile of the TTFT


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
    if any(row["part"] in ("rate", "rival") for row in rows):
        found |= _rates(rows, tables)
    return {**found, "tables": tables}


def _rates(rows: list[dict[str, Any]], tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the table of servers at rates; return how our TTFT p90 compares with the best peer's."""
    rates = [row for row in rows if row["part"] == "rate"]
    tables.append({
        "title": "Requests that arrive at a rate, documents by a Zipf law",
        "columns": ["server", "requests/s", "TTFT p50, s", "TTFT p90, s", "failed", "without text"],
        "rows": [
            [row[name] for name in ("server", "rate", "ttft_p50_s", "ttft_p90_s", "failed", "without_text")]
            for row in rates
        ],
    })  # fmt: skip
    skipped = {row["server"]: row["skipped"] for row in rows if row["part"] == "rival"}
    ours = next((row for row in rates if row["server"] == OURS), None)
    if ours is None:
        return {"skipped": skipped}
    best = best_peer(rates)
    ratio = ours["ttft_p90_s"] / best["ttft_p90_s"] if best and ours["ttft_p90_s"] else None
    return {
        "best_peer": best and best["server"], "rate": ours["rate"], "ttft_p90_to_peer": ratio, "skipped": skipped,
    }  # fmt: skip


def passed(row: dict[str, Any], limit_s: float = LIMIT_S) -> bool:
    """Return whether the TTFT p90 of a row is above a limit; it is where a tenth of the requests failed."""
    return row["ttft_p90_s"] is None or row["ttft_p90_s"] > limit_s


def best_peer(rows: Sequence[dict[str, Any]], limit_s: float = LIMIT_S) -> dict[str, Any] | None:
    """Return the row at which the peer that got furthest passed the limit, the fastest of those that got as far.

    A peer that answers without text gets no credit for it, nor does one that fails.
    """
    over = [
        row for row in rows
        if row["part"] == "rate" and row["server"] != OURS and not row["without_text"] and passed(row, limit_s)
        and row["ttft_p90_s"] is not None
    ]  # fmt: skip
    return min(over, key=lambda row: (-row["step"], row["ttft_p90_s"]), default=None)
