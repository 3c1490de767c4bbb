"""What a section of the report is made of, before it becomes HTML or Markdown: tables and plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "n/a"
Interval = Sequence[float]  # value, low end and high end of its 95 % confidence interval
_NUMBER = re.compile(r"[-−+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


@dataclass(frozen=True)
class Cell:
    """One value of a table: how it reads, by which number it is sorted, and its interval."""

    text: str
    number: float | None = None
    note: str = ""

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.text != UNKNOWN


@dataclass(frozen=True)
class Table:
    """A table; `note` says how to read it."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """For each column: whether all it has are numbers."""
        known = [[row[at] for row in self.rows if row[at].known] for at in range(len(self.columns))]
        return [bool(cells) and all(cell.number is not None for cell in cells) for cells in known]


@dataclass(frozen=True)
class Series:
    """The points of a plot that belong together, or (`values`) its bars, one for each group.

    Attributes:
        policy: whose colour and marker it has; none for what is no policy's.
        points: [x, y] each.
        spans: for points with intervals [x low, x high, y low, y high] each.
        fit: [x, y] of a line drawn through them.
        simulated: not measured; drawn dashed.
    """

    name: str
    policy: str | None = None
    points: list[list[float]] = field(default_factory=list)
    spans: list[list[float]] = field(default_factory=list)
    fit: list[list[float]] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    simulated: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot; `kind` is `lines`, `points` or `bars`, the caption says how to read it.

    Attributes:
        logx, logy: logarithmic axes.
        floor: on a logarithmic x axis, what is not above it is drawn at the edge.
        line: a horizontal line at this y.
        groups: of bars; `y` is what their length means.
        stacked: the bars of a group follow one another.
    """

    kind: str
    title: str
    y: str
    caption: str
    series: list[Series]
    x: str = ""
    logx: bool = False
    logy: bool = False
    floor: float | None = None
    line: float | None = None
    groups: list[str] = field(default_factory=list)
    stacked: bool = False

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Plot:
        """Build a plot from the plain values of a summary."""
        return cls(**{**plain, "series": [Series(**series) for series in plain["series"]]})


def table_of(plain: dict[str, Any]) -> Table:
    """Build a table from the plain values of a summary."""
    rows = [[cell(value) for value in row] for row in plain["rows"]]
    return Table(plain["title"], plain["columns"], rows, plain.get("note", ""))


def cell(value: Any) -> Cell:
    """Return a cell of a plain value: text, number, [value, low, high] or None."""
    if value is None:
        return Cell(UNKNOWN)
    if isinstance(value, str):
        begins = _NUMBER.match(value)
        return Cell(value, float(begins[0].replace(",", "").replace("−", "-")) if begins else None)
    if isinstance(value, (list, tuple)):
        return _interval(value, _general)
    return Cell(_general(value), float(value))


def number(value: float | Interval | None, digits: int = 3, percent: bool = False) -> Cell:
    """Return a cell of a number or an interval with `digits` decimals, or of what is unknown."""
    if value is None:
        return Cell(UNKNOWN)

    def shown(part: float) -> str:
        scaled = round(part * (100 if percent else 1), digits) + 0.0  # no -0.000
        return f"{scaled:,.{digits}f}".replace("-", "−") + ("%" if percent else "")

    if isinstance(value, (int, float)):
        return Cell(shown(value), float(value))
    return _interval(value, shown)


def _interval(value: Interval, shown: Callable[[float], str]) -> Cell:
    """Return its cell; an interval without width says nothing that the value does not."""
    middle, low, high = map(shown, value)
    return Cell(middle, value[0], f"({low} to {high})" if low != high else "")


def _general(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
