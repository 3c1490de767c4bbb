"""The README's figures are those of the report in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkcache.errors import ResultsError
from chunkcache.eval.report import read_report, readme_tables, replace_between, write_report

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = ROOT / "docs/results/neighbours.json"
REPORTS = (SHOWN, ROOT / "docs/results/report.json")
each_report = pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)


def test_the_readme_has_the_tables_of_the_report():
    assert replace_between(README, readme_tables(read_report(SHOWN))) == README, (
        "run: chunkcache bench table docs/results/neighbours.json --into README.md"
    )


def test_a_figure_that_was_changed_by_hand_is_found(command_line, tmp_path):
    changed = tmp_path / "README.md"
    row = next(line for line in README.splitlines() if line.startswith("| `query:later=0.2@neighbours` |"))
    changed.write_text(README.replace(row, row.replace("0", "9")), encoding="utf-8")
    code, _, err = command_line("bench", "table", str(SHOWN), "--into", str(changed), "--check")
    assert code == 1
    assert "disagrees" in err
    assert command_line("bench", "table", str(SHOWN), "--into", str(changed))[0] == 0
    assert changed.read_text(encoding="utf-8") == README


@each_report
def test_a_report_holds_no_texts_of_data_sets(path):
    for section in read_report(path)["sections"]:
        for worst in section["summary"].get("worst", []):
            assert not {"question", "answer", "full_answer"} & worst.keys()
        assert not any({"question", "answer"} & row.keys() for row in section.get("rows", []))
    assert not list(path.parent.glob("*.jsonl"))  # rows have the texts


@each_report
def test_every_section_says_what_it_ran_on(path):
    for section in read_report(path)["sections"]:
        if section["bench"] == "simulation":
            continue
        assert {"model", "device", "threads", "torch", "transformers", "commit"} <= section["ran_on"].keys()
        assert not section["ran_on"]["commit"].endswith("+"), "measured on code that is in no commit"


@each_report
def test_the_page_is_made_of_the_report_and_the_tables_are_those_of_the_repository(path, tmp_path):
    html, markdown, plain = write_report(read_report(path), tmp_path / f"{path.stem}.html")
    assert html.stat().st_size > 100_000
    assert markdown.read_text(encoding="utf-8") == path.with_suffix(".md").read_text(encoding="utf-8")
    assert plain.read_bytes() == path.read_bytes()


def test_a_readme_without_marks_is_an_error():
    with pytest.raises(ResultsError, match="results:begin"):
        replace_between("no marks", "tables")
