"""The loading controller's ratios, on times that can be worked out by hand."""

from __future__ import annotations

import pytest

from chunkcache.blend.loader import LEAST_DEPTH
from chunkcache.engine.tuning import LoadingController, choose_tier, free_ratio, preload_depth


@pytest.mark.parametrize(
    ("load_s", "ratio"), [(0.0, 0.15), (0.001, 0.15), (0.0015, 0.15), (0.004, 0.4), (0.01, 1.0), (0.5, 1.0)]
)
def test_the_ratio_recomputes_as_long_as_loading_takes(load_s, ratio):
    assert free_ratio(prefill_s=0.01, load_s=load_s) == pytest.approx(ratio)


def test_the_slowest_tier_that_is_hidden_is_chosen_else_the_fastest():
    assert choose_tier(0.01, {"memory": 0.0001, "disk": 0.0014, "redis": 0.004}) == ("disk", 0.15)
    assert choose_tier(0.01, {"disk": 0.003, "redis": 0.02}) == ("disk", pytest.approx(0.3))
    with pytest.raises(ValueError, match="no tiers"):
        choose_tier(0.01, {})


def test_it_goes_by_what_requests_took():
    controller = LoadingController()
    assert controller.ratio() == 0.15
    controller.observe(prefill_s=1.0, computed=1000, load_s=0.5, loaded=1000)
    assert controller.ratio() == pytest.approx(0.5)
    controller.observe(prefill_s=1.0, computed=1000, load_s=0.1, loaded=1000)
    assert controller.ratio() == pytest.approx(0.38)  # 0.7 x 0.5 + 0.3 x 0.1
    controller.observe(prefill_s=0.0, computed=0, load_s=0.0, loaded=0)
    assert controller.ratio() == pytest.approx(0.38)


@pytest.mark.parametrize(
    ("prefill_s", "load_s", "depth"),
    [
        (1.0, 0.0, LEAST_DEPTH),
        (1.0, 0.5, LEAST_DEPTH),
        (1.0, 1.0, LEAST_DEPTH),
        (1.0, 2.0, 16),
        (0.0, 1.0, 30),
        (1, 1e9, 30),
    ],
)
def test_the_depth_is_what_keeps_the_model_from_waiting(prefill_s, load_s, depth):
    assert preload_depth(30, prefill_s, load_s) == depth
