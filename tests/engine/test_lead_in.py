"""Chunks computed behind a lead-in: no prompt holds it, and no answer depends on who computed them when."""

from __future__ import annotations

import pytest
import torch
from support.llm import QUESTION, TEXTS, own_model, wrapped
from transformers import DynamicCache

from chunkcache.prompt.builder import PromptBuilder

LEAD = "A passage of the kind that stands before others. It says nothing that matters here."
POLICY = "query:ratio=0"  # recomputes nothing: what is stored is all that counts


def computed_behind(llm, before, ids):
    """KV of `ids` as the model computes them behind `before`, per layer `[2, kv_heads, tokens, head_dim]`."""
    cache = DynamicCache()
    with torch.no_grad():
        llm.model(input_ids=torch.tensor([(*before, *ids)]), past_key_values=cache)
    return [torch.cat((layer.keys, layer.values))[:, :, len(before) :] for layer in cache.layers]


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
def test_a_chunk_is_stored_as_the_model_computes_it_behind_the_lead_in(name):
    llm = wrapped(own_model(name), lead_in=LEAD)
    llm.precompute(TEXTS, policy=POLICY)
    prefix, lead = llm.prompts.prefix(), llm.prompts.lead_in
    assert lead == llm.prompts.chunk(LEAD)
    for text in TEXTS:
        ids = llm.prompts.chunk(text)
        [key] = llm.keys([text], policy=POLICY)
        kv = llm.store.get(key, ids)
        assert kv.position == len(prefix) + len(lead)
        for layer, expected in zip(kv.layers, computed_behind(llm, (*prefix, *lead), ids), strict=True):
            torch.testing.assert_close(layer, expected, atol=1e-4, rtol=0)


def test_the_lead_in_is_in_no_prompt():
    llm = wrapped(lead_in=LEAD)
    prefilled = llm.prefill(QUESTION, TEXTS, policy=POLICY)
    assert tuple(prefilled.input_ids[0].tolist()) == llm.prompts.build(QUESTION, TEXTS).token_ids
    assert prefilled.past_key_values.get_seq_length() == prefilled.stats.tokens


def test_only_policies_that_want_it_get_it():
    llm = wrapped(lead_in=LEAD)
    for policy in ("reuse", "query:ratio=0,lead=0", POLICY):
        llm.precompute(TEXTS, policy=policy)
    policies = ("reuse", "query:ratio=0,lead=0", POLICY)
    logits = [llm.prefill(QUESTION, TEXTS, policy=policy).logits for policy in policies]
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)
    assert llm.store.stats().misses == 2  # the prefix, and prefix with lead-in, before they were stored


def test_the_first_chunk_is_exact_only_if_it_was_computed_right_behind_the_prefix():
    llm = wrapped(lead_in=LEAD)
    llm.precompute(TEXTS, policy=POLICY)
    prefix = len(llm.prompts.prefix())
    assert llm.prefill(QUESTION, TEXTS, policy=POLICY).stats.exact_tokens == prefix
    llm.precompute(TEXTS[:1], policy="reuse")
    first = len(llm.prompts.chunk(TEXTS[0]))
    assert llm.prefill(QUESTION, TEXTS, policy=POLICY).stats.exact_tokens == prefix + first


def test_a_chunk_that_fits_only_alone_is_computed_alone():
    llm = wrapped(lead_in=LEAD * 30)  # longer than the model's context
    llm.precompute(TEXTS, policy=POLICY)
    other = wrapped()
    expected = other.prefill(QUESTION, TEXTS, policy="reuse").logits
    torch.testing.assert_close(llm.prefill(QUESTION, TEXTS, policy=POLICY).logits, expected)


def test_an_answer_does_not_depend_on_whether_chunks_were_computed_ahead():
    warm, cold = wrapped(lead_in=LEAD), wrapped(lead_in=LEAD)
    warm.precompute(TEXTS, policy="query")
    torch.testing.assert_close(*(llm.prefill(QUESTION, TEXTS, policy="query").logits for llm in (warm, cold)))


def test_its_last_tokens_are_taken_and_it_may_be_empty():
    llm = wrapped(lead_in=LEAD)
    assert llm.prompts.lead_in == llm.prompts.chunk(LEAD)
    llm.precompute(TEXTS[:1], policy="query:lead=3")
    [kv] = [llm.store.get(key, None) for key in llm.keys(TEXTS[:1], policy="query:lead=3")]
    expected = computed_behind(llm, (*llm.prompts.prefix(), *llm.prompts.lead_in[-3:]), llm.prompts.chunk(TEXTS[0]))
    torch.testing.assert_close(kv.layers[-1], expected[-1], atol=1e-4, rtol=0)
    assert PromptBuilder(llm.tokenizer, lead_in=" ").lead_in == ()


def test_one_is_packaged():
    assert len(wrapped().prompts.lead_in) > 500
