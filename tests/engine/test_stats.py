"""The numbers of a request add up and say what was done."""

from __future__ import annotations

import json

import pytest
from support.llm import QUESTION, TEXTS, tiny_model, wrapped

from chunkcache.blend import Decoder, Plan, SelectivePrefill, parse_policy
from chunkcache.engine.stats import RequestStats

LAYERS = 4


@pytest.fixture(scope="module")
def llm():
    llm = wrapped(policy="reuse")
    llm.precompute(TEXTS)
    return llm


def lengths(llm) -> tuple[int, list[int], int]:
    prompt = llm.prompts.build(QUESTION, TEXTS)
    return len(prompt.prefix), [len(chunk) for chunk in prompt.chunks], len(prompt.question)


def test_they_are_json(llm):
    stats = llm.prefill(QUESTION, TEXTS).stats
    assert json.loads(json.dumps(stats.as_dict())) == stats.as_dict()
    assert stats.as_dict()["policy"] == "reuse"


def test_reuse_counts_every_chunk_and_computes_only_the_question(llm):
    prefix, chunks, question = lengths(llm)
    stats = llm.prefill(QUESTION, TEXTS).stats
    assert (stats.chunks, stats.hits, stats.misses, stats.fallbacks) == (3, 3, 0, 0)
    assert stats.tokens == prefix + sum(chunks) + question
    assert stats.reused_tokens == prefix + sum(chunks)
    assert stats.exact_tokens == prefix + chunks[0]
    assert stats.recomputed_share == pytest.approx(question / stats.tokens)


def test_full_reuses_nothing(llm):
    stats = llm.prefill(QUESTION, TEXTS, policy="full").stats
    assert (stats.hits, stats.reused_tokens, stats.recomputed_share, stats.fallbacks) == (0, 0, 1.0, 0)
    assert stats.chunks == 3


def test_link_recomputes_the_first_tokens_of_each_later_chunk(llm):
    _, _, question = lengths(llm)
    stats = llm.prefill(QUESTION, TEXTS, policy="link:k=5").stats
    assert stats.recomputed_share == pytest.approx((question + 2 * 5) / stats.tokens)


def test_cacheblend_counts_token_layers(llm):
    _, chunks, question = lengths(llm)
    stats = llm.prefill(QUESTION, TEXTS, policy="cacheblend:ratio=0.5").stats
    inexact = sum(chunks[1:])
    computed = (question + inexact) + (LAYERS - 1) * (question + -(-inexact // 2))
    assert stats.recomputed_share == pytest.approx(computed / (LAYERS * stats.tokens))


def test_a_missing_chunk_is_a_miss():
    llm = wrapped()
    llm.precompute(TEXTS[:1])
    stats = llm.prefill(QUESTION, TEXTS).stats
    assert (stats.hits, stats.misses) == (1, 2)
    assert llm.prefill(QUESTION, TEXTS).stats.misses == 0


@pytest.mark.parametrize("policy", ["full", "reuse"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=str)
def test_the_prompt_is_counted_alike_in_every_mode(llm, policy, options):
    prefix, chunks, question = lengths(llm)
    stats = llm.generate(QUESTION, TEXTS, policy=policy, max_new_tokens=8, **options).stats
    assert stats.tokens == prefix + sum(chunks) + question
    assert 0 < stats.recomputed_share <= 1


def test_the_parts_are_within_the_whole():
    llm = wrapped()
    for stats in (llm.prefill(QUESTION, TEXTS).stats, llm.generate(QUESTION, TEXTS, max_new_tokens=2).stats):
        assert stats.tokenize_s + stats.lookup_s + stats.compute_s + stats.prefill_s <= stats.ttft_s + 1e-9
        assert 0 < stats.assemble_s <= stats.prefill_s
        assert 0 < stats.lookup_s < stats.ttft_s


def test_only_a_missing_chunk_takes_time_to_compute(llm):
    assert llm.prefill(QUESTION, TEXTS).stats.compute_s == 0
    assert wrapped().prefill(QUESTION, TEXTS).stats.compute_s > 0


def test_a_cache_put_aside_is_a_fallback():
    ids = list(range(10, 30))
    prefill = SelectivePrefill(Decoder(tiny_model()), Plan.of(ids), parse_policy("reuse"))
    stats = RequestStats("reuse")
    stats.take(Plan.of(ids), prefill)  # whose cache no forward was handed
    assert (stats.fallbacks, stats.recomputed_share) == (1, 1.0)
