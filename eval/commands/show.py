"""The one printer of what was measured: tables, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from chunkcache.cli.console import out, table, wide
from chunkcache.eval.results import FULL

if TYPE_CHECKING:
    from chunkcache.eval import Results
    from chunkcache.eval.report.parts import Table
    from chunkcache.eval.report.sections import Section


def show_summary(summary: Mapping[str, Any], as_json: bool) -> None:
    """Print the tables and notes of a summary, or all of it as JSON."""
    from chunkcache.eval.report.parts import table_of

    if as_json:
        show_json(summary)
        return
    show_tables(map(table_of, summary["tables"]))
    for note in summary.get("notes", ()):
        out.print(note)


def show_report(results: Mapping[str, Results], against: str = FULL) -> None:
    """Print the tables of results as the report has them, policies compared with `against`, too."""
    from chunkcache.eval.report import build_report
    from chunkcache.eval.report.sections import views

    for view in views(build_report(results, against=against)):
        _show_section(view)


def show_overview(results: Mapping[str, Results]) -> None:
    """Print what several data sets come to together; nothing for one."""
    from chunkcache.eval.report import build_report
    from chunkcache.eval.report.sections import overview

    view = overview(build_report(results))
    if view is not None:
        _show_section(view)


def _show_section(view: Section) -> None:
    out.print(f"\n[bold]{escape(view.title)}[/]: {escape(view.lead)}")
    show_tables(view.tables)


def show_tables(tables: Iterable[Table]) -> None:
    """Print tables of a report."""
    for shown in tables:
        rows = [[escape(f"{cell.text} {cell.note}".strip()) for cell in row] for row in shown.rows]
        wide(table(shown.title, shown.columns, rows))


def show_json(value: Any) -> None:
    """Print one JSON object to stdout."""
    click.echo(json.dumps(value, indent=2))
