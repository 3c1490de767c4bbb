"""The bench commands of single parts: what they print and write, that they go on, and that they are reported."""

from __future__ import annotations

import json

import pytest
from support.llm import TEXTS, saved_model

from chunkcache.eval.ablation import VARIANTS


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


@pytest.fixture
def measure(command_line, tmp_path):
    """Run a command into a folder, go on in it, and make its report; returns the tables printed and the summary."""

    def run(*args):
        folder = str(tmp_path / "out")
        code, tables, err = command_line("bench", *args, "--out", folder)
        assert code == 0, err
        [path] = (tmp_path / "out").glob("*.jsonl")
        measured = path.read_text()
        code, printed, err = command_line("bench", *args, "--out", folder, "--json")
        assert code == 0, err
        assert path.read_text() == measured  # nothing was left to measure
        [section] = json.loads(printed)["sections"]
        code, _, err = command_line("bench", "report", folder)
        assert code == 0, err
        assert json.loads((tmp_path / "out/report.json").read_text())["sections"] == [section]
        for table in section["summary"]["tables"]:
            assert all(column in tables for column in table["columns"])
        return tables, section["summary"]

    return run


def test_retrieval_counts_what_is_found_and_precomputes(measure, tmp_path, model_folder):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text(
        "\n".join(json.dumps({"id": f"d{n}", "title": f"t{n}", "text": t}) for n, t in enumerate(TEXTS))
    )
    questions.write_text(json.dumps({"question": "When was the bridge opened?", "documents": ["d0"]}))
    args = ("retrieval", str(corpus), str(questions), "--precompute", "2", "--model", model_folder)
    tables, summary = measure(*args)
    assert [(search["mode"], search["recall"]["5"]) for search in summary["searches"]] == [
        ("dense", 1.0),
        ("keyword", 1.0),
        ("hybrid", 1.0),
    ]
    assert (summary["precompute"]["documents"], summary["index"]["documents"]) == (2, 3)
    assert "one by one" in tables


def test_chain_compares_with_plain_transformers(measure, model_folder, data):
    args = ("chain", data, "--chunks", "2", "--prompts", "2", "--rounds", "1", "--model", model_folder)
    tables, summary = measure(*args)
    assert (summary["prompts"], summary["equal"]) == (2, 1.0)
    assert "plain transformers, s" in tables


def test_hints_replays_sessions(measure, tmp_path):
    sessions = tmp_path / "sessions.jsonl"
    turns = [{"document_ids": [f"d{n % 3}", f"d{n % 5}"]} for n in range(8)]
    sessions.write_text("\n".join(json.dumps({"session_id": str(n), "turns": turns}) for n in range(3)))
    tables, summary = measure("hints", "--sessions", str(sessions), "--seeds", "1")
    assert {each["trace"] for each in summary["variants"]} == {"sessions"}
    assert "lfu, hints" in tables


def test_order_serves_similar_requests(measure, model_folder, data):
    args = ("order", data, "--chunks", "2", "--prompts", "2", "--visits", "2", "--model", model_folder)
    tables, summary = measure(*args)
    assert {each["tolerance"] for each in summary["orders"]} == {0, 1, 2, 4}
    assert "own KL" in tables


def test_order_needs_two_prompts(command_line, model_folder, data):
    code, _, err = command_line("bench", "order", data, "--prompts", "1", "--chunks", "2", "--model", model_folder)
    assert (code, "too few" in err) == (2, True)


def test_selection_compares_variants(measure, model_folder, data):
    tables, summary = measure("selection", data, "--chunks", "2", "--prompts", "1", "--model", model_folder)
    assert [each["variant"] for each in summary["variants"]] == [variant.name for variant in VARIANTS]
    assert "random tokens" in tables


def test_store_compares_a_disk_with_each_codec(measure, model_folder, data):
    tables, summary = measure("store", data, "--chunks", "2", "--prompts", "1", "--model", model_folder)
    codecs = ["disk://", "disk://?codec=bf16", "disk://?codec=int8", "disk://?codec=int4"]
    assert [each["store"] for each in summary["stores"]][:5] == ["memory://", *codecs]
    assert "get/floor" in tables


def test_store_takes_urls(measure, model_folder, data, tmp_path):
    urls = [f"disk://{tmp_path}/kv", "memory://?codec=int8"]
    named = [part for url in urls for part in ("--store", url)]
    _, summary = measure("store", data, *named, "--chunks", "2", "--prompts", "1", "--model", model_folder)
    assert [each["store"] for each in summary["stores"]] == ["memory://", *urls]


def test_packing_measures_each_length(measure, model_folder):
    args = ("packing", "--chunk-tokens", "64", "--chunk-tokens", "32", "--rounds", "1", "--model", model_folder)
    tables, summary = measure(*args)
    assert [row["chunk_tokens"] for row in summary["lengths"]] == [64, 32] * 2
    assert "prefix and lead-in" in tables


def test_another_setting_needs_another_folder(command_line, tmp_path, model_folder, data):
    args = ("bench", "chain", data, "--chunks", "2", "--prompts", "1", "--model", model_folder)
    folder = ("--out", str(tmp_path / "out"))
    assert command_line(*args, "--rounds", "1", *folder)[0] == 0
    code, _, err = command_line(*args, "--rounds", "2", *folder)
    assert (code, "rounds" in err) == (2, True)
