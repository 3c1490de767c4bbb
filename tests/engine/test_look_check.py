"""How `query` looks is measured on packaged documents, and taken by every wrapper of the model."""

from __future__ import annotations

import pytest
import zoo
from support.llm import VOCAB, wrapped

from chunkcache.blend.query import Look
from chunkcache.engine import packaged as documents
from chunkcache.engine.calibration import Calibration
from chunkcache.engine.look_check import BANDS, SHARES, best_band, check_look, most_of, worth_it
from chunkcache.engine.packaged import Moved, packaged


def test_every_choice_is_by_what_was_measured(monkeypatch):
    monkeypatch.setattr(documents, "CHARACTERS", 80)
    model = zoo.new("llama", vocab_size=VOCAB, max_position_embeddings=4096)
    llm = wrapped(model, lead_in="Some words that stand before a chunk. " * 3)
    asked = packaged(llm.engine.decoder, llm.prompts)
    steps = []
    found = check_look(llm.engine.decoder, asked, True, lambda *step: steps.append(step))
    assert steps[-1] == (len(BANDS) + len(SHARES) + 3, len(BANDS) + len(SHARES) + 3)
    shares = {float(share): kl for share, kl in found.shares.items()}
    assert list(shares) == [0, *SHARES]
    assert min(shares.values()) > 0
    assert len(set(shares.values())) > 1
    assert (found.look.first, found.look.last) in BANDS
    assert found.look.most == most_of(shares, found.target)
    assert found.look.least == worth_it(found.look_s, found.token_s)
    assert found.words not in (0.0, *shares.values())
    assert found.look.words == (Look.words if found.words < shares[0] else 0)


def test_the_usual_layers_are_left_only_for_surely_better_ones():
    usual = [Moved(kl, 2, 0) for kl in (1.0, 2.0, 3.0, 2.0)]
    noise = [Moved(kl, 2, 0) for kl in (0.1, 3.0, 1.0, 3.0)]
    better = [Moved(kl - 0.5, 2, 0) for kl in (1.0, 2.1, 3.0, 2.1)]
    assert best_band([usual, noise, usual]) == 0
    assert best_band([usual, noise, better]) == 2
    assert best_band([usual, better, noise]) == 1


def test_the_least_share_that_reaches_the_target_is_chosen_else_the_best():
    shares = {0.0: 0.01, 0.0125: 0.05, 0.03: 0.04, 0.06: 0.045}
    assert most_of(shares, 0.05) == 0.0125
    assert most_of(shares, 0.045) == 0.03
    assert most_of(shares, 0.02) == 0.03


def test_a_look_may_take_a_two_hundredth_of_full_prefill():
    assert worth_it(look_s=0.1, token_s=0.01) == 2048
    assert worth_it(look_s=0.1025, token_s=0.01) == 2304
    assert worth_it(look_s=0.0, token_s=1.0) == 256
    assert worth_it(look_s=1.0, token_s=0.0001) == 16384


def test_a_query_policy_looks_as_was_measured_unless_it_says_otherwise():
    llm = wrapped()
    look = Look(2 / 3, 5 / 6, 0.03, 512)
    calibrated = wrapped(calibration=Calibration(llm.fingerprint, look=look))
    assert calibrated.resolve_policy("query").look == look
    assert calibrated.resolve_policy("query:most=0.2,least=7").look == Look(2 / 3, 5 / 6, 0.2, 7)
    assert calibrated.resolve_policy("query:ratio=0.1").layers == ()  # those in the middle
    assert calibrated.resolve_policy("query:layers=0,0.5").look == Look(0, 0.5, 0.03, 512)
    assert llm.resolve_policy("query").look == Look() == Look(1 / 6, 1 / 3, 0.03, 8192, 24)
    calibrated = wrapped(calibration=Calibration(llm.fingerprint, look=Look(words=0)))
    assert calibrated.resolve_policy("query").look.words == 0
    assert calibrated.resolve_policy("query:words=8").look.words == 8


def test_a_query_policy_takes_the_window_of_the_model_unless_it_names_one():
    assert wrapped().resolve_policy("query").window is None  # all layers see all
    llm = wrapped(zoo.new("gemma3", vocab_size=VOCAB))
    assert llm.resolve_policy("query").window == zoo.WINDOW
    assert llm.resolve_policy("query:window=7").window == 7
    assert llm.resolve_policy("query:window=0").window == 0


@pytest.mark.parametrize("lead", [None, 0])
def test_a_guard_is_kept_only_with_the_settings_that_it_was_fitted_to(lead):
    told = {"prompts": 12, "guarded": "query", "guard": [], "climbed": []}
    fitted = Calibration("f" * 64, guard=object(), report=told, lead=lead, look=Look())
    assert Calibration("f" * 64, alpha=0.3).over(fitted).report == told
    assert Calibration("f" * 64, lead=1024).over(fitted).report == {"prompts": 12}
    assert Calibration("f" * 64, alpha=0.3).over(fitted).guard is fitted.guard
    assert Calibration("f" * 64, look=Look()).over(fitted).guard is fitted.guard
    assert Calibration("f" * 64, look=Look(most=0.02)).over(fitted).guard is None
    assert Calibration("f" * 64, lead=1024).over(fitted).guard is None
