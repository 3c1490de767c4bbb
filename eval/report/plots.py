"""Plots as inline SVG, drawn by matplotlib.

Texts stay texts, and colours become CSS variables, so that a plot follows the theme and the font of its page. The
same plot gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from chunkcache.eval.report.parts import Plot, Series
from chunkcache.eval.report.styles import COLOURS, PARTS, Style, part_style

# matplotlib knows no CSS variables: each stands as a colour of its own until the SVG is made
_VARIABLES = ["--ink", "--muted", "--grid", "--paper"]
_VARIABLES += [f"--c{n}" for n in range(COLOURS + 1)] + [f"--s{n + 1}" for n in range(PARTS)]
_STAND_IN = {variable: f"#0a0b{n:02x}" for n, variable in enumerate(_VARIABLES)}
_INK, _MUTED, _GRID, _PAPER = (_STAND_IN[variable] for variable in _VARIABLES[:4])
_WIDTH = 5.6  # inches of 72 units
_FONT = 11
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that plots are the same everywhere
    "font.size": _FONT,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": _FONT,
    "legend.borderaxespad": 0.0,
    "legend.columnspacing": 1.4,
    "legend.handletextpad": 0.5,
}


def draw(plot: Plot, styles: dict[str, Style], uid: str) -> str:
    """Return the plot as an `<svg>` element; `uid` tells its ids from those of the page's other plots."""
    with mpl.rc_context({**_RC, "svg.hashsalt": uid}):
        legend = _legend_rows(plot)
        height = 3.5 if plot.kind != "bars" else 0.8 + 0.3 * len(plot.groups) * _bars_of_group(plot)
        figure = Figure(figsize=(_WIDTH, height + 0.26 * legend), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        (_draw_bars if plot.kind == "bars" else _draw_points)(plot, styles, axes)
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower left", ncols=-(-len(labels) // legend))
        written = StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(written.getvalue(), plot, uid)


def _legend_rows(plot: Plot) -> int:
    names = [_label(series) for series in plot.series]
    if plot.kind == "bars" and len(names) == 1:
        return 0
    longest = max(len(name) for name in names)
    columns = 1 if longest > 36 else 2 if longest > 21 else 3 if longest > 13 else 4
    return -(-len(names) // columns)


def _bars_of_group(plot: Plot) -> float:
    return 1 if plot.stacked or len(plot.series) == 1 else 0.4 + 0.6 * len(plot.series)


def _label(series: Series) -> str:
    return f"{series.name} (simulated)" if series.simulated else series.name


def _draw_points(plot: Plot, styles: dict[str, Style], axes: Axes) -> None:
    xs, ys = ([point[axis] for series in plot.series for point in series.points] for axis in (0, 1))
    x_edge = _edge(xs, plot.floor) if plot.logx else None
    y_edge = _edge(ys, None) if plot.logy else None
    for index, series in enumerate(plot.series):
        style = styles[series.policy] if series.policy else part_style(index)
        colour = _STAND_IN[style.colour]
        x, y = _raised(series, 0, x_edge), _raised(series, 1, y_edge)
        cloud = plot.kind == "points" and len(x) > 1
        for at, (left, right, low, high) in enumerate(series.spans):
            ends = [end if x_edge is None else max(end, x_edge) for end in (left, right)]
            axes.plot(ends, [y[at]] * 2, color=colour, linewidth=1, alpha=0.6)
            axes.plot([x[at]] * 2, [low, high], color=colour, linewidth=1, alpha=0.6)
        if series.fit:
            axes.plot(*zip(*series.fit, strict=True), color=colour, linewidth=1.4)
        axes.plot(
            x,
            y,
            linestyle="none" if plot.kind == "points" else "--" if series.simulated else "-",
            linewidth=1.6,
            color=colour,
            marker=None if plot.kind == "lines" and len(x) > 40 else style.marker,
            markersize=4.5 if cloud else 7,
            markerfacecolor=_PAPER if style.hollow else colour,
            markeredgewidth=1.1 if style.hollow else 0 if cloud else 0.6,
            markeredgecolor=colour if style.hollow else _PAPER,
            label=_label(series),
        )
    if plot.line is not None:
        axes.axhline(plot.line, color=_MUTED, linewidth=1)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    _scale(axes, "x", xs, plot.logx, x_edge)
    _scale(axes, "y", [*ys, *([] if plot.line is None else [plot.line])], plot.logy, y_edge)


def _draw_bars(plot: Plot, styles: dict[str, Style], axes: Axes) -> None:
    at = np.arange(len(plot.groups), dtype=float)
    thick = 0.72 if plot.stacked else 0.8 / len(plot.series)
    ends = np.zeros(len(plot.groups))
    for index, series in enumerate(plot.series):
        style = styles[series.policy] if series.policy else part_style(index)
        values = np.array([value or 0.0 for value in series.values])
        where = at if plot.stacked else at + (index - (len(plot.series) - 1) / 2) * thick
        left = ends if plot.stacked else None
        axes.barh(where, values, height=thick * 0.94, left=left, color=_STAND_IN[style.colour], label=_label(series))
        ends = ends + values if plot.stacked else ends
        if not plot.stacked:
            _write_ends(axes, where, series.values)
    if plot.stacked:
        _write_ends(axes, at, ends.tolist())
    axes.set_yticks(at, plot.groups)
    axes.set_xlabel(plot.y)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))


