"""A comparison has a row per prompt and policy, measured against full prefill of the same prompt."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.eval import Case, compare, measure_fidelity
from chunkcache.eval.memory import PeakMemory

CASES = [Case(QUESTION, TEXTS), Case("Who wrote down the weather?", TEXTS[::-1])]
POLICIES = ("full", "prefix", "reuse", "cacheblend:ratio=1", "query")


@pytest.fixture(scope="module")
def comparison():
    return compare(tiny_model(), chat_tokenizer(), CASES, POLICIES)


def test_every_policy_has_a_row_for_every_prompt(comparison):
    names = comparison.meta["policies"]
    assert len(names) == len(POLICIES)
    assert [(row.prompt, row.policy) for row in comparison.rows] == [(i, name) for i in (0, 1) for name in names]
    assert [summary.policy for summary in comparison.summaries()] == names


def test_exact_policies_agree_with_full_prefill_and_reuse_does_not(comparison):
    for row in comparison.rows:
        if row.policy.startswith(("full", "prefix", "cacheblend")):
            assert row.agreement == 1
            assert abs(row.kl_first) < 1e-4
            assert abs(row.kl_mean) < 1e-4
        if row.policy == "reuse":
            assert row.kl_first > 1e-3


def test_ratios_are_to_full_prefill_of_the_same_prompt(comparison):
    for row in comparison.rows:
        assert row.ttft_ratio == pytest.approx(row.ttft_s / row.full_ttft_s)
        assert row.ttft_ratio == 1 or row.policy != "full"


def test_fidelity_is_what_its_formulas_say():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    policy = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    fidelity = measure_fidelity(full, policy)
    assert fidelity.kl_first == pytest.approx(kl)
    assert fidelity.kl_mean == pytest.approx(kl / 2)
    assert fidelity.agreement == 0.5


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    assert peak.nbytes is None or peak.nbytes > 60 * 2**20
