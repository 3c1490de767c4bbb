"""The `chunkcache bench` commands that show what was measured: a report, and the README's tables."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from chunkcache.cli.console import err
from chunkcache.errors import ResultsError


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--out",
    "html",
    type=click.Path(path_type=Path),
    help="HTML file; DIR/report.html by default. The rest beside it.",
)
@click.option("--without-texts", is_flag=True, help="Leave out the texts of data sets; numbers stay.")
@click.option("--command", help="What was run, to be shown in the report's head.")
def bench_report(folder: Path, html: Path | None, without_texts: bool, command: str | None) -> None:
    """Make report.html, report.md and report.json of all results in DIR."""
    from chunkcache.eval.report import build_report, write_report
    from chunkcache.eval.results import read_folder

    html = html or folder / "report.html"
    if html.suffix != ".html":
        raise ResultsError(f"--out {html} is no HTML file: name it {html.with_suffix('.html')}")
    results = read_folder(folder)
    for name, found in results.items():
        if not found.rows:
            err.print(f"[yellow]left out: {escape(name)} has no rows yet[/]")
    for path in write_report(build_report(results, texts=not without_texts, command=command), html):
        click.echo(path)


@click.command("table")
@click.argument("report", metavar="REPORT.json", type=click.Path(path_type=Path))
@click.option(
    "--into", "readme", required=True, type=click.Path(path_type=Path), help="Markdown file with the marks."
)
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if the file says something else.")
@click.pass_context
def bench_table(context: click.Context, report: Path, readme: Path, check: bool) -> None:
    """Write tables of REPORT.json into a file, between its lines <!-- results:begin --> and <!-- results:end -->."""
    from chunkcache.eval.report import read_report, readme_tables, replace_between

    try:
        there = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{readme} cannot be read: {error}") from None
    wanted = replace_between(there, readme_tables(read_report(report)))
    if not check:
        readme.write_text(wanted, encoding="utf-8")
    elif wanted != there:
        err.print(
            f"[red]{escape(str(readme))} disagrees with {escape(str(report))}:[/] "
            f"run `chunkcache bench table {escape(str(report))} --into {escape(str(readme))}`"
        )
        context.exit(1)