def _write_ends(axes: Axes, where: Iterable[float], values: Sequence[float | None]) -> None:
    longest = max(value or 0.0 for value in values)
    decimals = 0 if longest >= 100 else 1 if longest >= 10 else 2 if longest >= 0.1 else 4
    for at, value in zip(where, values, strict=True):
        text = "n/a" if value is None else f"{value:,.{decimals}f}"
        axes.annotate(text, (value or 0.0, at), xytext=(4, 0), textcoords="offset points", va="center")


def _edge(values: Sequence[float], floor: float | None) -> float | None:
    """Return where, on a logarithmic axis, values are drawn that are not above `floor` (0 if None), if there are."""
    lowest = floor or 0.0
    above = [value for value in values if value > lowest]
    if len(above) == len(values):
        return None
    return lowest or (min(above) / 3 if above else 1.0)


def _raised(series: Series, axis: int, edge: float | None) -> list[float]:
    return [point[axis] if edge is None else max(point[axis], edge) for point in series.points]


def _scale(axes: Axes, name: str, values: Sequence[float], log: bool, edge: float | None) -> None:
    axis = axes.xaxis if name == "x" else axes.yaxis
    if not log:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_tick))
        return
    axes.set(**{f"{name}scale": "log"})
    drawn = [value if edge is None else max(value, edge) for value in values]
    decades = np.log10(max(drawn) / min(drawn))
    subs = [1.0] if decades > 3 else [1.0, 2.0, 5.0] if decades > 0.9 else [float(n) for n in range(1, 10)]
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _at_edge(value, edge)))
    if edge is not None:
        (axes.axvline if name == "x" else axes.axhline)(edge, color=_MUTED, linewidth=1, linestyle=":")


def _at_edge(value: float, edge: float | None) -> str:
    if edge is None or value > edge * 1.01:
        return _tick(value, None)
    return f"≤ {edge:g}" if value > edge * 0.99 else ""


def _tick(value: float, _: object) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _inline(svg: str, plot: Plot, uid: str) -> str:
    """Return the element alone, named for who cannot see it, with ids of its own and the page's colours and font."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{uid}-", svg)
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda match: f"var({_VARIABLES[int(match[1], 16)]})", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    head = f'<svg role="img" aria-label="{escape(f"{plot.title}. {plot.caption}")}" '
    attributes = re.sub(r'<svg |\b(width|height)="[^"]*" ', "", svg[: svg.index(">")])
    return head + attributes + svg[svg.index(">") :]
