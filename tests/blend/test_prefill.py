"""Selective prefill never touches the model, whatever happens, and requests do not meet one another."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import POLICIES, Decoder, Plan, SelectivePrefill, layer_kv
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.link import Link
from chunkcache.blend.policy import Policy
from chunkcache.blend.prefix import Prefix
from chunkcache.errors import PolicyError, PromptError

IDS = h.random_ids()
EVERY = [kind() for kind in POLICIES.values()]

every_policy = pytest.mark.parametrize("policy", EVERY, ids=list(POLICIES))


def assert_same(value, expected):
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


def hooks_of(model):
    return {
        (name, attribute): list(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hook" in attribute and value
    }


def state(model):
    """All that a prefill could leave behind: hooks, attributes, and the attention implementation."""
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return hooks_of(model), attributes, model.config._attn_implementation, model.generation_config.to_dict()


@pytest.fixture(params=["sdpa", "eager"])
def borrowed(request):
    """A decoder and a plan; afterwards the model must be as it was before."""
    decoder = h.decoder("llama", request.param)
    before = state(decoder.model)
    assert before[0] == {}
    yield decoder, h.chunk_plan(decoder.model, IDS)
    assert state(decoder.model) == before


def run(decoder, plan, policy, **options):
    return SelectivePrefill(decoder, plan, policy, **options).run()


def generate(decoder, plan, policy, **options):
    ids = torch.tensor([plan.token_ids])
    options = {"max_new_tokens": 3, "attention_mask": torch.ones_like(ids), **options}
    return SelectivePrefill(decoder, plan, policy).generate(ids, **options)


def fail(*_, **__):
    raise ZeroDivisionError


@every_policy
def test_the_model_is_as_it_was_after_success(borrowed, policy):
    run(*borrowed, policy)
    generate(*borrowed, policy)


@every_policy
@pytest.mark.parametrize("layer", [0, 1, zoo.LAYERS - 1])
@pytest.mark.parametrize("job", [run, generate])
def test_the_model_is_as_it_was_after_a_failure_in_a_layer(borrowed, policy, layer, job):
    handle = borrowed[0].layers[layer].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            job(*borrowed, policy)
    finally:
        handle.remove()
    job(*borrowed, policy)


@every_policy
def test_the_model_is_as_it_was_after_a_failure_while_decoding(borrowed, policy):
    with pytest.raises(ZeroDivisionError):
        generate(*borrowed, policy, stopping_criteria=[fail])


@pytest.mark.parametrize("method", ["select", "filter_rows"])
def test_the_model_is_as_it_was_after_a_failing_policy(borrowed, method):
    failing = type("Failing", (CacheBlend,), {method: fail})
    with pytest.raises(ZeroDivisionError):
        run(*borrowed, failing())


def test_a_filter_layer_beyond_the_model_is_refused_and_not_a_full_prefill_in_silence(borrowed):
    with pytest.raises(PolicyError, match=rf"layer.*99.*{zoo.LAYERS} layers"):
        run(*borrowed, CacheBlend(layer=99))


def test_the_model_is_as_it_was_after_a_failure_at_the_end(borrowed):
    with pytest.raises(ZeroDivisionError):
        run(*borrowed, Link(), keep=fail)


def test_the_model_is_as_it_was_when_nothing_is_run(borrowed):
    prefill = SelectivePrefill(*borrowed, Link())
    assert "forward" in vars(prefill.model)
    assert not prefill.cache.prefilled


@every_policy
def test_the_model_is_as_it_was_in_the_midst_of_a_prefill(borrowed, policy):
    decoder, plan = borrowed
    before, seen = state(decoder.model), []
    mlp = decoder.layers[-1].mlp
    handle = mlp.register_forward_hook(lambda *_: seen.append(state(decoder.model)))
    try:
        run(decoder, plan, policy)
    finally:
        handle.remove()
    hooks, *rest = seen[0]
    assert set(hooks) == {(f"model.layers.{zoo.LAYERS - 1}.mlp", "_forward_hooks")}
    assert rest == list(before[1:])


@every_policy
def test_no_hook_is_left_to_run_while_tokens_are_decoded(borrowed, policy):
    prefill = SelectivePrefill(*borrowed, policy)
    assert "forward" in vars(prefill.model)
    prefill.run()
    assert hooks_of(prefill.model) == {}
    assert "forward" not in vars(prefill.model)


def test_a_hook_of_the_users_own_on_the_model_still_runs(borrowed):
    decoder, plan = borrowed
    seen = []
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in (decoder.model, decoder.layers[0], decoder.attentions[0])
    ]
    try:
        run(decoder, plan, Link())
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 3


@every_policy
def test_what_is_kept_of_a_chunk_is_whole_though_windows_are_trimmed(policy):
    decoder = h.decoder("gemma3")
    plan = h.chunk_plan(decoder.model, IDS)
    prefill = SelectivePrefill(decoder, plan, policy, keep=lambda span: span.start == 6)
    prefill.run()
    whole = SelectivePrefill(decoder, plan, policy, trim=False)
    whole.run()
    assert [layer_kv(whole.cache, index)[0].shape[2] for index in range(zoo.LAYERS)] == [len(IDS)] * zoo.LAYERS
    assert list(prefill.computed) == [6]
    assert prefill.computed[6].token_ids == IDS[6:36]
    for layer, wanted in zip(prefill.computed[6].layers, h.layers_of(whole.cache, 6, 36), strict=True):
        assert_same(layer, wanted)


@every_policy
def test_the_kv_of_a_request_are_freed_with_it(policy):
    decoder = h.decoder("gemma3")
    plan = h.chunk_plan(decoder.model, IDS)
    gc.collect()
    gc.disable()
    try:
        prefill = SelectivePrefill(decoder, plan, policy)
        prefill.run()
        kept = weakref.ref(prefill.cache)
        del prefill
        assert kept() is None
    finally:
        gc.enable()


def test_stored_kv_are_let_go_of_once_the_prompt_is_prefilled():
    decoder = h.decoder("llama")
    plan = h.chunk_plan(decoder.model, IDS)
    prefill = SelectivePrefill(decoder, plan, Link())
    stored = weakref.ref(plan.reused[1].kv)
    prefill.run()
    del plan
    assert stored() is None
    assert len(prefill.cache.plan) == len(IDS)


@pytest.mark.parametrize(
    "input_ids", [[IDS[:5]], [IDS, IDS], [(5, *IDS[1:])], [IDS[:1]]], ids=["short", "two", "other", "one token"]
)
def test_an_input_that_is_not_the_plans_is_refused(borrowed, input_ids):
    prefill = SelectivePrefill(*borrowed, Link())
    shape = (len(input_ids), len(input_ids[0]))
    with pytest.raises(PromptError, match=rf"shape \({shape[0]}, {shape[1]}\).*one sequence of 90 tokens"):
        prefill.model(input_ids=torch.tensor(input_ids), past_key_values=prefill.cache)


def test_input_ids_may_be_given_by_position(borrowed):
    decoder, plan = borrowed
    prefill = SelectivePrefill(decoder, plan, Link())
    with torch.no_grad():
        logits = prefill.model(torch.tensor([IDS]), past_key_values=prefill.cache).logits
    assert_same(logits[0, -1], run(decoder, plan, Link()))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_mode_of_generate_with_several_sequences_is_refused(borrowed, options):
    with pytest.raises(PromptError, match=r"prefill the cache first and pass it on"):
        generate(*borrowed, Link(), **options)


@every_policy
def test_tokens_to_verify_may_stand_behind_the_prompt(policy):
    """Assisted generation puts its candidates there."""
    decoder = h.decoder("llama")
    candidates = (7, 8, 9)
    plan = h.right_plan(IDS, h.own_prefill(decoder.model, IDS)[1])
    prefill = SelectivePrefill(decoder, plan, policy)
    with torch.no_grad():
        logits = prefill.model(input_ids=torch.tensor([(*IDS, *candidates)]), past_key_values=prefill.cache).logits[0]
    expected, _ = h.own_prefill(decoder.model, (*IDS, *candidates))
    assert_same(logits[-4:], expected[-4:])
    assert prefill.cache.get_seq_length() == len(IDS) + 3


def own(model):
    return h.own_prefill(model, IDS)[0]


@every_policy
@pytest.mark.parametrize("layer", [0, 1, zoo.LAYERS - 1])
def test_a_forward_of_another_thread_in_the_midst_of_a_prefill_passes_untouched(borrowed, policy, layer):
    decoder, plan = borrowed
    expected, logits = own(decoder.model), run(decoder, plan, policy)
    results = []

    def run_another(*_):
        if threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as pool:
                results.append(pool.submit(own, decoder.model).result())

    handle = decoder.layers[layer].mlp.register_forward_hook(run_another)
    try:
        assert_same(run(decoder, plan, policy), logits)
    finally:
        handle.remove()
    assert_same(results[0], expected)


@every_policy
def test_a_forward_of_the_shadow_with_another_cache_passes_untouched(borrowed, policy):
    decoder, plan = borrowed
    expected = own(decoder.model)
    prefill = SelectivePrefill(decoder, plan, policy)
    assert_same(own(prefill.model), expected)
    assert_same(prefill.run(), run(decoder, plan, policy))
    assert_same(own(prefill.model), expected)


def test_prefills_of_several_threads_do_not_meet():
    decoder = h.decoder("llama")
    plans = [h.chunk_plan(decoder.model, h.random_ids(seed=seed)) for seed in range(4)]
    jobs = [(decoder, plan, policy) for plan in plans for policy in EVERY] * 2
    expected = [run(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: run(*job), jobs))
    for result, wanted in zip(results, expected, strict=True):
        assert_same(result, wanted)


def test_two_check_layers_cut_the_rows_twice():
    class Twice(Policy):
        name = "twice"

        def filter_layers(self, layers):
            return [1, 2]

        def select(self, plan):
            return plan.inexact

        def filter_rows(self, check):
            rows = check.rows
            seen.append(rows.tolist())
            return torch.arange(1, len(rows), 2) if len(seen) == 1 else torch.arange(len(rows) // 2, len(rows))

    seen = []
    decoder = h.decoder("gemma3")
    frozen = h.alone(decoder.model, IDS)
    prefill = h.Selective(decoder, Plan.of(IDS, [span(0, frozen, 0, h.TOKENS)]), Twice())
    assert seen == [list(range(90)), list(range(1, 90, 2))]
    assert prefill.rows.tolist() == list(range(45, 90, 2))
    logits, reference = h.own_prefill(decoder.model, IDS, cache=h.FrozenCache(frozen.layers, prefill.rows_at))
    assert_same(prefill.logits, logits[prefill.rows])
    for layer, wanted in zip(prefill.layers, h.layers_of(reference), strict=True):
        assert_same(layer, wanted)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(length):
    decoder = Decoder(zoo.build("llama"))
    ids = IDS[:length]
    plan = Plan.of(ids, [span(0, h.alone(decoder.model, ids), 0, length)])
    expected, _ = h.own_prefill(decoder.model, ids)
    for policy in EVERY:
        assert_same(run(decoder, plan, policy), expected[-1])


def test_nothing_stored_is_a_plain_prefill():
    decoder = h.decoder("llama")
    for policy in (*EVERY, Prefix()):
        assert_same(run(decoder, Plan.of(IDS), policy), own(decoder.model)[-1])
