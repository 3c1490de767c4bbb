"""A calibration comes back from its file, and a file that is not one is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model, wrapped

import chunkcache
from chunkcache.blend.guard import GuardModel
from chunkcache.blend.query import Look
from chunkcache.engine.calibration import Calibration, default_path, load_calibration
from chunkcache.errors import CalibrationError
from chunkcache.library.fingerprint import fingerprint

PRINT = "f" * 64
FOUND = Calibration(
    PRINT,
    0.3,
    GuardModel(((1.0, 0.5, -0.1), (0.2, 0.3, 0.4)), ((0.05, 1.5), (0.1, 1.0))),
    {"prompts": 12},
    0,
    Look(0.4, 0.6, 0.02, 512, 8),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "cache"))


def test_it_comes_back_from_its_place(tmp_path):
    assert load_calibration(PRINT) is None
    assert FOUND.save() == default_path(PRINT)
    assert load_calibration(PRINT) == FOUND
    assert FOUND.save(tmp_path / "deep" / "mine.json") == tmp_path / "deep" / "mine.json"
    assert load_calibration(PRINT, tmp_path / "deep" / "mine.json") == FOUND


def test_one_from_before_words_were_chosen_by_has_the_usual_number_of_them():
    place = FOUND.save()
    data = json.loads(place.read_text())
    del data["look"]["words"]
    place.write_text(json.dumps(data))
    found = load_calibration(PRINT)
    assert found == replace(FOUND, look=Look(0.4, 0.6, 0.02, 512, Look.words))


def test_parts_may_be_missing(tmp_path):
    part = Calibration(PRINT, alpha=0.2)
    assert load_calibration(PRINT, part.save(tmp_path / "part.json")) == part


def test_a_new_one_keeps_what_it_did_not_look_for():
    alpha = Calibration(PRINT, 0.7, None, {"prompts": 3, "cachecraft": 1})
    both = alpha.over(FOUND)
    assert (both.alpha, both.guard) == (0.7, FOUND.guard)
    assert both.report == {"prompts": 3, "cachecraft": 1}
    assert Calibration(PRINT).over(FOUND).alpha == 0.3
    assert Calibration(PRINT).over(FOUND).lead == 0
    assert Calibration(PRINT, lead=1024).over(FOUND).lead == 1024
    assert FOUND.over(None) == FOUND


def test_one_of_an_older_version_says_nothing_of_the_lead_in(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(damaged({})), encoding="utf-8")
    assert load_calibration(PRINT, path).lead is None


def test_a_query_policy_takes_the_lead_in_that_was_measured_unless_it_names_one():
    llm = wrapped()
    assert llm.resolve_policy("query").lead == 1024
    for lead in (0, 512):
        calibrated = wrapped(calibration=Calibration(llm.fingerprint, lead=lead))
        assert calibrated.resolve_policy("query").lead == lead
        assert calibrated.resolve_policy("query:lead=64").lead == 64
    assert calibrated.resolve_policy("query").neighbours()
    assert str(llm.resolve_policy("query")) == "query:ratio=auto,k=0,lead=1024"


def damaged(change):
    data = json.loads(json.dumps({"fingerprint": PRINT, "alpha": 0.3, "guard": None, "report": {}}))
    return {**data, **change}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[]", "is no calibration"),
        ("{", "is no calibration"),
        ('{"alpha": 1}', "is no calibration"),
        (damaged({"alpha": "0.3"}), "not a finite number"),
        (damaged({"lead": -5}), "a lead-in of -5 tokens"),
        (damaged({"alpha": float("nan")}), "not a finite number"),
        (damaged({"guard": {"weights": [[1, None]], "margins": [[0.1, 0]]}}), "not a finite number"),
        (damaged({"guard": {"weights": [[1]], "margins": []}}), "not complete"),
        (damaged({"guard": {"weights": [[1]], "margins": [[1]]}}), "not complete"),
        (damaged({"guard": {"weights": [[1]], "margins": [[1, 1]], "code": "x"}}), "is no calibration"),
        (damaged({"fingerprint": "0" * 64}), "another model"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, data, message):
    path = tmp_path / "bad.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(CalibrationError, match=message):
        load_calibration(PRINT, path)


def test_a_file_that_is_named_must_be_there(tmp_path):
    with pytest.raises(CalibrationError, match="nowhere"):
        load_calibration(PRINT, tmp_path / "nowhere.json")


@pytest.mark.parametrize("policy", ["cachecraft:alpha=auto", "query:guard=0.05"])
def test_a_policy_that_needs_one_says_so_before_any_work(policy):
    with pytest.raises(CalibrationError, match="run chunkcache calibrate"):
        wrapped(policy=policy)
    with pytest.raises(CalibrationError, match="run chunkcache calibrate"):
        wrapped().prefill(QUESTION, TEXTS, policy=policy)


def test_the_calibration_in_the_cache_folder_is_found():
    fingerprint = wrapped().fingerprint
    Calibration(fingerprint, 0.7, GuardModel(((99.0, 0.0, 0.0),) * 3, ((0.05, 0.0),))).save()
    llm = wrapped(policy="query:guard=0.05")
    assert llm.resolve_policy("cachecraft:alpha=auto").alpha == 0.7
    stats = llm.prefill(QUESTION, TEXTS).stats
    assert (stats.guard_passes, stats.guard_full) == (3, True)


def test_a_calibration_may_be_given(tmp_path):
    model, tokenizer = tiny_model(), chat_tokenizer()
    fingerprint = wrapped().fingerprint
    given = Calibration(fingerprint, 0.4)
    for calibration in (given, given.save(tmp_path / "given.json"), str(tmp_path / "given.json")):
        llm = chunkcache.wrap(model, tokenizer, calibration=calibration)
        assert llm.resolve_policy("cachecraft:alpha=auto").alpha == 0.4


def test_the_loading_controller_sets_the_ratio_from_earlier_requests():
    llm = wrapped()
    assert llm.resolve_policy("cacheblend:ratio=auto").ratio == 0.15
    llm.engine.tuning.controller.observe(prefill_s=1.0, computed=1000, load_s=0.5, loaded=1000)
    assert llm.resolve_policy("cacheblend:ratio=auto").ratio == pytest.approx(0.5)
    assert llm.prefill(QUESTION, TEXTS, policy="cacheblend:ratio=auto").stats.policy.startswith(
        "cacheblend:ratio=0.5"
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("weight", [-99.0, 99.0], ids=["accepted", "full"])
def test_all_ways_to_run_a_guarded_request_agree(name, weight):
    model = tiny_model(name)
    guard = GuardModel(((weight, 0.0, 0.0),) * 3, ((0.05, 0.0),))
    llm = chunkcache.wrap(
        model,
        chat_tokenizer(),
        policy="query:ratio=0.2,guard=0.05",
        calibration=Calibration(fingerprint(model, chat_tokenizer()), guard=guard),
    )
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = llm.generate(QUESTION, TEXTS, **options)
    assert expected.stats.guard_full == (weight > 0)
    first = int(llm.prefill(QUESTION, TEXTS).logits.argmax())
    inputs = llm.prepare_inputs(QUESTION, TEXTS)
    output = model.generate(**inputs, **options, pad_token_id=3)[0, inputs["input_ids"].shape[1] :].tolist()
    assert output == expected.token_ids
    assert first == expected.token_ids[0]
    assert llm.generate(QUESTION, TEXTS, num_beams=2, **options).stats.guard_full == (weight > 0)
