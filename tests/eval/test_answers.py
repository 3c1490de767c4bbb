"""F1 and ROUGE-L of short answers, by hand."""

from __future__ import annotations

import pytest

from chunkcache.eval.answers import f1, rouge_l


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1),
        ("It is the Eiffel Tower", ["eiffel tower"], 2 * 2 / (4 + 2)),
        ("in 1931", ["1931", "the year 1931"], 2 / 3),
        ("no", ["yes"], 0),
        ("the", ["a"], 1),  # nothing left of either
        ("", ["x"], 0),
        ("b b b", ["b"], 0.5),
    ],
)
def test_f1(answer, accepted, score):
    assert f1(answer, accepted) == pytest.approx(score)


def test_rouge_l():
    assert rouge_l("the bridge was opened in 1931", ["the bridge was opened in 1931"]) == 1
    assert rouge_l("opened was the bridge", ["the bridge"]) == pytest.approx(2 * 2 / (4 + 2))
    assert rouge_l("a", ["b", "a"]) == 1
