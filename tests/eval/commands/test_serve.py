"""`bench serve`: a real server and real clients, on a tiny model."""

from __future__ import annotations

import json

import pytest
from support.llm import TEXTS, saved_model

from chunkcache.eval.report import build_report
from chunkcache.eval.results import read_folder

pytest.importorskip("fastapi")


def test_all_parts_are_measured(command_line, tmp_path):
    model = saved_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    rows = [
        {"question": f"{text.split()[1]}?", "answers": ["x"], "ctxs": [{"title": "", "text": t} for t in TEXTS]}
        for text in TEXTS
    ]
    data.write_text(json.dumps(rows))
    data = data.rename(tmp_path / "data.json")
    asked = ["--chunks", "3", "--prompts", "3", "--clients", "2", "--answer-tokens", "3", "--model", model, "--json"]
    code, out, error = command_line("bench", "serve", str(data), *asked, "--out", str(tmp_path / "out"))
    assert code == 0, error
    found = json.loads(out)
    assert found["requests_per_s"].keys() == {"off", "fused"}
    assert all(rate > 0 for rate in found["requests_per_s"].values())
    assert found["tokens_per_s"].keys() == {"1", "2"}
    assert found["stall_steps"] >= 1
    assert len(found["tables"]) == 4
    report = build_report(read_folder(tmp_path / "out"))
    assert [section["bench"] for section in report["sections"]] == ["serve"]
