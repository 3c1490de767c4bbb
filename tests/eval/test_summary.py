"""A summary is what its rows come to, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from chunkcache.eval.compare import Row
from chunkcache.eval.results import Results
from chunkcache.eval.summary import fit_exponent, summary

STAGES = {"recompute": 0.75, "other": 0.25}


def row(prompt, policy, ttft_s, turn=0, **fields):
    about = {
        "chunks": 2,
        "tokens": 100 + prompt,
        "stages": {name: part * (ttft_s or 0) for name, part in STAGES.items()},
    }
    return asdict(Row(prompt=prompt, round=turn, policy=policy, ttft_s=ttft_s, fallbacks=0, **{**about, **fields}))


def results(rows, peers=(), tokens=None):
    told = {name: {"versions": {"x": "1"}, "settings": {"threads": 2}} for name in peers}
    settings = {"policies": ["full", "query"], "peers": told, "tokens": tokens}
    return Results("requests", settings, {}, rows)


def judged(f1, kl=0.0, answer="a"):
    return {"f1": f1, "em": 0.0, "rouge_l": f1, "holds_gold": float(f1 > 0), "kl_first": kl, "kl_mean": kl / 2,
            "agreement": 1.0, "same_answer": True, "question": "q", "answer": answer}  # fmt: skip


def test_ratios_are_of_the_same_prompt_and_medians_over_prompts():
    rows = [row(p, "full", 10.0 * (p + 1)) for p in range(3)] + [row(p, "query", 1.0) for p in range(3)]
    found = summary(results(rows))
    assert found["prompts"] == 3
    assert found["tokens"] == [100, 102]
    assert found["policies"]["query"]["ttft_ratio"][0] == pytest.approx(1 / 20)
    assert found["policies"]["full"]["ttft_s"][0] == 20
    assert found["policies"]["query"]["stages"] == {"recompute": 0.75, "other": 0.25}


def test_rounds_are_reduced_before_prompts_are():
    rows = [row(0, "full", 10.0), row(0, "query", 1.0), row(0, "query", 2.0, turn=1), row(0, "query", 9.0, turn=2)]
    assert summary(results(rows))["policies"]["query"]["ttft_s"][0] == 2


def test_scores_stand_beside_full_prefills():
    rows = [row(p, "full", 1.0, **judged(0.5)) for p in range(4)]
    rows += [row(p, "query", 1.0, **judged(0.25 * p)) for p in range(4)]
    found = summary(results(rows))["policies"]["query"]
    assert found["f1"][0] == pytest.approx(0.375)
    assert found["f1_diff"][0] == pytest.approx(-0.125)
    assert found["f1_diff"][1] <= -0.125 <= found["f1_diff"][2]
    assert found["em_diff"][0] == 0
    assert (found["holds_gold"][0], found["holds_gold_diff"][0]) == (0.75, -0.25)


def test_what_there_is_to_know_of_the_prompts_is_told_once_and_of_full_prefill():
    about = [{"chunks": 2, "repeated_chunks": 1.0, "gold_in_chunks": True}, {"chunks": 6, "repeated_chunks": 0.5}]
    scores = [judged(0.0), judged(0.5)]
    rows = [row(p, "full", 1.0, **about[p], **scores[p]) for p in range(2)]
    rows += [row(p, "full", 1.0, turn=1, **about[p]) for p in range(2)]
    rows += [row(p, "query", 1.0, **about[p], **judged(0.0)) for p in range(2)]
    found = summary(results(rows))["data"]
    assert found == {"answered": 2, "full_zero": 0.5, "gold_in_chunks": 1, "repeated_chunks": (2 + 3) / 8}
    nothing = summary(results([row(0, "full", 1.0)]))["data"]
    assert nothing == {"answered": 0, "full_zero": None, "gold_in_chunks": None, "repeated_chunks": None}


def test_policies_are_compared_with_another_prompt_by_prompt():
    kl = (0.1, 0.2, 0.6)
    rows = [row(p, "full", 10.0, **judged(1.0)) for p in range(4)]
    rows += [row(p, "query", 2.0 + p, **judged(1.0, kl=kl[p])) for p in range(3)]
    rows += [row(p, "link", 1.0 + p, **judged(1.0, kl=1.0)) for p in range(3)]
    made = results(rows)
    made.settings["policies"].append("link")
    found = summary(made, against="link")["against"]
    assert found["policy"] == "link"
    assert found["policies"].keys() == {"full", "query"}
    assert found["policies"]["full"]["prompts"] == 3  # the fourth prompt has not been run by both
    query = found["policies"]["query"]
    assert query["ttft_ratio"][0] == pytest.approx(3 / 2)
    assert query["kl_first_ratio"][0] == query["kl_mean_ratio"][0] == pytest.approx(0.3)
    assert summary(made)["against"] is summary(made, against="absent")["against"] is None


def test_a_divergence_of_rounding_errors_is_nothing_to_compare_with():
    rows = [row(p, "full", 10.0, **judged(1.0)) for p in range(2)]
    rows += [row(p, "query", 1.0, **judged(1.0, kl=1e-6)) for p in range(2)]
    found = summary(results(rows), against="query")["against"]["policies"]["full"]
    assert found["ttft_ratio"][0] == 10
    assert found["kl_first_ratio"] is found["kl_mean_ratio"] is None


def test_what_was_not_measured_is_none():
    found = summary(results([row(0, "full", 1.0), row(0, "query", 1.0)]))["policies"]["query"]
    assert found["kl_first"] is found["f1"] is found["f1_diff"] is None


def test_the_worst_prompts_come_first_with_both_answers():
    rows = [row(p, "full", 1.0, **judged(1.0, answer=f"full {p}")) for p in range(3)]
    rows += [row(p, "query", 1.0, **judged(0.0, kl=kl, answer=f"own {p}")) for p, kl in enumerate((0.1, 0.9, 0.5))]
    worst = summary(results(rows))["worst"]
    assert [each["prompt"] for each in worst[:3]] == [1, 2, 0]
    assert (worst[0]["answer"], worst[0]["full_answer"], worst[0]["full_f1"]) == ("own 1", "full 1", 1.0)


def test_a_prompt_that_was_measured_again_counts_once():
    rows = [row(0, "full", 5.0), row(0, "full", 1.0), row(0, "query", 1.0)]
    assert summary(results(rows))["policies"]["full"]["ttft_s"][0] == 1


def test_a_peer_that_failed_is_told_and_not_counted():
    rows = [row(p, "full", 1.0) for p in range(2)]
    rows += [row(0, "peer:x", 2.0, stages=None), row(1, "peer:x", None, stages=None, error="it died")]
    found = summary(results(rows, peers=["x"]))
    assert found["policies"]["peer:x"]["prompts"] == 1
    assert found["policies"]["peer:x"]["stages"] is None
    assert found["peers"]["x"]["error"] == "it died"


def test_growth_is_the_exponent_of_a_power_law():
    rows = [row(p, "full", 1e-6 * n**2, tokens=n) for p, n in enumerate((1000, 2000, 4000))]
    rows += [row(p, "query", 1e-3 * n, tokens=n) for p, n in enumerate((1000, 2000, 4000))]
    growth = summary(results(rows, tokens=[1000, 2000, 4000]))["growth"]
    assert growth["full"]["exponent"][0] == pytest.approx(2)
    assert growth["query"]["exponent"][0] == pytest.approx(1)
    assert growth["query"]["points"][0] == (1000, 1.0)


def test_an_exponent_says_how_far_it_may_be_off():
    exact = fit_exponent([(1, 1), (2, 2), (4, 4), (8, 8)])
    rough = fit_exponent([(1, 1.2), (2, 1.8), (4, 4.4), (8, 7.6)])
    assert exact.value == pytest.approx(1)
    assert exact.high - exact.low < 1e-6
    assert rough.low < 1 < rough.high
    with pytest.raises(ValueError, match="two lengths"):
        fit_exponent([(5, 1), (5, 2)])


def test_a_summary_is_plain_json():
    rows = [row(p, "full", 1.0, **judged(0.5)) for p in range(3)] + [
        row(p, "query", 0.5, **judged(0.5)) for p in range(3)
    ]
    assert json.dumps(summary(results(rows)), allow_nan=False)
