"""What several data sets come to together: their prompts, every policy on each, and where each policy is worst.

Data sets whose prompts hold passages twice stand apart from the others: what a policy does there, it does on a kind
of prompt that is seldom asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkcache.eval.report.parts import Cell, Table, number
from chunkcache.eval.report.requests import name_of, prompts_table
from chunkcache.eval.results import FULL, PEER

Section = dict[str, Any]
APART = 0.1  # share of repeated chunks from which on a data set stands apart
HIGHER_IS_BETTER = ("same_answer", "f1_diff", "holds_gold_diff")
MEASURES = {  # column, decimals, whether it is shown in percent
    "ttft_ratio": ("TTFT of full", 3, False),
    "kl_first": ("KL first", 4, False),
    "kl_mean": ("KL mean", 4, False),
    "same_answer": ("same answer", 1, True),
    "f1_diff": ("F1 − full", 3, False),
    "holds_gold_diff": ("holds gold − full", 3, False),
}


def compared(sections: Sequence[Section]) -> list[Section]:
    """Return the sections that an overview is of: requests at a number of chunks, where there are two or more."""
    found = [each for each in sections if each["bench"] == "requests" and not each["summary"].get("growth")]
    return found if len(found) > 1 else []


def worst_of(sections: Sequence[Section]) -> dict[str, dict[str, Any]]:
    """Return of each policy, by what is measured, the section where it is worst: {section, value: an interval}.

    The worst is the highest ratio of times or divergence, and the lowest share or difference of scores.
    """
    found: dict[str, dict[str, Any]] = {}
    for policy in _policies(sections):
        found[policy] = {}
        for measure in MEASURES:
            known = [(_value(each, policy, measure), each["name"]) for each in sections]
            there = [(value, name) for value, name in known if value is not None]
            if there:
                pick = min if measure in HIGHER_IS_BETTER else max
                value, name = pick(there, key=lambda item: item[0][0])
                found[policy][measure] = {"section": name, "value": value}
    return found


def is_apart(section: Section) -> bool:
    """Return whether passages stand twice in the prompts of a section."""
    return (section["summary"]["data"]["repeated_chunks"] or 0) >= APART


def worst_by_kind(sections: Sequence[Section]) -> dict[str, Any] | None:
    """Return `worst_of` the `data_sets`, and of those that stand `apart`; None where there is nothing to compare."""
    there = compared(sections)
    if not there:
        return None
    apart = [each for each in there if is_apart(each)]
    return {"data_sets": worst_of([each for each in there if each not in apart]), "apart": worst_of(apart)}


def overview_tables(report: dict[str, Any]) -> list[Table]:
    """Return the tables over all data sets of a report; none where it has one data set, or is an older one."""
    worst = report.get("worst")
    if worst is None:
        return []
    sections = compared(report["sections"])
    kinds = {
        "": ([each for each in sections if not is_apart(each)], worst["data_sets"]),
        ", prompts with repeated chunks": ([each for each in sections if is_apart(each)], worst["apart"]),
    }
    tables = [prompts_table("Prompts of each data set", sections)]
    for suffix, (kind, found) in kinds.items():
        if kind:
            tables += [_by_section(measure, kind, suffix) for measure in MEASURES if _is_known(measure, kind)]
            tables.append(_worst(found, suffix))
    return tables


def _policies(sections: Sequence[Section]) -> list[str]:
    names = dict.fromkeys(policy for section in sections for policy in section["summary"]["policies"])
    return sorted((name for name in names if name != FULL), key=lambda name: name.startswith(PEER))


def _value(section: Section, policy: str, measure: str) -> Sequence[float] | None:
    each = section["summary"]["policies"].get(policy)
    return None if each is None else each[measure]


def _is_known(measure: str, sections: Sequence[Section]) -> bool:
    return any(_value(each, policy, measure) is not None for each in sections for policy in _policies(sections))


def _by_section(measure: str, sections: Sequence[Section], suffix: str) -> Table:
    column, digits, percent = MEASURES[measure]
    rows = [
        [Cell(name_of(policy)), *(number(_value(each, policy, measure), digits, percent) for each in sections)]
        for policy in _policies(sections)
    ]
    return Table(f"{column} by data set{suffix}", ["policy", *(each["name"] for each in sections)], rows)


def _worst(found: dict[str, dict[str, Any]], suffix: str) -> Table:
    rows = []
    for policy, measured in found.items():
        cells = [Cell(name_of(policy))]
        for measure, (_, digits, percent) in MEASURES.items():
            told = measured.get(measure)
            value = number(told and told["value"], digits, percent)
            cells.append(value if told is None else Cell(value.text, value.number, told["section"]))
        rows.append(cells)
    known = [0, *(at for at in range(1, len(MEASURES) + 1) if any(row[at].known for row in rows))]
    columns = ["policy", *(column for column, _, _ in MEASURES.values())]
    return Table(
        f"Worst data set of each policy{suffix}",
        [columns[at] for at in known],
        [[row[at] for at in known] for row in rows],
        "The data set with the longest time or largest divergence, or the lowest share or difference of scores.",
    )
