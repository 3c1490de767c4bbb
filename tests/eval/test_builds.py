"""Another build of chunkcache beside this one: a checkout with a default policy of its own, in its own process."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, saved_model, tiny_model

import chunkcache
from chunkcache.errors import PeerError
from chunkcache.eval import Case, Comparison, compare, summary
from chunkcache.eval.peers import Build, build_name

CASES = [Case(QUESTION, TEXTS, ("1931",)), Case("Who wrote down the weather?", TEXTS[::-1])]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A commit of this package whose default policy is `reuse`."""
    root = tmp_path_factory.mktemp("other")
    package = root / "chunkcache"
    shutil.copytree(Path(chunkcache.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    defaults = package / "defaults.py"
    defaults.write_text(defaults.read_text().replace('"query:later=0.2"', '"reuse"'))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "reuse by default"]):
        subprocess.run(["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b.example", *command], check=True)
    return root


@pytest.fixture(scope="module")
def build(checkout, model_folder):
    with Build.start(checkout, Path(model_folder), 1) as running:
        yield running


def test_it_runs_its_own_code(build, checkout):
    assert build.settings == {"policy": "reuse", "from": str(checkout / "chunkcache" / "__init__.py")}
    assert build.name == build_name(checkout)
    assert build.name.startswith("build:")


def test_its_rows_are_those_of_the_same_policy_here(build):
    results = compare(tiny_model(), chat_tokenizer(), CASES, Comparison(["reuse"]), peers=[build])
    assert results.settings["policies"] == ["full", "reuse", build.name]
    assert results.settings["options"][build.name] == "reuse"
    rows = {(row["prompt"], row["policy"]): row for row in results.rows}
    for prompt in (0, 1):
        theirs, ours = rows[prompt, build.name], rows[prompt, "reuse"]
        assert sum(theirs["stages"].values()) == pytest.approx(theirs["ttft_s"])
        assert ours["kl_first"] > 1e-3
        for name in ("kl_first", "kl_mean"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-2)
        for name in ("tokens", "recomputed_share", "agreement", "same_answer", "answer", "f1"):
            assert theirs[name] == ours[name]
    against = summary(results, build.name)["against"]["policies"]
    assert against["reuse"]["kl_first_ratio"][0] == pytest.approx(1, rel=1e-2)


def test_another_prompt_is_not_compared(build, monkeypatch):
    told = build.prefill(CASES[0])
    monkeypatch.setattr(build, "prefill", lambda case: {**told, "token_ids": told["token_ids"][1:]})
    with pytest.raises(PeerError, match=f"{build.name} makes another prompt of the same texts"):
        compare(tiny_model(), chat_tokenizer(), CASES, Comparison(["reuse"]), peers=[build])


def test_the_command_compares_with_it(command_line, checkout, model_folder, tmp_path):
    ctxs = [{"title": "", "text": text} for text in TEXTS]
    data = tmp_path / "texts.json"
    data.write_text(json.dumps([{"question": QUESTION, "answers": ["1931"], "ctxs": ctxs}]))
    few = ("--chunks", "2", "--prompts", "1", "--policy", "reuse", "--model", model_folder, "--json")
    name = build_name(checkout)
    code, told, _ = command_line("bench", "quality", str(data), *few, "--build", str(checkout), "--against", name)
    assert code == 0
    (section,) = json.loads(told)["sections"]
    assert section["summary"]["against"]["policy"] == name
    code, _, err = command_line("bench", "quality", str(data), *few, "--build", str(tmp_path))
    assert (code, "no checkout of chunkcache" in err) == (2, True)
    code, _, err = command_line("bench", "quality", str(data), *few, "--build", str(checkout), "--cold")
    assert (code, "drop --build" in err) == (2, True)


def test_a_folder_without_a_commit_has_no_name(checkout, tmp_path):
    shutil.copytree(checkout / "chunkcache", tmp_path / "chunkcache")
    with pytest.raises(PeerError, match=r"the commit of .* is not known"):
        build_name(tmp_path)
