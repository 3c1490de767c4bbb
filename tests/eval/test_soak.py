"""`bench soak`: a real server over a real Valkey, for seconds; and what counts as wrong."""

from __future__ import annotations

import json

import pytest
from support.llm import TEXTS, saved_model

pytest.importorskip("fastapi")

from chunkcache.eval.soak import rss_growth
from chunkcache.eval.soak_client import Client


def test_a_short_soak_passes(command_line, tmp_path):
    model = saved_model(tmp_path / "model")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([
        {"question": f"{text.split()[1]}?", "answers": ["x"], "ctxs": [{"title": "", "text": t} for t in TEXTS]}
        for text in TEXTS
    ]))  # fmt: skip
    asked = ["--chunks", "3", "--prompts", "3", "--clients", "5", "--answer-tokens", "6", "--minutes", "0.08"]
    code, out, error = command_line(
        "bench", "soak", str(data), *asked, "--memory", "64KiB", "--model", model, "--json"
    )
    assert code == 0, error
    found = json.loads(out)
    assert found["passed"]
    assert [what for _, what in found["faults"]] == ["kill", "start", "kill", "start"]
    counts = found["counts"]
    assert {"answers", "vanished", "refused", "hits"} <= counts.keys(), counts
    assert found["should_be_none"] == {}
    assert len(found["rss"]) > 2
    assert len(found["tables"]) == 2


def test_what_is_compared_of_the_memory():
    flat = [(second, 100) for second in range(600)]
    assert rss_growth(flat, 600) == {"rss_growth": 0, "rss_span_s": 60}
    assert rss_growth([(at, 110 if at >= 540 else 100) for at, _ in flat], 600)["rss_growth"] == pytest.approx(0.1)
    assert rss_growth([(at, 110 if at >= 90 else 100) for at, _ in flat], 100)["rss_growth"] == pytest.approx(0.1)
    assert rss_growth([], 600)["rss_growth"] is None


@pytest.mark.parametrize(
    ("text", "lost", "counted"),
    [("right", 0, {}), ("other", 0, {"wrong_answers": 1}), ("other", 1, {"answers_after_loss": 1, "lost": 1})],
)
def test_what_counts_as_wrong(text, lost, counted):
    client = Client({"seed": 0, "requests": [{"texts": ["right"]}]}, 0)
    told = {"hits": 0, "misses": 0, "lost": lost}
    client._compare(0, text, {"prompt_tokens_details": {"chunkcache": [told]}})
    assert +client.counts == {"answers": 1, **counted}
