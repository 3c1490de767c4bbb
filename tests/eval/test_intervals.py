"""Intervals hold the true figure about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from chunkcache.eval.intervals import interval, paired, ratio_of_means


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_about_95_of_100_intervals_hold_the_true_value(statistic):
    draw = np.random.default_rng(1)
    found = [interval(draw.normal(3, 1, 40), statistic, seed) for seed in range(200)]
    held = sum(each.low <= 3 <= each.high for each in found)
    assert 0.88 <= held / len(found) <= 0.99
    assert all(each.low <= each.value <= each.high for each in found)


def test_more_values_say_more():
    draw = np.random.default_rng(1)
    few, many = (interval(draw.normal(0, 1, count)) for count in (10, 1000))
    assert many.high - many.low < (few.high - few.low) / 3


def test_pairs_take_out_what_both_share():
    draw = np.random.default_rng(1)
    base = draw.normal(0, 100, 30)
    found = paired(list(base + 1 + draw.normal(0, 0.1, 30)), list(base))
    assert 0.9 < found.low < 1 < found.high < 1.1


@pytest.mark.parametrize("values", [[2.0], [1.0, 3.0], [1.0, 1.0, 2.0, 9.0, 9.0], [2.0] * 50])
def test_where_nothing_can_be_said_an_interval_has_no_width(values):
    assert interval(values) == (2, 2, 2)


def test_values_that_are_nearly_all_alike_have_an_interval():
    found = interval([0.0] * 30 + [1.0], "median")
    assert found.value == 0
    assert 0 <= found.low <= found.high <= 1


def test_the_same_values_give_the_same_interval():
    values = list(np.random.default_rng(3).exponential(1, 25))
    assert interval(values) == interval(values)


def test_pairs_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="argument"):
        paired([1.0], [1.0, 2.0])


def test_about_95_of_100_intervals_hold_the_true_ratio_of_means():
    draw = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        theirs = draw.exponential(2, 40)
        low, high = ratio_of_means(list(theirs * draw.uniform(0, 1, 40)), list(theirs), seed)[1:]
        held += low <= 0.5 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_a_ratio_of_means_is_no_mean_of_ratios_and_pairs_take_out_what_both_share():
    theirs = [1.0, 2.0, 3.0, 50.0, 5.0, 6.0, 7.0]
    assert ratio_of_means([1, 1], [1, 3]) == (0.5, 0.5, 0.5)
    assert ratio_of_means([value / 2 for value in theirs], theirs) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_to_nothing_is_unknown():
    assert ratio_of_means([1.0, 2.0], [0.0, 0.0]) is None
    assert ratio_of_means([], []) is None
    assert ratio_of_means([1.0] * 6, [0.0] * 5 + [6.0]) == (1, 1, 1)  # a draw may have nothing but zeros
