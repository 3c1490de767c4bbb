"""`bench load` and `bench simulate` refuse what makes no sense, and print what they found."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from support.llm import TEXTS, saved_model

from chunkcache.errors import InputError
from chunkcache.eval.commands.load import bench_load, bench_simulate

SMALL = ("--shape", "llama-3.1-8b", "--gpus", "1", "--documents", "50", "--requests", "40", "--rate", "2")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "made.jsonl"
    ctxs = [{"title": "", "text": text} for text in TEXTS]
    path.write_text(json.dumps({"question": "Who?", "ctxs": ctxs, "answers": ["Nobody"]}) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "wrong",
    [("--rate", "0"), ("--budget", "0"), ("--validate", "0"), ("--validate", "1"), ("--bound", "0"), ("--skew", "6")],
)
def test_figures_out_of_range_are_refused(wrong, data):
    found = CliRunner().invoke(bench_load, [data, *wrong])
    assert found.exit_code == 2
    assert wrong[0] in found.output


def test_requests_come_from_one_place(data):
    for arguments in ([], [data, "--sessions", data]):
        found = CliRunner().invoke(bench_load, arguments)
        assert isinstance(found.exception, InputError)
        assert "pass one of them" in str(found.exception)


def test_a_small_load_test_goes_on_from_its_folder(data, tmp_path):
    arguments = [
        data,
        "--chunks",
        "2",
        "--requests",
        "3",
        "--policy",
        "full",
        "--policy",
        "query",
        "--validate",
        "0.5",
    ]
    arguments += ["--model", saved_model(tmp_path / "model"), "--out", str(tmp_path / "out"), "--json"]
    first, again = (CliRunner().invoke(bench_load, arguments) for _ in range(2))
    assert first.exception is None
    assert json.loads(first.stdout) == json.loads(again.stdout)
    checks = json.loads(first.stdout)["validation"]
    assert [(check["policy"], check["load"]) for check in checks] == [("full", 0.5), ("query", 0.5)]
    other = CliRunner().invoke(bench_load, [*arguments, "--bound", "1000", "--rate", "0.01"])
    assert json.loads(other.stdout)["bound_s"] == 1000  # how it is shown is no reason to measure again
    [path] = (tmp_path / "out").glob("*.jsonl")
    head = json.loads(path.read_text(encoding="utf-8").splitlines()[0])["settings"]
    assert head["options"]["full"] == "full"
    assert head["fingerprint"]


def test_a_simulation_prints_that_it_is_one():
    found = CliRunner().invoke(bench_simulate, [*SMALL, "--redis", "none", "--policy", "query"])
    assert found.exception is None
    assert "Simulated" in found.stdout
    assert "no Redis" in found.stdout


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (("--shape", "none"), "no shape 'none' is built in"),
        (("--policy", "link"), "has no cost model"),
        (("--route", "none"), "cannot be routed"),
        (("--chunks", "60"), "too few"),
        (("--fit", "."), "--fit needs --memory-bandwidth"),
        (("--fit", ".", "--memory-bandwidth", "1e10", "--hbm-bandwidth", "1e10"), "--gpus says another"),
    ],
)
def test_what_cannot_be_simulated_is_refused(wrong, why):
    found = CliRunner().invoke(bench_simulate, [*SMALL, *wrong])
    assert isinstance(found.exception, InputError)
    assert why in str(found.exception)
