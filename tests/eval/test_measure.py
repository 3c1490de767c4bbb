"""What the measurements of parts share: they go on prompt by prompt, and average the latest rows."""

from __future__ import annotations

import statistics

from chunkcache.eval import Case, Results
from chunkcache.eval.measure import averages, grouped, measure_prompts, table

CASES = [Case("One?", ("a",)), Case("Two?", ("b",))]


def test_a_prompt_is_measured_again_if_one_of_its_rows_is_missing():
    rows = [{"prompt": 0, "way": way, "seconds": 1.0} for way in "xy"] + [{"prompt": 1, "way": "x", "seconds": 1.0}]
    results = Results("made", {}, {}, rows=rows)
    steps, measured = [], []

    def measure(number, case):
        measured.append((number, case.question))
        return [{"way": way, "seconds": 2.0} for way in "xy"]

    measure_prompts(results, CASES, 2, measure, lambda *step: steps.append(step))
    assert measured == [(1, "Two?")]
    assert steps == [(1, 2), (2, 2)]
    assert [row["seconds"] for row in grouped(results.rows, ["way"], "prompt")[("x",)]] == [1.0, 2.0]


def test_averages_are_over_the_rows_that_know_a_value():
    rows = [{"way": "x", "prompt": n, "kl": kl, "f1": None} for n, kl in enumerate((1.0, None, 3.0))]
    of = {"kl": statistics.mean, "f1": statistics.mean}
    assert averages(rows, ["way"], "prompt", of) == [{"way": "x", "prompts": 3, "kl": 2.0, "f1": None}]


def test_a_cell_has_no_negative_nought_and_says_what_is_unknown():
    columns = {"policy": "{policy}", "KL": "{kl:.3f}", "gain": "{gain:+.1f}", "share": "{share:.0%}"}
    rows = [
        {"policy": "-", "kl": -0.0001, "gain": -1.0, "share": None},
        {"policy": "query", "kl": -0.0006, "gain": 0.0, "share": -0.001},
    ]
    assert table("title", columns, rows) == {
        "title": "title",
        "columns": list(columns),
        "rows": [["-", "0.000", "-1.0", "n/a"], ["query", "-0.001", "+0.0", "0%"]],
    }
