"""The chain benchmark: three ways over the same prompts, and figures that belong together."""

from __future__ import annotations

import copy
import statistics

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.errors import PolicyError, PromptError
from chunkcache.eval import Case, Results
from chunkcache.eval.chain import BENCH, bench_chain, summary

CASES = [
    Case(QUESTION, TEXTS, ("1931",)),
    Case("Who wrote down the weather?", TEXTS[:0:-1]),
    Case(QUESTION, TEXTS[:1]),
]


def run(cases, policy="query", tokenizer=None, **options):
    results = Results(BENCH, {}, {})
    return bench_chain(results, tiny_model(), tokenizer or chat_tokenizer(), cases, policy, rounds=1, **options)


@pytest.fixture(scope="module")
def bench():
    seen = []
    bench = run(CASES, on_prompt=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    return bench


def test_every_prompt_has_its_row(bench):
    assert [(row["prompt"], row["chunks"]) for row in bench.rows] == [(0, 3), (1, 2), (2, 1)]
    for row in bench.rows:
        assert 0 < row["reused_tokens"] < row["tokens"]


def test_the_answers_are_the_direct_calls(bench):
    assert all(row["equal"] for row in bench.rows)


def test_times_belong_together(bench):
    for row in bench.rows:
        assert min(row["plain_ttft_s"], row["chain_ttft_s"], row["direct_ttft_s"]) > 0
        assert 0 < 1000 * row["retrieve_s"] < row["layer_ms"] < 1000 * row["chain_ttft_s"]
        assert row["overhead_ms"] == pytest.approx(1000 * (row["chain_ttft_s"] - row["direct_ttft_s"]))
        assert row["speedup"] == pytest.approx(row["plain_ttft_s"] / row["chain_ttft_s"])


def test_the_summary_is_that_of_the_rows(bench):
    sums, rows = summary(bench), bench.rows
    assert sums["speedup"] == statistics.median(row["speedup"] for row in rows)
    assert sums["equal"] == 1
    assert sums["f1"] == rows[0]["f1"] is not None
    assert rows[1]["f1"] is None
    [table] = sums["tables"]
    assert ["plain over plug-in", f"{sums['speedup']:.3f}"] in table["rows"]


def test_exact_reuse_answers_as_plain_transformers_do():
    """The direct call and the plug-in are compared with a chat model that has nothing of ours in it."""
    bench = run(CASES[:2], "cacheblend:ratio=1")
    assert [row["plain_equal"] for row in bench.rows] == [True, True]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(PolicyError, match="prefix"):
        run(CASES, "prefix")
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="chat template"):
        run(CASES, tokenizer=tokenizer)
