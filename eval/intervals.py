"""Bootstrap confidence intervals, by scipy: how far a figure may be off, given the prompts that it is from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from chunkcache.errors import missing_extra

RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST = 6  # values that an interval needs
_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}


class Interval(NamedTuple):
    """A figure, and the 95 % confidence interval that it lies in."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float], statistic: str = "median", seed: int = 0) -> Interval:
    """Return the `median` or `mean` of some values with its confidence interval.

    BCa for a mean, percentiles for a median. Of fewer than six values nothing can be said: low and high are the
    figure itself.

    Raises:
        InputError: scipy is not installed.
    """
    data = np.asarray(values, dtype=float)
    value = float(_STATISTICS[statistic](data))
    if len(data) < LEAST or np.ptp(data) == 0:
        return Interval(value, value, value)
    low, high = _bootstrap(data, statistic, "BCa" if statistic == "mean" else "percentile", seed)
    if not np.isfinite([low, high]).all():  # BCa knows no answer where nearly all values are alike
        low, high = _bootstrap(data, statistic, "percentile", seed)
    return Interval(value, low, high)


def paired(ours: Sequence[float], theirs: Sequence[float], statistic: str = "mean", seed: int = 0) -> Interval:
    """Return the `statistic` of the differences `ours - theirs`, pair by pair, with its confidence interval."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], statistic, seed)


def ratio_of_means(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval | None:
    """Return the mean of `ours` over that of `theirs`, with the interval of drawing pairs; None where theirs is 0.

    Percentiles: BCa says nothing where a draw's denominator comes near 0. Of fewer than six pairs nothing can be
    said, nor where a draw has nothing but zeros below: low and high are the figure itself.

    Raises:
        ValueError: there are not as many of each.
    """
    pairs = np.array(list(zip(ours, theirs, strict=True)), dtype=float).reshape(-1, 2)
    if not len(pairs) or pairs[:, 1].mean() == 0:
        return None
    value = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    if len(pairs) < LEAST or (pairs == pairs[0]).all():
        return Interval(value, value, value)
    rng = np.random.default_rng(seed)
    means = pairs[rng.integers(len(pairs), size=(RESAMPLES, len(pairs)))].mean(1)
    if (means[:, 1] == 0).any():
        return Interval(value, value, value)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means[:, 0] / means[:, 1], [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def _bootstrap(data: Any, statistic: str, method: str, seed: int) -> tuple[float, float]:
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise missing_extra("eval", "a confidence interval", error) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where BCa is undefined it warns and returns NaN, which the caller sees
        found = bootstrap(
            (data,), _STATISTICS[statistic], n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method=method,
            rng=np.random.default_rng(seed), vectorized=True,
        ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
