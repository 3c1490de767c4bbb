"""`bench batch` refuses what makes no sense, goes on from its folder, and prints what it found."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from support.llm import TEXTS, saved_model

from chunkcache.errors import DocumentError, PolicyError
from chunkcache.eval import batch
from chunkcache.eval.commands.batch import bench_batch


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "made.jsonl"
    ctxs = [{"title": "", "text": text} for text in TEXTS]
    lines = [json.dumps({"question": f"Who, {n}?", "ctxs": ctxs, "answers": ["Nobody"]}) for n in range(4)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def few_lengths(monkeypatch):
    monkeypatch.setattr(batch, "BATCHES", (2,))
    monkeypatch.setattr(batch, "LENGTHS", (16,))


def small(data, tmp_path):
    model = saved_model(tmp_path / "model")
    ways = ["--policy", "reuse", "--sets", "2", "--questions", "2", "--chunks", "2", "--new-tokens", "3"]
    return [data, *ways, "--model", model, "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("wrong", [("--chunks", "1"), ("--rounds", "0"), ("--max-batch", "0"), ("--new-tokens", "0")])
def test_figures_out_of_range_are_refused(wrong, data):
    found = CliRunner().invoke(bench_batch, [data, *wrong])
    assert found.exit_code == 2
    assert wrong[0] in found.output


def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(data):
    unknown = CliRunner().invoke(bench_batch, [data, "--policy", "nonsense", "--model", "nowhere"])
    assert isinstance(unknown.exception, PolicyError)
    few = CliRunner().invoke(bench_batch, [data, "--questions", "9", "--model", "nowhere"])
    assert isinstance(few.exception, DocumentError)
    assert "lower --questions" in str(few.exception)


def test_a_small_run_goes_on_from_its_folder(data, tmp_path):
    arguments = [*small(data, tmp_path), "--json"]
    first, again = (CliRunner().invoke(bench_batch, arguments) for _ in range(2))
    assert first.exception is None
    assert json.loads(first.stdout) == json.loads(again.stdout)
    found = json.loads(first.stdout)
    assert {policy: set(ways) for policy, ways in found["policies"].items()} == {
        "full": {"one by one", "plain batches", "grouped"},
        "reuse": {"one by one", "grouped"},
    }


def test_tables_say_what_they_are_of(data, tmp_path):
    found = CliRunner().invoke(bench_batch, small(data, tmp_path))
    assert found.exception is None
    assert "plain batches" in found.stdout
    assert "grouped" in found.stdout
