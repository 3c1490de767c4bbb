"""The heat map of a prompt: which of its tokens each policy recomputed, and in which share of the layers."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from chunkcache.eval.results import Results


def summary(results: Results) -> dict[str, Any]:
    """Return the pieces of the prompt by policy: `{policy: [{"role", "texts": [..], "shares": [..]}]}`."""
    rows = {(row["policy"], row["index"]): row for row in results.rows}  # once, though a run was interrupted
    policies = dict.fromkeys(policy for policy, _ in rows)
    return {policy: _pieces([row for (name, _), row in rows.items() if name == policy]) for policy in policies}


def _pieces(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: row["index"])
    grouped = [(role, list(tokens)) for role, tokens in groupby(rows, key=lambda row: row["role"])]
    return [
        {"role": role, "texts": [row["text"] for row in tokens], "shares": [row["share"] for row in tokens]}
        for role, tokens in grouped
    ]
