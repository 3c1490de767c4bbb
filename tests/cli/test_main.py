"""The command line as a user meets it: what it prints where, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.llm import saved_model

import chunkcache

PAGES = {
    "bridge.md": "# Bridge\n\nThe bridge was opened in 1931.",
    "ferry.txt": "The ferry sails when the sea is calm.",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def docs(tmp_path):
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.fixture
def run(command_line):
    return command_line


def test_version(run):
    assert run("--version") == (0, f"chunkcache, version {chunkcache.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["frob"], "No such command 'frob'"),
        (["ask", "--docs", "/nowhere", "x"], "no document at '/nowhere'"),
        (["ask", "--docs", ".", "--policy", "nope", "x"], "no policy is called 'nope'"),
        (["ask", "--docs", ".", "--store", "nope://", "x"], "no store has the URL 'nope://'"),
        (["ask", "--docs", ".", " "], "the question is empty"),
        (["ask", "--docs", "."], "Missing argument"),
        (["check-model", "./nowhere/at/all"], "No model can be loaded from './nowhere/at/all'"),
        (["bench", "ttft", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(run, args, reason):
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    [line] = err.strip().splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_a_failure_is_exit_code_1(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr("chunkcache.cli.ask.load", fail)
    assert run("check-model", "x") == (1, "", "error: RuntimeError: broken in two lines\n")


def test_check_model_shows_the_figures(run, model_folder):
    code, out, _ = run("check-model", model_folder, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["passed"] is True
    assert facts["class"] == "LlamaForCausalLM"
    assert len(facts["fingerprint"]) == 64  # what `store ls` shows the start of
    assert run("check-model", model_folder)[1].startswith("supported")


def test_ask_answers_with_sources_as_json(run, model_folder, docs):
    args = ["ask", "--docs", docs, "--model", model_folder, "--max-new-tokens", "4", "--top-k", "2"]
    code, out, _ = run(*args, "--json", "When was the bridge opened?", "When does the ferry sail?")
    answers = json.loads(out)["answers"]
    assert code == 0
    assert [answer["sources"][0]["document"] for answer in answers] == ["bridge.md", "ferry.txt"]
    assert all(answer["stats"]["hits"] == 2 for answer in answers)


def test_ask_computes_what_a_small_store_let_go_of_before_it_answers(run, model_folder, docs):
    for page in range(20):
        Path(docs, f"page{page}.txt").write_text(
            f"Page {page} says what the harbour looked like in {1900 + page}. " * 12
        )
    args = ["ask", "--docs", docs, "--model", model_folder, "--max-new-tokens", "2", "--top-k", "2", "--json"]
    code, out, _ = run(*args, "--store", "memory://?max_bytes=400KiB", "When was the bridge opened?")
    found = json.loads(out)
    assert code == 0
    assert found["store"]["evictions"] > 0
    assert found["answers"][0]["stats"]["misses"] == 0


def test_ask_prints_only_the_answer_to_stdout(run, model_folder, docs):
    args = ["ask", "--docs", docs, "--model", model_folder, "--max-new-tokens", "4", "--top-k", "2"]
    question = "When was the bridge opened?"
    _, out, err = run(*args, question)
    assert json.loads(run(*args, "--json", question)[1])["answers"][0]["answer"] == out.strip()
    assert question in err
    assert "first token after" in err


def test_demo_answers_and_compares_policies(run, model_folder, docs, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "When was the bridge opened?", "answers": ["1931"]}))
    code, out, err = run("demo", "--docs", docs, "--questions", str(questions), "--model", model_folder)
    assert code == 0
    assert "expected: 1931" in err
    assert all(policy in out for policy in ("full", "prefix", "reuse", "link:k=8", "query"))


@pytest.fixture
def data(tmp_path):
    """Twelve prompts over the pages, in CacheBlend's format."""
    ctxs = [{"title": "", "text": text} for text in PAGES.values()]
    rows = [{"question": f"{n}?", "answers": ["1931"], "ctxs": ctxs[:: 1 if n % 2 else -1]} for n in range(12)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_calibrate_then_bench_with_a_guard(run, model_folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "cache"))
    common = [data, "--chunks", "2", "--model", model_folder]
    policies = ["--policy", "query:guard=0.05", "--policy", "cachecraft:alpha=auto"]
    code, _, err = run("bench", "quality", *common, *policies)
    assert code == 2
    assert "run chunkcache calibrate DATA" in err
    assert run("calibrate", *common, "--prompts", "3")[0] == 2
    code, out, err = run("calibrate", *common, "--prompts", "12")
    assert code == 0
    assert "alpha = " in out
    assert "cross-validated" in out
    assert str(tmp_path / "cache") in err.replace("\n", "")
    code, out, err = run("bench", "quality", *common, *policies, "--prompts", "20", "--json")
    assert code == 0
    assert "only 12 prompts" in err
    [section] = json.loads(out)["sections"]
    assert section["summary"]["policies"].keys() == {"full", *policies[1::2]}
    assert {"torch", "transformers", "device", "cores"} <= set(section["ran_on"])


def test_calibrate_one_part_and_keep_the_other(run, model_folder, data, tmp_path):
    out = tmp_path / "found.json"
    args = [
        "calibrate",
        data,
        "--chunks",
        "2",
        "--prompts",
        "10",
        "--model",
        model_folder,
        "--out",
        str(out),
        "--json",
    ]
    first = json.loads(run(*args, "--only", "guard")[1])
    assert first["alpha"] is None
    second = json.loads(run(*args, "--only", "cachecraft")[1])
    assert second["alpha"] is not None
    assert second["guard"] == first["guard"]


def test_bench_selection_compares_every_variant(run, model_folder, data, tmp_path):
    args = ["bench", "selection", data, "--chunks", "2", "--prompts", "2", "--model", model_folder]
    code, *_ = run(*args, "--out", str(tmp_path))
    assert code == 0
    [rows] = tmp_path.glob("*.jsonl")
    results = {row["variant"]: row for row in map(json.loads, rows.read_text().splitlines()) if "variant" in row}
    assert "random tokens" in results
    assert len(results) > 20
    assert all(row["kl_first"] > -1e-6 for row in results.values())
    assert results["nothing recomputed"]["recomputed_share"] < results["random tokens"]["recomputed_share"]
    assert run(*args, "--skip", "50")[0] == 2


def test_a_kept_index_follows_the_folder(run, model_folder, tmp_path):
    docs, index = tmp_path / "docs", tmp_path / "index"
    docs.mkdir()
    for name, text in PAGES.items():
        (docs / name).write_text(text)
    args = ["--docs", str(docs), "--index", str(index), "--store", f"disk://{tmp_path}/kv", "--model", model_folder]

    def sources(*more):
        code, out, err = run("ask", "When was the bridge opened?", *args, "--json", *more)
        assert code == 0, err
        return {source["document"] for source in json.loads(out)["answers"][0]["sources"]}

    assert sources() == {"bridge.md", "ferry.txt"}
    written = {path.name for path in index.iterdir()}
    (docs / "ferry.txt").unlink()
    (docs / "keeper.txt").write_text("The keeper of the lighthouse wrote down the weather.")
    assert sources() == {"bridge.md", "keeper.txt"}
    assert {path.name for path in index.iterdir()} != written
    code, _, err = run("ask", "Why?", *args, "--chunk-tokens", "64")
    assert (code, "pass --chunk-tokens 256" in err) == (2, True)
