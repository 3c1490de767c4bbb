"""A calibration on a tiny model: what it reports is what it measured."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.errors import PolicyError
from chunkcache.eval import Case
from chunkcache.eval.calibrate import ALPHAS, BOUNDS, calibrate

QUESTIONS = [QUESTION, "Who wrote down the weather?", "When does the ferry sail?", "What is yesterday's?"]
CASES = [Case(f"{question} {n}", TEXTS[n:] + TEXTS[:n]) for question in QUESTIONS for n in range(3)]


@pytest.fixture(scope="module")
def found():
    steps = []
    calibration = calibrate(tiny_model(), chat_tokenizer(), CASES, on_step=lambda *step: steps.append(step))
    assert steps == [(n + 1, len(CASES)) for n in range(len(CASES))]
    return calibration


def test_the_least_alpha_that_reaches_the_target_is_chosen(found):
    craft = found.report["cachecraft"]
    assert [row["alpha"] for row in craft["tried"]] == list(ALPHAS)
    shares = [row["recomputed_share"] for row in craft["tried"]]
    assert shares == sorted(shares)
    good = [
        row["alpha"]
        for row in craft["tried"]
        if row["kl_first"] <= craft["target_kl_first"] and row["kl_mean"] <= craft["target_kl_mean"]
    ]
    assert craft["met"] == bool(good)
    assert found.alpha == (min(good) if good else max(ALPHAS))


def test_the_guard_is_reported_for_every_bound(found):
    assert [row["bound"] for row in found.report["guard"]] == list(BOUNDS)
    assert len(found.guard.weights) == 3
    for row in found.report["guard"]:
        assert 0 <= row["broken"] <= 1
        assert 1 <= row["passes"] <= 3


def test_a_guard_is_fitted_to_chunks_behind_their_nearest():
    found = [
        calibrate(tiny_model(), chat_tokenizer(), CASES[:4], guarded=guarded, parts=("guard",))
        for guarded in ("query:ratio=0.1,guard=0.05", "query:ratio=0.1@neighbours")
    ]
    assert found[1].report["guarded"].endswith("@neighbours")
    assert "guard=0" not in found[0].report["guarded"]  # the bound is the request's
    assert found[0].report["climbed"] != found[1].report["climbed"]


def test_only_a_query_policy_is_guarded():
    with pytest.raises(PolicyError, match="'link' is none"):
        calibrate(tiny_model(), chat_tokenizer(), CASES, guarded="link")
