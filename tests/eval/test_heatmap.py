"""A heat map has every token of the prompt, in its place, and says where it was computed."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model, wrapped

from chunkcache.eval import Case
from chunkcache.eval.heatmap import heatmap
from chunkcache.eval.report.heat import summary

POLICIES = ["full", "prefix", "reuse", "link:k=2", "query:ratio=0.3"]


@pytest.fixture(scope="module")
def llm():
    return wrapped()


@pytest.fixture(scope="module")
def found():
    return heatmap(tiny_model(), chat_tokenizer(), Case(QUESTION, TEXTS), POLICIES)


def of(found, policy):
    return [row for row in found.rows if row["policy"] == policy]


def test_every_token_is_there_in_order(llm, found):
    ids = llm.prompts.build(QUESTION, TEXTS).token_ids
    for policy in POLICIES:
        assert [row["index"] for row in of(found, policy)] == list(range(len(ids)))
        assert [row["text"] for row in of(found, policy)] == [llm.tokenizer.decode([token]) for token in ids]


def test_roles_follow_the_prompt(found):
    roles = list(dict.fromkeys(row["role"] for row in of(found, "full")))
    assert roles == ["prefix", "chunk 1", "chunk 2", "chunk 3", "question"]


def test_full_computes_all_and_reuse_only_the_question(found):
    assert {row["share"] for row in of(found, "full")} == {1.0}
    assert {(row["role"] == "question", row["share"]) for row in of(found, "reuse")} == {(True, 1.0), (False, 0.0)}


def test_link_computes_the_first_tokens_of_the_chunks_that_are_not_exact(found):
    for number in (2, 3):
        shares = [row["share"] for row in of(found, "link:k=2") if row["role"] == f"chunk {number}"]
        assert shares == [1.0, 1.0] + [0.0] * (len(shares) - 2)


def test_an_interrupted_run_goes_on(tmp_path, found):
    path = tmp_path / "heatmap.jsonl"
    args = (tiny_model(), chat_tokenizer(), Case(QUESTION, TEXTS), POLICIES)
    heatmap(*args, path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-5]))
    assert summary(heatmap(*args, path=path)) == summary(found)
