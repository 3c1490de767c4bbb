"""What is bounded in one engine, what is freed, and what is counted; its store holds little."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from support.vllm_engine import (
    ask,
    counted,
    drain,
    engine,
    figures,
    finish,
    generation,
    ids_of,
    made_prompt,
    sides,
)

from chunkcache.integrations.vllm import scheduler as scheduling_module

POLICY = "link:k=4"
LARGE = 1200  # tokens of a chunk that the store is too small for


@pytest.fixture(scope="module")
def llm(folders):
    with engine(folders("llama"), "memory://?max_bytes=3MiB", extra={"policy": POLICY, "lookup_s": 0.5}) as llm:
        yield llm


@pytest.fixture
def scheduling(llm):
    return sides(llm)[0]._scheduling


def grown(llm, before):
    return {name: value - before.get(name, 0) for name, value in counted(llm).items()}


def test_a_chunk_that_the_store_cannot_hold_is_left_to_the_engine_and_not_tried_again(llm, reference, scheduling):
    prompt, before = made_prompt(1, chunks=1, length=LARGE, pool=1), counted(llm)
    for _ in range(2):
        (output,) = ask(llm, (prompt, POLICY), warm=True)
        assert figures(output) is None
        assert ids_of(output) == reference.answer(prompt, "full")
        drain(llm)
    counts = grown(llm, before)
    assert counts["chunkcache_failed", None] == 1
    assert counts["chunkcache_computed", None] == 1  # what stands before it
    assert counts["chunkcache_cold", None] == 2
    assert not scheduling.busy


def test_what_could_not_be_stored_is_tried_again_after_a_while(llm, reference, monkeypatch):
    monkeypatch.setattr(scheduling_module, "RETRY_S", 0.0)
    prompt, before = made_prompt(1, chunks=1, length=LARGE, pool=2), counted(llm)
    for _ in range(2):
        ask(llm, (prompt, POLICY))
        drain(llm)
    assert grown(llm, before)["chunkcache_failed", None] == 2


def test_few_requests_are_looked_up_at_a_time(llm, reference, scheduling, monkeypatch):
    monkeypatch.setattr(scheduling_module, "LOOKING", 2)
    prompts = [made_prompt(seed, pool=3) for seed in range(5)]
    ask(llm, (prompts[0], POLICY), warm=True)
    monkeypatch.setattr(scheduling, "_options", dataclasses.replace(scheduling._options, step_tokens=1))
    for prompt in prompts:
        llm.enqueue(*generation(prompt, POLICY), use_tqdm=False)
    outputs, most = [], 0
    while llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in llm.llm_engine.step() if output.finished]
        most = max(most, len(scheduling._looking), len(sides(llm)[1]._working._found))
    assert most == 2
    outputs.sort(key=lambda output: int(output.request_id.split("-")[0]))
    assert [ids_of(output) for output in outputs] == [reference.answer(prompt, POLICY) for prompt in prompts]
    assert all(figures(output)["hits"] == 4 for output in outputs)


def test_few_chunks_wait_to_be_computed(llm, reference, scheduling, monkeypatch):
    monkeypatch.setattr(scheduling_module, "QUEUED", 2)
    prompt, orders = made_prompt(1, pool=4), scheduling.orders
    hits, queued = [], []

    def counting():
        queued.append(len(scheduling._queue))
        return orders()

    monkeypatch.setattr(scheduling, "orders", counting)
    for _ in range(4):
        (output,) = ask(llm, (prompt, POLICY))
        drain(llm)
        hits.append((figures(output) or {"hits": 0})["hits"])
    assert hits == [0, 1, 3, 4]
    assert max(queued) == 2
    assert ids_of(output) == reference.answer(prompt, POLICY)


def test_a_request_that_no_answer_comes_for_is_served_without_reuse(llm, reference, monkeypatch):
    prompt, before = made_prompt(1, pool=5), counted(llm)
    ask(llm, (prompt, POLICY), warm=True)
    with monkeypatch.context() as patch:
        patch.setattr(sides(llm)[1]._working, "look_up", lambda lookups: None)
        (output,) = ask(llm, (prompt, POLICY))
    assert figures(output) is None
    assert ids_of(output) == reference.answer(prompt, "full")
    assert grown(llm, before)["chunkcache_timeouts", None] == 1
    assert ids_of(ask(llm, (prompt, POLICY))[0]) == reference.answer(prompt, POLICY)


@pytest.mark.parametrize(("steps", "warm"), itertools.product(range(5), (False, True)))
def test_a_request_that_leaves_frees_everything(steps, warm, llm, scheduling):
    working = sides(llm)[1]._working
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    stored, other = made_prompt(11, pool=11), made_prompt(12, pool=20 + steps)
    ask(llm, (stored, POLICY), warm=True)
    free = pool.get_num_free_blocks()
    for prompt in (stored, other):  # one that is fused, and one whose chunks are missing
        (name,) = llm.enqueue(*generation(prompt, POLICY, 50, warm=warm), use_tqdm=False)
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([name], internal=True)
    assert not llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.step()
    drain(llm)
    held = scheduling._requests, scheduling._looking, scheduling._done, scheduling._queue
    assert not any((*held, working._found, working._reading, working._done))
    assert pool.get_num_free_blocks() == free


def test_fused_blocks_are_of_one_request_alone(llm, reference):
    prompt, before = made_prompt(1, pool=12), counted(llm)
    for policy in (POLICY, POLICY, "reuse"):
        (output,) = ask(llm, (prompt, policy), warm=True)
        assert ids_of(output) == reference.answer(prompt, policy)
    assert grown(llm, before)["prefix_cache_hits", None] == 0
    (plain,) = ask(llm, (prompt, False))
    assert ids_of(plain) == reference.answer(prompt, "full")
    assert plain.num_cached_tokens == 0


def test_a_request_with_a_salt_of_its_own_is_left_to_the_engine(llm, reference):
    prompt, before = made_prompt(1, pool=13), counted(llm)
    ask(llm, (prompt, POLICY), warm=True)
    given, params = generation(prompt, POLICY)
    for client, cached in (("one", False), ("two", False), ("one", True)):
        (output,) = llm.generate([{**given, "cache_salt": client}], params, use_tqdm=False)
        assert figures(output) is None
        assert ids_of(output) == reference.answer(prompt, "full")
        assert (output.num_cached_tokens > 0) == cached
    assert grown(llm, before)["chunkcache_refused", None] == 3


def test_cached_tokens_are_those_that_were_placed_by_tier(llm):
    stored, longer = made_prompt(3, pool=14), made_prompt(3, chunks=5, length=160, pool=14)
    ask(llm, (stored, POLICY), warm=True)
    before = counted(llm)
    (output,) = ask(llm, (longer, POLICY))
    placed = figures(output)["placed"]
    assert output.num_cached_tokens == placed < len(longer.token_ids) - 180
    counts = grown(llm, before)
    assert counts["prompt_tokens_cached", None] == counts["chunkcache_placed_tokens", None] == placed
    assert counts["chunkcache_tier_tokens", "memory"] == placed
    assert counts["prompt_tokens_cached_by_source", "host"] == placed
    assert counts["prompt_tokens_cached_by_source", "external_unspecified"] == len(longer.token_ids) - 1 - placed


def test_what_is_lost_before_it_is_loaded_is_not_counted_as_cached(llm, reference):
    prompt = made_prompt(4, pool=15)
    ask(llm, (prompt, POLICY), warm=True)
    before = counted(llm)
    llm.enqueue(*generation(prompt, POLICY), use_tqdm=False)
    llm.llm_engine.step()  # in which it is looked up
    sides(llm)[1]._working._found.clear()
    (output,) = finish(llm)
    assert figures(output) is None
    assert ids_of(output) == reference.answer(prompt, "full")
    assert output.num_cached_tokens == 0
    counts = grown(llm, before)
    assert counts["prompt_tokens_cached", None] == 0
    assert counts["chunkcache_failed", None] == 1
    assert counts["chunkcache_placed_tokens", None] == 0
    assert counts["external_prefix_cache_hits", None] > 0  # vLLM's own, which counts promises


def test_no_token_ids_are_in_what_vllm_logs_of_a_step_that_fails():
    from vllm.logging_utils.dump_input import prepare_object_to_dump

    from chunkcache.integrations.vllm.messages import Lookup, Missing, Orders
    from chunkcache.integrations.vllm.spec import ChunkSpec

    ids = (4711, 4712)
    spec = ChunkSpec(0, ((0, 1),), {0: (0, ids)})
    text = prepare_object_to_dump(Orders([], [Lookup("one", ids, spec)], [Missing(ids, ids, POLICY)], ["two"]))
    assert "one" in text
    assert "two" in text
    assert "471" not in text
