"""The measuring commands as a user meets them: tables, JSON, results that are resumed, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.llm import TEXTS, saved_model

from chunkcache.eval.data import DataSet
from chunkcache.eval.results import read_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    """Twelve prompts of three chunks, in CacheBlend's format."""
    ctxs = [{"title": "", "text": text} for text in TEXTS]
    rows = [{"question": f"{n}?", "answers": ["1931"], "ctxs": ctxs[:: 1 if n % 2 else -1]} for n in range(12)]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def bench(command_line, model_folder):
    def run(command, *args):
        return command_line("bench", command, *args, "--model", model_folder)

    return run


FEW = ("--chunks", "2", "--prompts", "2", "--policy", "reuse")


def test_quality_shows_speed_fidelity_and_answers(bench, data):
    code, out, _ = bench("quality", data, *FEW)
    assert code == 0
    assert all(word in out for word in ("TTFT", "KL", "ROUGE-L", "reuse", "full"))


def test_answers_may_be_longer_and_policies_compared_with_another(bench, data, tmp_path):
    args = (data, *FEW, "--policy", "link:k=2", "--out", str(tmp_path / "results"), "--json")
    code, out, err = bench("quality", *args, "--answer-tokens", "3", "--against", "reuse")
    assert code == 0, err
    [section] = json.loads(out)["sections"]
    assert section["settings"]["answer_tokens"] == 3
    assert section["summary"]["against"]["policies"].keys() == {"full", "link:k=2"}
    rows = (tmp_path / "results" / "quality-texts-2.jsonl").read_text()
    code, out, err = bench("quality", *args, "--answer-tokens", "3", "--against", "link:k=2")  # only shown otherwise
    assert code == 0, err
    assert json.loads(out)["sections"][0]["summary"]["against"]["policy"] == "link:k=2"
    assert (tmp_path / "results" / "quality-texts-2.jsonl").read_text() == rows
    assert bench("quality", *args)[0] == 2  # 16 tokens are another measurement


def test_a_policy_to_compare_with_has_to_be_measured(bench, data):
    code, _, err = bench("quality", data, *FEW, "--against", "link:k=2")
    assert code == 2
    assert "pass --policy link:k=2" in " ".join(err.split())


def test_several_data_sets_end_with_what_they_come_to_together(bench, data, tmp_path):
    other = tmp_path / "others.json"
    other.write_text(Path(data).read_text())
    code, out, err = bench("quality", data, str(other), *FEW)
    assert code == 0, err
    assert out.index("others, 2 chunks") < out.index("All data sets")
    assert "Worst data set of each policy" in out
    code, out, _ = bench("quality", data, str(other), *FEW, "--json")
    assert json.loads(out)["worst"]["data_sets"]["reuse"].keys() >= {"ttft_ratio", "kl_first", "kl_mean", "f1_diff"}


def test_ttft_has_no_answers_and_several_data_sets_and_chunk_counts(bench, data, tmp_path):
    folder = tmp_path / "results"
    code, out, _ = bench("ttft", data, *FEW, "--chunks", "3", "--out", str(folder), "--json")
    assert code == 0
    assert [section["name"] for section in json.loads(out)["sections"]] == ["ttft-texts-2", "ttft-texts-3"]
    assert [each.settings["chunks"] for each in read_folder(folder).values()] == [2, 3]
    assert all(row["answer"] is None for each in read_folder(folder).values() for row in each.rows)


def test_growing_lengths_have_exponents(bench, data):
    code, out, _ = bench(
        "ttft", data, "--tokens", "40", "--tokens", "80", "--policy", "reuse", "--prompts", "1", "--json"
    )
    assert code == 0
    growth = json.loads(out)["sections"][0]["summary"]["growth"]
    assert growth.keys() == {"full", "reuse"}
    assert len(growth["full"]["points"]) == 2


def test_the_same_command_goes_on_and_another_is_refused(bench, data, tmp_path):
    folder = tmp_path / "results"
    assert bench("ttft", data, *FEW, "--out", str(folder))[0] == 0
    before = (folder / "ttft-texts-2.jsonl").read_text()
    assert bench("ttft", data, *FEW, "--out", str(folder))[0] == 0
    assert (folder / "ttft-texts-2.jsonl").read_text() == before
    assert bench("ttft", data, *FEW[:2], "--prompts", "3", "--policy", "reuse", "--out", str(folder))[0] == 0
    assert (folder / "ttft-texts-2.jsonl").read_text().startswith(before)
    code, _, err = bench("ttft", data, *FEW, "--cold", "--out", str(folder))
    assert code == 2
    assert "cold=False" in err


