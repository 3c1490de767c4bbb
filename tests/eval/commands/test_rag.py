"""The bench commands round retrieval: what they print, and what they write for machines."""

from __future__ import annotations

import json

import pytest
from support.llm import TEXTS, saved_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    """Return a data set of three prompts over two chunks each."""
    path = tmp_path / "cases.json"
    chunks = [{"title": "", "text": text} for text in TEXTS]
    pairs = [chunks[:2], chunks[1:], [chunks[2], chunks[0]]]
    rows = [
        {"question": f"What is said of number {n}?", "ctxs": pair, "answers": ["x"]} for n, pair in enumerate(pairs)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def results(run, tmp_path, *args):
    """Run a command; return what it printed and what it wrote."""
    code, out, err = run("bench", *args, "--json", str(tmp_path / "out.json"))
    assert code == 0, err
    return out, json.loads((tmp_path / "out.json").read_text())


def test_bench_retrieval_counts_what_is_found_and_precomputes(command_line, tmp_path, model_folder):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text(
        "\n".join(json.dumps({"id": f"d{n}", "title": f"t{n}", "text": t}) for n, t in enumerate(TEXTS))
    )
    questions.write_text(json.dumps({"question": "When was the bridge opened?", "documents": ["d0"]}))
    args = ("retrieval", str(corpus), str(questions), "--precompute", "2", "--model", model_folder)
    out, found = results(command_line, tmp_path, *args)
    assert [(mode["mode"], mode["recall"]["5"]) for mode in found["modes"]] == [
        ("dense", 1.0),
        ("keyword", 1.0),
        ("hybrid", 1.0),
    ]
    assert (found["precompute"]["documents"], found["documents"]) == (2, 3)
    assert "one by one" in out


def test_bench_chain_compares_with_plain_transformers(command_line, tmp_path, model_folder, data):
    args = ("chain", data, "--chunks", "2", "--prompts", "2", "--rounds", "1", "--model", model_folder)
    out, found = results(command_line, tmp_path, *args)
    assert [row["equal"] for row in found["rows"]] == [True, True]
    assert all(row["reused_tokens"] > 0 for row in found["rows"])
    assert "plain transformers, s" in out


def test_bench_hints_replays_sessions(command_line, tmp_path):
    sessions = tmp_path / "sessions.jsonl"
    turns = [{"document_ids": [f"d{n % 3}", f"d{n % 5}"]} for n in range(8)]
    sessions.write_text("\n".join(json.dumps({"session_id": str(n), "turns": turns}) for n in range(3)))
    out, found = results(command_line, tmp_path, "hints", "--sessions", str(sessions), "--seeds", "1")
    assert {row["trace"] for row in found["rows"]} == {"sessions"}
    assert "lfu, hints" in out


def test_bench_order_serves_similar_requests(command_line, tmp_path, model_folder, data):
    args = ("order", data, "--chunks", "2", "--prompts", "2", "--visits", "2", "--model", model_folder)
    out, found = results(command_line, tmp_path, *args)
    assert {row["tolerance"] for row in found["rows"]} == {0, 1, 2, 4}
    assert "own kl" in out


def test_bench_order_needs_two_prompts(command_line, model_folder, data):
    code, _, err = command_line("bench", "order", data, "--prompts", "1", "--chunks", "2", "--model", model_folder)
    assert (code, "too few" in err) == (2, True)
