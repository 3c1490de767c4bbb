"""The loading controller's choices, on times that can be worked out by hand."""

from __future__ import annotations

import pytest

from chunkcache.blend.controller import LoadingController, choose_ratio, choose_tier


@pytest.mark.parametrize(
    ("load_s", "ratio"), [(0.0, 0.15), (0.001, 0.15), (0.0015, 0.15), (0.004, 0.4), (0.01, 1.0), (0.5, 1.0)]
)
def test_the_ratio_recomputes_as_long_as_loading_takes(load_s, ratio):
    assert choose_ratio(prefill_s=0.01, load_s=load_s).ratio == pytest.approx(ratio)


def test_the_reason_names_the_times():
    choice = choose_ratio(prefill_s=0.01, load_s=0.004)
    assert (
        choice.why
        == "a layer takes 4.00 ms to load and 10.00 ms to prefill: 40% are recomputed in the time that loading takes"
    )
    assert "hidden behind the least ratio, 20%" in choose_ratio(0.01, 0.001, least=0.2).why


def test_the_slowest_tier_that_is_hidden_is_chosen():
    tiers = {"memory": 0.0001, "disk": 0.0014, "redis": 0.004}
    choice = choose_tier(0.01, tiers)
    assert (choice.tier, choice.ratio) == ("disk", 0.15)
    assert choice.why.startswith("disk is the slowest that is hidden; a layer takes 1.40 ms")


def test_where_no_tier_is_hidden_it_is_the_fastest_and_more_is_recomputed():
    choice = choose_tier(0.01, {"disk": 0.003, "redis": 0.02})
    assert (choice.tier, choice.ratio) == ("disk", pytest.approx(0.3))
    with pytest.raises(ValueError, match="no tiers"):
        choose_tier(0.01, {})


def test_it_chooses_from_what_requests_took():
    controller = LoadingController()
    assert controller.choose(100).ratio == 0.15
    assert controller.last.why == "nothing has been measured yet"
    controller.observe(prefill_s=1.0, computed=1000, load_s=0.5, loaded=1000)
    assert controller.choose(100).ratio == pytest.approx(0.5)
    controller.observe(prefill_s=1.0, computed=1000, load_s=0.1, loaded=1000)
    assert controller.choose(100).ratio == pytest.approx(0.38)  # 0.7 x 0.5 + 0.3 x 0.1
    controller.observe(prefill_s=0.0, computed=0, load_s=0.0, loaded=0)
    assert controller.choose(100).ratio == pytest.approx(0.38)
