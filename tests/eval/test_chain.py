"""The chain benchmark: three ways over the same prompts, and figures that belong together."""

from __future__ import annotations

import copy
import json
import statistics

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.errors import PolicyError, PromptError
from chunkcache.eval import Case
from chunkcache.eval.chain import bench_chain

CASES = [
    Case(QUESTION, TEXTS, ("1931",)),
    Case("Who wrote down the weather?", TEXTS[:0:-1]),
    Case(QUESTION, TEXTS[:1]),
]


@pytest.fixture(scope="module")
def bench():
    seen = []
    bench = bench_chain(tiny_model(), chat_tokenizer(), CASES, "query", lambda *done: seen.append(done), rounds=1)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    return bench


def test_every_prompt_has_its_row(bench):
    assert [(row.prompt, row.chunks) for row in bench.rows] == [(0, 3), (1, 2), (2, 1)]
    for row in bench.rows:
        assert 0 < row.reused_tokens < row.tokens


def test_the_answers_are_the_direct_calls(bench):
    assert all(row.equal for row in bench.rows)


def test_times_belong_together(bench):
    for row in bench.rows:
        assert min(row.plain_ttft_s, row.chain_ttft_s, row.direct_ttft_s) > 0
        assert 0 < 1000 * row.retrieve_s < row.layer_ms < 1000 * row.chain_ttft_s
        assert row.overhead_ms == pytest.approx(1000 * (row.chain_ttft_s - row.direct_ttft_s))
        assert row.speedup == pytest.approx(row.plain_ttft_s / row.chain_ttft_s)


def test_the_summary_is_that_of_the_rows(bench):
    found = json.loads(json.dumps(bench.as_dict()))
    summary, rows = found["summary"], found["rows"]
    assert summary["speedup"] == statistics.median(row["speedup"] for row in rows)
    assert summary["equal"] == 1
    assert summary["f1"] == rows[0]["f1"] is not None
    assert rows[1]["f1"] is None
    assert found["meta"]["options"]["query"].startswith("query")


def test_exact_reuse_answers_as_plain_transformers_do():
    """The direct call and the plug-in are compared with a chat model that has nothing of ours in it."""
    bench = bench_chain(tiny_model(), chat_tokenizer(), CASES[:2], "cacheblend:ratio=1", rounds=1)
    assert [row.plain_equal for row in bench.rows] == [True, True]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(PolicyError, match="prefix"):
        bench_chain(tiny_model(), chat_tokenizer(), CASES, "prefix")
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="chat template"):
        bench_chain(tiny_model(), tokenizer, CASES)
