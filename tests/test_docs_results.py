"""The README's figures are those of the report in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkcache.errors import ResultsError
from chunkcache.eval.report import read_report, readme_tables, replace_between

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = ROOT / "docs/results/report.json"


def test_the_readme_has_the_tables_of_the_report():
    assert replace_between(README, readme_tables(read_report(REPORT))) == README, (
        "run: chunkcache bench table docs/results/report.json --into README.md"
    )


def test_a_figure_that_was_changed_by_hand_is_found():
    tables = readme_tables(read_report(REPORT))
    figure = next(word for word in tables.split() if word.count(".") == 1 and word.replace(".", "").isdigit())
    assert replace_between(README.replace(figure, "0.123456"), tables) == README


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json"])
def test_the_report_holds_no_texts_of_data_sets(name):
    text = (REPORT.parent / name).read_text(encoding="utf-8")
    assert '"question":' not in text
    assert "/work/" not in text
    assert "/tmp/" not in text


def test_every_section_says_what_it_ran_on():
    for section in read_report(REPORT)["sections"]:
        assert {"model", "device", "threads", "torch", "transformers", "commit"} <= section["ran_on"].keys()
        assert not section["ran_on"]["commit"].endswith("+"), "measured on code that is in no commit"


def test_a_readme_without_marks_is_an_error():
    with pytest.raises(ResultsError, match="results:begin"):
        replace_between("no marks", "tables")
