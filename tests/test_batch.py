"""Requests that are answered together get the answers that they get alone, in the order they were asked."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from helpers_llm import TEXTS, own_model, plain, prompt_ids, snapshot, tiny_model, wrapped
from transformers import GenerationConfig

from chunkcache.blend.query import Query
from chunkcache.errors import ContextLengthError, InputError, PolicyError, PromptError
from chunkcache.store import MemoryStore

QUESTIONS = (
    "In which year was the bridge opened?",
    "Who wrote the weather down, every morning and every evening, for forty years?",
    "When does the ferry sail?",
    "What is yesterday's?",
)
MIXED = [
    *((question, TEXTS[first:]) for question in QUESTIONS for first in (0, 1)),
    (QUESTIONS[0], TEXTS[::-1]),
    (QUESTIONS[0], TEXTS, "Be brief."),
    (QUESTIONS[1],),
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


class CountingStore(MemoryStore):
    """Notes the tokens of every entry that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def get(self, key, token_ids, heads=None):
        self.asked.append(token_ids)
        return super().get(key, token_ids, heads)


def ids(generations):
    return [each.token_ids for each in generations]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding", "smollm3", "phi3"])
def test_full_prefill_gives_what_the_model_alone_gives(name):
    model = tiny_model(name)
    llm = wrapped(model)
    before = snapshot(model)
    got = llm.generate_batch(MIXED[:9], policy="full", **OPTIONS)
    assert snapshot(model) == before
    for request, generation in zip(MIXED, got, strict=False):
        assert generation.token_ids == plain(model, prompt_ids(llm, *request), max_new_tokens=10, do_sample=False)


@pytest.mark.parametrize("policy", ["full", "prefix", "reuse", "link:k=4", "cacheblend"])
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_a_policy_that_looks_at_no_question_gives_what_it_gives_one_by_one(policy, max_batch):
    one = wrapped(policy=policy)
    wanted = [one.generate(*request, **OPTIONS) for request in MIXED]
    got = wrapped(policy=policy).generate_batch(MIXED, max_batch=max_batch, **OPTIONS)
    assert ids(got) == ids(wanted)
    assert [each.text for each in got] == [each.text for each in wanted]
    assert [each.stats.tokens for each in got] == [each.stats.tokens for each in wanted]


def test_a_question_that_shares_with_no_other_is_looked_at_alone():
    requests = [(QUESTIONS[0], TEXTS), (QUESTIONS[1], TEXTS[1:]), (QUESTIONS[2], TEXTS[::-1])]
    one, many = wrapped(policy="query:ratio=0.3"), wrapped(policy="query:ratio=0.3")
    assert ids(many.generate_batch(requests, **OPTIONS)) == ids([one.generate(*each, **OPTIONS) for each in requests])


def test_questions_of_a_batch_are_looked_at_together(monkeypatch):
    requests = [(question, TEXTS) for question in QUESTIONS]
    llm = wrapped(policy="query:ratio=0.3")
    seen: list[int] = []
    select = Query.select_seen

    def counting(self, plan, attention):
        seen.append(len(plan) - plan.end)
        return select(self, plan, attention)

    monkeypatch.setattr(Query, "select_seen", counting)
    llm.generate_batch(requests, **OPTIONS)
    assert seen == [sum(len(llm.prompts.build(*each).question) for each in requests)]
    everything = llm.generate_batch(requests, policy="query:ratio=1", **OPTIONS)
    assert ids(everything) == ids(llm.generate_batch(requests, policy="full", **OPTIONS))


def test_each_sequence_ends_at_its_own_end():
    llm = wrapped(policy="full")
    requests = [(question, TEXTS) for question in QUESTIONS]
    whole = ids(llm.generate_batch(requests, **OPTIONS))
    eos = [whole[0][2], whole[1][5]]
    wanted = [llm.generate(*each, eos_token_id=eos, **OPTIONS).token_ids for each in requests]
    assert len({len(each) for each in wanted}) > 1
    assert ids(llm.generate_batch(requests, eos_token_id=eos, **OPTIONS)) == wanted


def test_stop_strings_end_each_sequence_by_itself():
    llm = wrapped(policy="full")
    requests = [(question, TEXTS) for question in QUESTIONS]
    first = llm.generate_batch(requests, **OPTIONS)[0].token_ids
    stop = next(text for token in first[1:] if (text := llm.tokenizer.decode(token)).isascii())
    wanted = [llm.generate(*each, stop_strings=[stop], **OPTIONS).token_ids for each in requests]
    assert len(wanted[0]) < 10
    assert ids(llm.generate_batch(requests, stop_strings=[stop], **OPTIONS)) == wanted


