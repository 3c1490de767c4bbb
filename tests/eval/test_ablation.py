"""Every selection is measured on every prompt, at the same cost."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.eval import Case, Results
from chunkcache.eval.ablation import BENCH, VARIANTS, ablate, summary

CASES = [Case(QUESTION, TEXTS), Case("Who wrote down the weather?", TEXTS[::-1])]
RECOMPUTED = [variant.name for variant in VARIANTS if "nothing" not in variant.name and variant.stop == 1]


@pytest.fixture(scope="module")
def measured():
    return ablate(Results(BENCH, {}, {}), tiny_model(), chat_tokenizer(), CASES, 0.1)


def test_every_variant_has_a_row_for_every_prompt(measured):
    assert [(row["prompt"], row["variant"]) for row in measured.rows] == [
        (prompt, variant.name) for prompt in (0, 1) for variant in VARIANTS
    ]
    assert [row[0] for row in summary(measured)["tables"][0]["rows"]] == [variant.name for variant in VARIANTS]


def test_selections_cost_the_same(measured):
    shares = {each["variant"]: each["recomputed_share"] for each in summary(measured)["variants"]}
    none, default = shares["nothing recomputed"], shares[VARIANTS[0].name]
    assert none < default
    for name in RECOMPUTED:
        assert shares[name] == pytest.approx(default, abs=0.03)


def test_a_run_goes_on_with_the_prompt_that_it_was_at(measured):
    cut = Results(BENCH, {}, {}, rows=measured.rows[:-1])
    ablate(cut, tiny_model(), chat_tokenizer(), CASES, 0.1)
    assert len(cut.rows) == 3 * len(VARIANTS) - 1
    for one, other in zip(summary(measured)["variants"], summary(cut)["variants"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
