"""Cache-Craft from request to request: what is computed in context is stored, found again, and worth something."""

from __future__ import annotations

import pytest
import torch
from support.llm import QUESTION, TEXTS, own_model, wrapped

from chunkcache import blend
from chunkcache.blend.cachecraft import CacheCraft
from chunkcache.engine.stats import RequestStats

WHOLE = CacheCraft(alpha=2.0, focus=1.0)  # of a chunk in another context, everything is computed again


def full_logits(llm, chunks):
    return llm.prefill(QUESTION, chunks, policy="full").logits


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
def test_the_same_prompt_again_is_exact_and_costs_only_the_question(name):
    llm = wrapped(own_model(name), policy=WHOLE)
    first, second = (llm.prefill(QUESTION, TEXTS) for _ in range(2))
    for prefilled in (first, second):
        torch.testing.assert_close(prefilled.logits, full_logits(llm, TEXTS), atol=1e-4, rtol=0)
    assert (first.stats.hits, first.stats.misses) == (0, 3)
    assert (second.stats.hits, second.stats.misses) == (3, 0)
    question = len(llm.prompts.build(QUESTION, ()).question)
    assert second.stats.recomputed_share == pytest.approx(question / second.stats.tokens)


def test_a_chunk_computed_alone_is_the_fallback_and_has_no_overlap():
    llm = wrapped(policy=CacheCraft(alpha=0.5, focus=1.0))
    llm.precompute(TEXTS)
    prompt = llm.prompts.build(QUESTION, TEXTS)
    stats = RequestStats("cachecraft")
    plan = llm.engine.planner.plan(prompt, llm.policy, stats)
    assert (stats.hits, stats.misses) == (3, 0)
    for span in plan.reused[2:]:
        assert span.kv.context.chunks == ()
        assert llm.policy.overhead(span.kv.context, ["anything"]) == 0.25
    assert len(llm.policy.select(plan)) == sum(-(-len(span) // 4) for span in plan.reused[2:])


def test_of_several_versions_the_one_whose_context_is_there_again_is_used():
    llm = wrapped(policy=WHOLE)
    for order in (TEXTS, TEXTS[::-1]):
        llm.prefill(QUESTION, order)
    for order in (TEXTS, TEXTS[::-1]):
        again = llm.prefill(QUESTION, order)
        assert again.stats.misses == 0
        torch.testing.assert_close(again.logits, full_logits(llm, order), atol=1e-4, rtol=0)


def test_a_version_that_the_store_has_dropped_is_computed_again():
    llm = wrapped(policy=WHOLE)
    llm.prefill(QUESTION, TEXTS)
    llm.store.clear()
    again = llm.prefill(QUESTION, TEXTS)
    assert again.stats.misses == 3
    torch.testing.assert_close(again.logits, full_logits(llm, TEXTS), atol=1e-4, rtol=0)


def test_every_use_of_a_version_is_credited_in_the_store():
    llm = wrapped(policy=WHOLE)
    for _ in range(3):
        llm.prefill(QUESTION, TEXTS)
    uses = sorted(entry.uses for entry in llm.store.entries())
    assert uses[-2:] == [202.0, 202.0]  # two uses at no overhead, of two versions in context


def test_other_policies_never_see_what_was_computed_behind_repaired_kv():
    llm = wrapped()
    llm.precompute(TEXTS, policy="cachecraft")
    before = llm.prefill(QUESTION, TEXTS, policy="reuse").logits
    llm.prefill(QUESTION, TEXTS, policy=WHOLE)
    torch.testing.assert_close(llm.prefill(QUESTION, TEXTS, policy="reuse").logits, before)


def test_a_store_warmed_for_another_policy_is_computed_again_to_be_recorded():
    llm = wrapped()
    assert llm.precompute(TEXTS, policy="reuse").computed == 3
    assert llm.precompute(TEXTS, policy="cachecraft").computed == 3
    assert llm.precompute(TEXTS, policy="cachecraft").computed == 0
    assert llm.precompute(TEXTS, policy="reuse").computed == 0


def test_other_policies_store_no_versions():
    for name, policy in blend.POLICIES.items():
        llm = wrapped(policy=name)
        llm.prefill(QUESTION, TEXTS)
        recorded = [entry for entry in llm.store.entries() if llm.store.get(entry.key, None).context is not None]
        assert bool(recorded) == policy.versioned
