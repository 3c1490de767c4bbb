"""The `chunkcache bench` commands that show what was measured: a report, and the README's tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
from rich.markup import escape

from chunkcache.cli.console import err
from chunkcache.errors import ResultsError
from chunkcache.eval.commands.options import Against, argument, command, count, option
from chunkcache.eval.results import FULL


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """A report of a folder of results."""

    source: Annotated[Path, argument(metavar="DIR")]
    html: Annotated[
        Path | None, option("--out", help="HTML file; DIR/report.html by default. The rest beside it.")
    ] = None
    without_texts: Annotated[bool, option(help="Leave out the texts of data sets; numbers stay.")] = False
    command: Annotated[str | None, option(help="What was run, to be shown in the report's head.")] = None
    against: Against = FULL


@command("report")
def bench_report(options: ReportOptions) -> None:
    """Make report.html, report.md and report.json of all results in DIR, or of a report.json again."""
    from chunkcache.eval.report import build_report, read_report, write_report
    from chunkcache.eval.results import read_folder

    source = options.source
    html = options.html or (source.with_suffix(".html") if source.is_file() else source / "report.html")
    if html.suffix != ".html":
        raise ResultsError(f"--out {html} is no HTML file: name it {html.with_suffix('.html')}")
    if source.is_file():
        report = read_report(source)
    else:
        results = read_folder(source)
        for name, measured in results.items():
            if not measured.rows:
                err.print(f"[yellow]left out: {escape(name)} has no rows yet[/]")
        report = build_report(
            results, texts=not options.without_texts, command=options.command, against=options.against
        )
    for path in write_report(report, html):
        click.echo(path)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Tables of a report in another file."""

    report: Annotated[Path, argument(metavar="REPORT.json")]
    readme: Annotated[Path, option("--into", help="Markdown file with the marks.")]
    first: Annotated[int | None, count("So many tables only.")] = None
    check: Annotated[bool, option(help="Change nothing; exit with 1 if the file says something else.")] = False


@command("table")
def bench_table(options: TableOptions) -> None:
    """Write tables of REPORT.json into a file, between its lines <!-- results:begin --> and <!-- results:end -->."""
    from chunkcache.eval.report import read_report, readme_tables, replace_between

    report, readme = options.report, options.readme
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{readme} cannot be read: {error}") from None
    wanted = replace_between(text, readme_tables(read_report(report), options.first))
    if not options.check:
        readme.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        first = "" if options.first is None else f" --first {options.first}"
        err.print(
            f"[red]{escape(str(readme))} disagrees with {escape(str(report))}:[/] "
            f"run `chunkcache bench table {escape(str(report))} --into {escape(str(readme))}{first}`"
        )
        click.get_current_context().exit(1)
