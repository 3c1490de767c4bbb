"""Selective prefill borrows the model: it gives it back as it was, whatever happens, and disturbs nobody else."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import helpers_blend as h
import pytest
import torch
import zoo

from chunkcache.blend import POLICIES, Decoder, Plan, Segment, SelectivePrefill, layer_kv
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.link import Link
from chunkcache.blend.policy import Policy
from chunkcache.blend.prefix import Prefix
from chunkcache.errors import PromptError

IDS = h.random_ids()
EVERY = [kind() for kind in POLICIES.values()]

every_policy = pytest.mark.parametrize("policy", EVERY, ids=list(POLICIES))


def state(model):
    """All that a prefill could leave behind: hooks of every module, and the attention implementation."""
    hooks = {
        (name, attribute): dict(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hook" in attribute and value
    }
    return hooks, model.config._attn_implementation


def is_free(lock):
    """Whether another thread can take the lock."""
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lock.acquire, timeout=0.2).result()
        if taken:
            pool.submit(lock.release).result()
    return taken


@pytest.fixture(params=["sdpa", "eager"])
def borrowed(request):
    """A decoder and a plan; afterwards the model must be as it was before."""
    decoder = h.decoder("llama", request.param)
    before = state(decoder.model)
    assert before[0] == {}
    yield decoder, h.chunk_plan(decoder.model, IDS)
    assert state(decoder.model) == before
    assert is_free(decoder.lock)


def prefilled(decoder, plan, policy):
    with SelectivePrefill(decoder, plan, policy) as prefill:
        return decoder.prefill(torch.tensor([plan.token_ids]), prefill.cache)


def generated(decoder, plan, policy, **options):
    ids = torch.tensor([plan.token_ids])
    with SelectivePrefill(decoder, plan, policy) as prefill:
        options = {"max_new_tokens": 3, "attention_mask": torch.ones_like(ids), **options}
        return decoder.model.generate(ids, past_key_values=prefill.cache, **options)


@every_policy
def test_the_model_is_as_it_was_after_success(borrowed, policy):
    prefilled(*borrowed, policy)
    generated(*borrowed, policy)


@every_policy
@pytest.mark.parametrize("layer", [0, 1, zoo.LAYERS - 1])
@pytest.mark.parametrize("run", [prefilled, generated])
def test_the_model_is_as_it_was_after_a_failure_in_a_layer(borrowed, policy, layer, run):
    decoder, plan = borrowed

    def fail(*_):
        raise ZeroDivisionError

    handle = decoder.layers[layer].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            run(decoder, plan, policy)
    finally:
        handle.remove()


@every_policy
def test_the_model_is_as_it_was_after_a_failure_while_decoding(borrowed, policy):
    def fail(ids, scores, **_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generated(*borrowed, policy, stopping_criteria=[fail])


def test_the_model_is_as_it_was_after_a_failing_policy(borrowed):
    class Failing(Policy):
        name = "failing"
        check_layers = frozenset({1})

        def select(self, plan):
            return plan.inexact

        def narrow(self, plan, rows, fresh, stored):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prefilled(*borrowed, Failing())


def test_the_model_is_as_it_was_after_a_failing_callback(borrowed):
    decoder, plan = borrowed

    def fail(cache):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), SelectivePrefill(decoder, plan, Link(), fail) as prefill:
        decoder.prefill(torch.tensor([IDS]), prefill.cache)


def test_the_model_is_as_it_was_after_a_context_without_a_forward(borrowed):
    with SelectivePrefill(*borrowed, Link()) as prefill:
        assert state(borrowed[0].model)[0]
    assert not prefill.cache.prefilled


@every_policy
def test_no_hook_is_left_to_run_while_tokens_are_decoded(borrowed, policy):
    """Hooks of layers and the attention in place of SDPA end with the first forward, not with the context."""
    decoder, plan = borrowed
    with SelectivePrefill(decoder, plan, policy) as prefill:
        before = state(decoder.model)
        decoder.prefill(torch.tensor([IDS]), prefill.cache)
        assert state(decoder.model) == before
        assert is_free(decoder.lock)


@every_policy
def test_the_callback_sees_the_whole_prompt_before_windows_are_trimmed(policy):
    decoder, seen = h.decoder("gemma3"), []

    def keep(cache):
        assert cache.prefilled
        seen.extend(layer_kv(cache, index)[0].shape[2] for index in range(zoo.LAYERS))

    with SelectivePrefill(decoder, h.chunk_plan(decoder.model, IDS), policy, keep) as prefill:
        decoder.prefill(torch.tensor([IDS]), prefill.cache)
    assert seen == [len(IDS)] * zoo.LAYERS


@pytest.mark.parametrize("shape", [(1, 5), (2, h.TOKENS), (1, h.TOKENS + 1), (1, 1)])
def test_an_input_that_is_not_the_plans_is_refused(borrowed, shape):
    decoder, plan = borrowed
    with SelectivePrefill(decoder, plan, Link()) as prefill:
        with pytest.raises(PromptError, match=rf"shape \({shape[0]}, {shape[1]}\).*one sequence of 90 tokens"):
            decoder.model(input_ids=torch.full(shape, 5), past_key_values=prefill.cache)
        assert is_free(decoder.lock)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_mode_of_generate_with_several_sequences_is_refused(borrowed, options):
    with pytest.raises(PromptError, match=r"prefill the cache first and pass it on"):
        generated(*borrowed, Link(), **options)


def test_input_ids_may_be_given_by_position(borrowed):
    decoder, plan = borrowed
    with SelectivePrefill(decoder, plan, Prefix()) as prefill, torch.no_grad():
        logits = decoder.model(torch.tensor([IDS]), past_key_values=prefill.cache).logits
    torch.testing.assert_close(logits[0, -1], h.own_prefill(decoder.model, IDS)[0][-1], atol=1e-4, rtol=0)


def own(model):
    return h.own_prefill(model, IDS)[0]


@every_policy
def test_a_forward_with_another_cache_passes_untouched(borrowed, policy):
    decoder, plan = borrowed
    expected = own(decoder.model)
    with SelectivePrefill(decoder, plan, policy) as prefill:
        assert torch.equal(own(decoder.model), expected)
        decoder.prefill(torch.tensor([IDS]), prefill.cache)
        assert torch.equal(own(decoder.model), expected)


@every_policy
@pytest.mark.parametrize("layer", [0, 1, zoo.LAYERS - 1])
def test_a_forward_of_another_thread_in_the_midst_of_a_prefill_passes_untouched(borrowed, policy, layer):
    decoder, plan = borrowed
    expected, logits = own(decoder.model), prefilled(decoder, plan, policy)
    results = []

    def run_another(*_):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                results.append(pool.submit(own, decoder.model).result())

    handle = decoder.layers[layer].mlp.register_forward_hook(run_another)
    try:
        assert torch.equal(prefilled(decoder, plan, policy), logits)
    finally:
        handle.remove()
    torch.testing.assert_close(results[0], expected, atol=1e-4, rtol=0)


def test_prefills_of_several_threads_do_not_meet():
    decoder = h.decoder("llama")
    plans = [h.chunk_plan(decoder.model, h.random_ids(seed=seed)) for seed in range(4)]
    jobs = [(decoder, plan, policy) for plan in plans for policy in EVERY]
    expected = [prefilled(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: prefilled(*job), jobs))
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, atol=1e-4, rtol=0)
    assert state(decoder.model) == ({}, "sdpa")


def test_two_check_layers_cut_the_rows_twice():
    class Twice(CacheBlend):
        name = "twice"
        check_layers = frozenset({1, 3})

        def narrow(self, plan, rows, fresh, stored):
            seen.append(rows.tolist())
            return torch.arange(0, len(rows), 2) if len(seen) == 1 else torch.arange(len(rows) // 2, len(rows))

    seen = []
    decoder = h.decoder("gemma3")
    plan = Plan.of(IDS, [Segment(0, h.alone(decoder.model, IDS), 0, h.TOKENS)])
    prefill = h.Selective(decoder, plan, Twice())
    assert seen == [list(range(90)), list(range(0, 90, 2))]
    assert prefill.rows.tolist() == list(range(44, 90, 2))
    frozen = [layer.clone() for layer in h.alone(decoder.model, IDS).layers]
    logits, reference = h.own_prefill(decoder.model, IDS, cache=h.FrozenCache(frozen, prefill.rows_at))
    torch.testing.assert_close(prefill.logits, logits[prefill.rows], atol=1e-4, rtol=0)
    for layer, wanted in zip(prefill.layers, h.layers_of(reference), strict=True):
        torch.testing.assert_close(layer, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(length):
    decoder = Decoder(zoo.build("llama"))
    ids = IDS[:length]
    plan = Plan.of(ids, [Segment(0, h.alone(decoder.model, ids), 0, length)])
    expected, _ = h.own_prefill(decoder.model, ids)
    for policy in EVERY:
        torch.testing.assert_close(prefilled(decoder, plan, policy), expected[-1:], atol=1e-4, rtol=0)