def test_short_prompts_are_left_out_when_asked(bench, data):
    rows = json.loads(Path(data).read_text())
    for row in rows[::3]:
        row["ctxs"][0]["text"] *= 3
    Path(data).write_text(json.dumps(rows))
    args = ("quality", data, "--chunks", "3", "--policy", "reuse", "--json")

    def tokens(*more):
        code, out, err = bench(*args, *more)
        assert code == 0, err
        return json.loads(out)["sections"][0]["summary"]["tokens"]

    shortest, longest = tokens("--prompts", "3")
    assert tokens("--prompts", "4", "--least-tokens", str(shortest))[0] > shortest
    assert tokens("--prompts", "2", "--skip", "2", "--least-tokens", str(shortest))[1] == longest
    code, _, err = bench(*args, "--prompts", "4", "--skip", "1", "--least-tokens", str(shortest))
    assert code == 2
    assert "has 4 prompts of" in " ".join(err.split())


def test_prompts_with_too_few_chunks_are_filled_when_asked(bench, data):
    rows = json.loads(Path(data).read_text())
    for number, row in enumerate(rows):
        row["ctxs"].append({"title": "", "text": f"Number {number} is of this prompt alone."})
    Path(data).write_text(json.dumps(rows))
    args = (data, "--chunks", "5", "--prompts", "2", "--policy", "reuse", "--json")
    code, _, err = bench("ttft", *args)
    assert code == 2
    assert "5 chunks" in err
    code, out, err = bench("ttft", *args, "--fill")
    assert code == 0, err
    [section] = json.loads(out)["sections"]
    assert section["settings"]["fill"]
    assert section["summary"]["prompts"] == 2


def test_chunks_are_cut_when_asked(bench, data):
    sizes = {}
    for cut in ("4", "1000"):
        code, out, _ = bench("ttft", data, *FEW, "--chunk-tokens", cut, "--json")
        assert code == 0
        sizes[cut] = json.loads(out)["sections"][0]["summary"]["tokens"][1]
    assert sizes["4"] < sizes["1000"]


def test_several_stores_have_results_of_their_own(bench, data, tmp_path):
    stores = ("--store", "memory://", "--store", f"disk://{tmp_path}/kv")
    code, out, _ = bench("ttft", data, *FEW, *stores, "--json")
    assert code == 0
    names = [each["name"] for each in json.loads(out)["sections"]]
    assert names == ["ttft-texts-2-1-memory", "ttft-texts-2-2-disk"]


def test_a_data_file_is_read_once_whatever_is_measured_on_it(bench, data, monkeypatch):
    read = []
    read_file = DataSet.read
    monkeypatch.setattr(DataSet, "read", lambda path: read.append(path) or read_file(path))
    code, _, err = bench("ttft", data, *FEW, "--chunks", "3")
    assert code == 0, err
    assert read == [Path(data)]


def test_two_files_of_one_name_are_refused(bench, data, tmp_path):
    other = tmp_path / "other" / "texts.json"
    other.parent.mkdir()
    other.write_text("[]")
    code, _, err = bench("ttft", data, str(other), *FEW)
    assert code == 2
    assert "texts" in err


def test_a_heat_map_of_one_prompt(bench, data, tmp_path):
    folder = tmp_path / "results"
    policies = ("--policy", "reuse", "--policy", "link:k=8")
    code, out, _ = bench("heatmap", data, "--chunks", "2", *policies, "--out", str(folder))
    assert code == 0
    assert "link:k=8" in out
    rows = read_folder(folder)["heatmap"].rows
    assert {row["policy"] for row in rows} == {"reuse", "link:k=8"}


def test_a_folder_without_peers_is_no_folder_of_peers(bench, data, tmp_path):
    code, _, err = bench("ttft", data, *FEW, "--peers", str(tmp_path))
    assert code == 0  # each peer is left out, and said so
    assert "without transformers" in err
    assert bench("ttft", data, *FEW, "--peers", str(tmp_path / "nowhere"))[0] == 2


def test_a_policy_that_is_unknown_is_told_before_the_model_is_loaded(command_line, data):
    code, _, err = command_line("bench", "ttft", data, "--chunks", "2", "--policy", "nope", "--model", "./nowhere")
    assert code == 2
    assert "nope" in err


def test_a_corpus_is_searched_for_the_chunks(bench, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(TEXTS):
        (corpus / f"{number}.txt").write_text(text)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "When was the bridge opened?", "answers": ["1931"]}))
    args = (str(corpus), "--questions", str(questions), *FEW, "--chunk-tokens", "64", "--json")
    code, out, _ = bench("quality", *args)
    assert code == 0
    [section] = json.loads(out)["sections"]
    assert (section["name"], section["summary"]["prompts"]) == ("quality-corpus-2", 1)
    assert section["summary"]["policies"]["reuse"]["f1"] is not None
