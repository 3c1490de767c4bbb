"""`bench all` runs each measurement with the options that it was given, and writes the report."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from support.llm import TEXTS, saved_model

from chunkcache.eval.commands import all as every
from chunkcache.eval.commands.all import bench_all
from chunkcache.eval.commands.batch import bench_batch
from chunkcache.eval.commands.load import bench_simulate
from chunkcache.eval.commands.requests import bench_heatmap
from chunkcache.eval.results import read_folder


@pytest.fixture
def data(tmp_path):
    paths = [tmp_path / name for name in ("first.json", "last.json")]
    ctxs = [{"title": "", "text": text} for text in TEXTS]
    for path in paths:
        rows = [{"question": f"Who, {n}?", "ctxs": ctxs, "answers": ["Nobody"]} for n in range(24)]
        path.write_text(json.dumps(rows))
    return list(map(str, paths))


def test_everything_is_measured_into_one_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(every, "GROWING", ("reuse",))
    monkeypatch.setattr(every, "BUDGETS", (1.25,))
    monkeypatch.setattr(sys, "argv", ["chunkcache", "bench", "all", *data])
    slow = []
    for command in (bench_simulate, bench_batch, bench_heatmap):  # their defaults are no job for a test
        monkeypatch.setattr(command, "run", slow.append)
    out, model = tmp_path / "out", saved_model(tmp_path / "model")
    few = ["--chunks", "2", "--prompts", "1", "--tokens", "40", "--tokens", "60", "--requests", "2"]
    ran = CliRunner().invoke(bench_all, [*data, *few, "--policy", "reuse", "--model", model, "--out", str(out)])
    assert ran.exception is None, ran.output
    results = read_folder(out)
    assert results.keys() == {"quality-first-2", "quality-last-2", "ttft-first-lengths", "load-last-2-warm"}
    assert results["quality-first-2"].settings["policies"] == ["full", "plain", "reuse"]
    assert results["quality-first-2"].settings["fill"]
    assert results["ttft-first-lengths"].settings["tokens"] == [40, 60]
    assert results["load-last-2-warm"].settings["requests"] == 2
    simulate, batch, heatmap = slow
    assert simulate.output.out == batch.output.out == heatmap.output.out == out
    assert str(batch.data) == data[-1]
    assert batch.model.model_name == heatmap.model.model_name == model
    assert heatmap.policies == ("reuse",)
    assert json.loads((out / "report.json").read_text())["command"] == "chunkcache bench all first.json last.json"
    assert (out / "report.html").exists()
