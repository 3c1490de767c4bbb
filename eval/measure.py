"""What the measurements of single parts share: first tokens on the clock, the loop that goes on, and their tables."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from chunkcache.engine.engine import PrefillOutput
from chunkcache.eval.data import Case
from chunkcache.eval.results import Results, Row
from chunkcache.llm import CachedLLM

OnStep = Callable[[int, int], None]  # called with (steps done, steps in all)
Average = Callable[[list[float]], float]


def warm_up_case(case: Case) -> Case:
    """Return a short prompt that is not measured, for kernels and allocators to settle on."""
    return Case("Is this only to warm up?", tuple(chunk[:200] for chunk in case.chunks[:2]))


def warm_up(llms: Iterable[CachedLLM], case: Case) -> None:
    """Prefill a short prompt with each."""
    for llm in llms:
        time_prefill(llm, warm_up_case(case))


def time_prefill(llm: CachedLLM, case: Case) -> tuple[float, PrefillOutput]:
    """Return the time to first token in seconds, and the prefill."""
    started = time.perf_counter()
    output = llm.prefill(case.question, case.chunks)
    int(output.logits.argmax())  # the first token id, on the host
    return time.perf_counter() - started, output


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_prompts(
    results: Results,
    cases: Sequence[Case],
    rows_each: int,
    measure: Callable[[int, Case], Iterable[Row]],
    on_step: OnStep | None = None,
) -> None:
    """Add the rows of each prompt: all `rows_each` of them where one is missing, so `grouped` takes the latest."""
    for number, case in enumerate(cases):
        if sum(row["prompt"] == number for row in results.rows) < rows_each:
            for row in measure(number, case):
                results.add({"prompt": number, **row})
        if on_step is not None:
            on_step(number + 1, len(cases))


def finite(value: float) -> float | None:
    """Return None for what JSON cannot hold: a divergence where full prefill rules a token out."""
    return value if math.isfinite(value) else None


def grouped(rows: Iterable[Row], by: Sequence[str], each: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return rows by the fields `by`, in the order that these came; of a group's rows with one `each`, the latest."""
    latest = {tuple(row[name] for name in (*by, each)): row for row in rows}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for values, row in latest.items():
        groups.setdefault(values[:-1], []).append(row)
    return groups


def averages(rows: Iterable[Row], by: Sequence[str], each: str, of: Mapping[str, Average]) -> list[Row]:
    """Return for each group of rows its fields `by`, how many rows it has, and averages over the rows that know them.

    Args:
        rows: of a measurement.
        by: fields in which the rows of a group agree.
        each: field that tells rows of a group apart; `<each>s` is how many there are.
        of: by its name, how a field is averaged; None where no row knows it.
    """
    averaged = []
    for values, group in grouped(rows, by, each).items():
        known = {name: [float(row[name]) for row in group if row[name] is not None] for name in of}
        numbers = {name: of[name](known[name]) if known[name] else None for name in of}
        averaged.append({**dict(zip(by, values, strict=True)), f"{each}s": len(group), **numbers})
    return averaged


def table(title: str, columns: Mapping[str, str], rows: Iterable[Row]) -> dict[str, Any]:
    """Return a table in plain values; `columns` has the format of a cell by the column's title, as `{ttft_s:.3f}`."""
    shown = [[_text(form, row) for form in columns.values()] for row in rows]
    return {"title": title, "columns": list(columns), "rows": shown}


def lines(title: str, x: str, y: str, caption: str, series: Sequence[Row], log: str = "") -> dict[str, Any]:
    """Return a plot of lines in plain values; `log` names the axes that are logarithmic, such as `xy`.

    A series is {name, policy: whose colour it has, or None, points: [[x, y], ...], simulated: whether it is dashed}.
    """
    axes = {"x": x, "y": y, "logx": "x" in log, "logy": "y" in log}
    return {"kind": "lines", "title": title, **axes, "caption": caption, "series": list(series)}


def _text(form: str, row: Row) -> str:
    try:
        text = form.format_map(row)
    except TypeError:  # None has no decimals
        return "n/a"
    return re.sub(r"^-(?=0[.0]*%?$)", "", text)  # no -0.000
