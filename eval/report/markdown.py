"""The report as GitHub flavoured Markdown: all its tables; plots are in the HTML file."""

from __future__ import annotations

import re
from typing import Any

from chunkcache.eval.report.parts import Cell, Table
from chunkcache.eval.report.sections import Section, facts, views


def as_markdown(report: dict[str, Any], html: str) -> str:
    """Return the report as Markdown; `html` is the name of the file that has the plots."""
    command = report["command"]
    blocks = ["# Benchmark report", _facts(facts(report)), f"```sh\n{command}\n```" if command else ""]
    for view in views(report):
        blocks += [f"## {md_text(view.title)}", md_text(view.lead), _facts(view.facts)]
        for table in view.tables:
            blocks += [f"### {md_text(table.title)}", md_table(table), md_text(table.note)]
        blocks.append(_plots(view, html))
    return "\n\n".join(block for block in blocks if block) + "\n"


def md_table(table: Table) -> str:
    """Return a table in Markdown, numbers to the right."""
    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [
        [md_text(column) for column in table.columns],
        rules,
        *([_cell(cell) for cell in row] for row in table.rows),
    ]
    if table.columns[0] in ("policy", "peer"):
        rows[2:] = [[_named(cells[0].text), *row[1:]] for cells, row in zip(table.rows, rows[2:], strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def md_text(text: str) -> str:
    """Return text as Markdown that shows it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def md_code(text: str) -> str:
    """Return text as Markdown code."""
    return f"`{' '.join(text.split()).replace('`', '´').replace('|', '¦')}`"


def _named(policy: str) -> str:
    name, peer, _ = policy.partition(" (peer)")
    return md_code(name) + peer


def _cell(cell: Cell) -> str:
    return md_text(f"{cell.text} {cell.note}".strip())


def _facts(pairs: dict[str, str]) -> str:
    return "\n".join(f"- {md_text(name)}: {md_text(value)}" for name, value in pairs.items())


def _plots(view: Section, html: str) -> str:
    titles = [plot.title for plot in view.plots] + (["Which tokens were recomputed"] if view.heat else [])
    return f"In [{md_text(html)}]({html}): {', '.join(titles)}." if titles else ""
