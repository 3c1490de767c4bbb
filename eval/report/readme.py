"""The README's tables of measured results, made from a report, between two marks."""

from __future__ import annotations

from typing import Any

from chunkcache.errors import ResultsError
from chunkcache.eval.report.markdown import md_code, md_table
from chunkcache.eval.report.parts import Cell, Table, number
from chunkcache.eval.report.requests import any_later, by_policy, growth_table, name_of, token_range
from chunkcache.eval.report.sections import machine_line

BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"


def readme_tables(report: dict[str, Any], first: int | None = None) -> str:
    """Return the Markdown tables of the `requests` sections: one for each data set and number of chunks.

    Args:
        report: as read.
        first: how many of them; None for all.

    Raises:
        ResultsError: the report has no such section.
    """
    sections = [section for section in report["sections"] if section["bench"] == "requests"]
    if not sections:
        raise ResultsError("the report has no results of `bench ttft` or `bench quality` to make tables of")
    shown: list[str] = []
    machine = ""
    for section in sections[:first]:
        if machine_line(section) != machine:  # said once for all tables that it holds for
            machine = machine_line(section)
            shown.append(machine)
        shown += [_heading(section), md_table(growth_table(section) if _grows(section) else _table(section))]
    return "\n\n".join(shown)


def replace_between(text: str, tables: str) -> str:
    """Return `text` with `tables` between its two marks.

    Raises:
        ResultsError: there is not exactly one line of each mark, the beginning first.
    """
    lines = text.split("\n")
    if lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        raise ResultsError(f"the file needs one line {BEGIN} and below it one line {END}: tables go between them")
    return "\n".join([*lines[: lines.index(BEGIN) + 1], "", tables, "", *lines[lines.index(END) :]])


def _grows(section: dict[str, Any]) -> bool:
    return bool(section["summary"].get("growth"))


def _heading(section: dict[str, Any]) -> str:
    settings, summary = section["settings"], section["summary"]
    what = "context lengths" if _grows(section) else f"{settings['chunks']} chunks"
    prompts = f"{summary['prompts']} prompts of {token_range(summary)}"
    return f"{md_code(settings['data'])}, {what}, {prompts}:"


def _table(section: dict[str, Any]) -> Table:
    later = any_later(section["summary"])
    rows = [
        [
            Cell(name_of(policy)),
            number(each["ttft_s"][0]),
            number(each["ttft_ratio"]),
            number(each["ttft_p90"]),
            number(each["recomputed_share"], 1, percent=True),
            *([number(each.get("later_s"))] if later else []),
            *(number(each[name] and each[name][0], 4) for name in ("kl_first", "kl_mean")),
            number(each["agreement"] and each["agreement"][0], 1, percent=True),
            *(number(each[name] and each[name][0]) for name in ("f1", "em")),
        ]
        for policy, each in by_policy(section["summary"]).items()
    ]
    columns = ["policy", "TTFT, s", "of full (95 % interval)", "p90, s", "recomputed"]
    columns += ["then, s"] if later else []
    return Table("", [*columns, "KL first", "KL mean", "agreement", "F1", "EM"], rows)
