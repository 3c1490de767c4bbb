"""Scores of short answers, by hand."""

from __future__ import annotations

import pytest

from chunkcache.eval.answers import f1, holds_gold, rouge_l


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


@pytest.mark.parametrize(
    ("answer", "accepted", "held"),
    [
        ("It was the Eiffel Tower, of course.", ["eiffel tower"], 1),
        ("The tower of Eiffel", ["eiffel tower"], 0),  # the words, in another order
        ("The Eiffel iron tower", ["Eiffel Tower"], 0),  # not one behind the other
        ("in 19310", ["1931"], 0),  # whole words
        ("no", ["yes", "No."], 1),
        ("anything", ["the"], 0),  # nothing is left of it
        ("", ["x"], 0),
        ("anything", [], 0),
    ],
)
def test_holds_gold(answer, accepted, held):
    assert holds_gold(answer, accepted) == held
