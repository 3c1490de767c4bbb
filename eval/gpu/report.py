"""What a check found: tables of figures, what is wrong, what went amiss, and what there was no time for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Report:
    """Prints each figure as it comes, keeps them all, and writes them to a file.

    Args:
        path: the JSON file.

    Attributes:
        tables: rows of figures by the title of their table.
        wrong: what differs from what it must equal.
        problems: what could not be measured, and why.
        left_out: what there was no time for.
        seconds: how long each section took.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.perf_counter()
        self.tables: dict[str, list[Figures]] = {}
        self.wrong: list[str] = []
        self.problems: list[str] = []
        self.left_out: list[str] = []
        self.seconds: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def say(self, line: str) -> None:
        """Print a line at once, with the seconds since the start."""
        print(f"[{self.elapsed:6.1f}s] {line}", flush=True)

    def row(self, table: str, **figures: Any) -> None:
        """Add a row to the table of this title."""
        self.tables.setdefault(table, []).append(figures)
        self.say(f"{table}: " + ", ".join(f"{name} {_text(value)}" for name, value in figures.items()))

    def add_wrong(self, what: str) -> None:
        """Note a result that is not what it must be."""
        self.wrong.append(what)
        self.say(f"WRONG {what}")

    def add_problem(self, what: str) -> None:
        """Note what could not be measured."""
        self.problems.append(what)
        self.say(f"PROBLEM {what}")

    def add_left_out(self, what: str) -> None:
        """Note what there was no time for."""
        self.left_out.append(what)
        self.say(f"left out, no time: {what}")

    def as_dict(self) -> dict[str, Any]:
        """Return everything in plain values."""
        return {
            "tables": self.tables,
            "wrong": self.wrong,
            "problems": self.problems,
            "left_out": self.left_out,
            "seconds": self.seconds,
        }

    def write(self) -> None:
        """Write the JSON file anew."""
        self.path.write_text(json.dumps(self.as_dict(), default=str, indent=1) + "\n")

    def markdown(self) -> str:
        """Return the tables and lists in Markdown."""
        parts = [f"## {title}\n\n{_table(rows)}" for title, rows in self.tables.items()]
        lists = {"Wrong": self.wrong, "Problems": self.problems, "Left out for lack of time": self.left_out}
        parts += [
            f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in lists.items() if lines
        ]
        return "\n\n".join(parts)


def _table(rows: list[Mapping[str, Any]] | list[Figures]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row.get(name, "")).replace("|", "\\|") for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    """Return a figure as it is shown: floats with three digits, or more where there are more before the point."""
    if value is None:
        return "n/a"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