def test_a_chunk_is_looked_up_once_for_a_group():
    store = CountingStore()
    llm = wrapped(store=store, policy="query:ratio=0.2")
    llm.precompute(TEXTS)
    chunks = {llm.prompts.chunk(text) for text in TEXTS}
    store.asked.clear()
    llm.generate_batch([(question, TEXTS) for question in QUESTIONS * 2], max_batch=3, **OPTIONS)
    assert sorted(token_ids for token_ids in store.asked if token_ids in chunks) == sorted(chunks)


def test_what_was_missing_counts_once():
    got = wrapped(policy="reuse").generate_batch([(question, TEXTS) for question in QUESTIONS], **OPTIONS)
    assert sum(each.stats.misses for each in got) == len(TEXTS)
    assert sum(each.stats.hits for each in got) == len(TEXTS) * (len(QUESTIONS) - 1)


def test_batches_are_told_and_keep_to_the_bound():
    llm, requests = wrapped(policy="full"), [(question, TEXTS) for question in QUESTIONS]
    seen: list[Any] = []
    wanted = ids(llm.generate_batch(requests, on_batch=seen.append, **OPTIONS))
    assert [sorted(batch.requests) for batch in seen] == [[0, 1, 2, 3]]
    assert seen[0].shared_tokens == len(llm.prompts.build(*requests[0]).token_ids) - len(
        llm.prompts.build(*requests[0]).question
    )
    bound = seen[0].kv_bytes - 1
    seen.clear()
    assert ids(llm.generate_batch(requests, on_batch=seen.append, max_kv_bytes=bound, **OPTIONS)) == wanted
    assert len(seen) > 1
    assert all(batch.kv_bytes <= bound for batch in seen)
    assert (seen[-1].done, seen[-1].total) == (4, 4)
    with pytest.raises(InputError, match=r"request \d needs .* max_kv_bytes=1000"):
        llm.generate_batch(requests, max_kv_bytes=1000, **OPTIONS)


def test_reordered_prompts_share_more():
    llm = wrapped(policy="prefix")
    requests = [(QUESTIONS[0], TEXTS), (QUESTIONS[1], TEXTS[::-1]), (QUESTIONS[2], TEXTS[1:])]
    seen: list[Any] = []
    got = llm.generate_batch(requests, reorder=True, on_batch=seen.append, **OPTIONS)
    assert [sorted(batch.requests) for batch in seen] == [[0, 1], [2]]
    assert got[2].stats.tokens < got[0].stats.tokens


def test_a_model_that_cannot_is_served_one_by_one_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr("chunkcache.batch.can_share", lambda decoder: False)
    llm, seen = wrapped(policy="full"), []
    wanted = ids(llm.generate(*each, **OPTIONS) for each in MIXED)
    with caplog.at_level(logging.WARNING, "chunkcache"):
        assert ids(llm.generate_batch(MIXED, on_batch=seen.append, **OPTIONS)) == wanted
    assert [record.message for record in caplog.records if "one by one" in record.message]
    assert all(len(batch.requests) == 1 for batch in seen)


def test_wrong_requests_are_named_before_any_work():
    store = CountingStore()
    llm = wrapped(store=store)
    long = ["word " * 2000]
    for request, error in (
        (("", TEXTS), PromptError),
        (("Why?", [" "]), PromptError),
        (("Why?", long), ContextLengthError),
    ):
        with pytest.raises(error, match="request 2"):
            llm.generate_batch([*MIXED[:2], request], **OPTIONS)
    assert store.asked == []


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True},
        {"streamer": object()},
        {"max_batch": 0},
        {"max_length": 100},
        {"max_new_tokens": 0},
        {"generation_config": GenerationConfig(num_beams=3)},
    ],
)
def test_what_a_batch_cannot_do_is_refused(options):
    with pytest.raises(PromptError):
        wrapped().generate_batch(MIXED, **options)


def test_an_unknown_policy_is_refused_and_no_request_is_no_answer():
    with pytest.raises(PolicyError):
        wrapped().generate_batch(MIXED, policy="nonsense")
    assert wrapped().generate_batch([]) == []


def test_processors_and_penalties_see_no_padding():
    llm = wrapped(own_model(), policy="full")
    requests = [(question, TEXTS) for question in QUESTIONS]
    options = {**OPTIONS, "repetition_penalty": 1.5}
    assert ids(llm.generate_batch(requests, **options)) == ids(llm.generate(*each, **options) for each in requests)
