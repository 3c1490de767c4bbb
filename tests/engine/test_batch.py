"""Requests that are answered together get the answers that they get alone, in the order they were asked."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.llm import TEXTS, own_model, plain, prompt_ids, snapshot, tiny_model, wrapped
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from chunkcache.blend.attention import LOOK_ROWS
from chunkcache.blend.guard import GuardModel
from chunkcache.blend.query import Query
from chunkcache.engine.calibration import Calibration
from chunkcache.errors import ContextLengthError, InputError, PolicyError
from chunkcache.library.registry import warn_once
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


def ask(llm, request, **options):
    question, chunks, system = (*request, (), None)[:3] if len(request) > 1 else (*request, (), None)
    return llm.generate(question, chunks, system=system, **options)


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
    wanted = [ask(one, request, **OPTIONS) for request in MIXED]
    got = wrapped(policy=policy).generate_batch(MIXED, max_batch=max_batch, **OPTIONS)
    assert ids(got) == ids(wanted)
    assert [each.text for each in got] == [each.text for each in wanted]
    assert [each.stats.tokens for each in got] == [each.stats.tokens for each in wanted]


def test_a_question_that_shares_with_no_other_is_looked_at_alone():
    requests = [(QUESTIONS[0], TEXTS), (QUESTIONS[1], TEXTS[1:]), (QUESTIONS[2], TEXTS[::-1])]
    one, many = wrapped(policy="query:ratio=0.3"), wrapped(policy="query:ratio=0.3")
    assert ids(many.generate_batch(requests, **OPTIONS)) == ids([ask(one, each, **OPTIONS) for each in requests])


def test_questions_of_a_batch_are_looked_at_together(monkeypatch):
    requests = [(question, TEXTS) for question in QUESTIONS]
    llm = wrapped(policy="query:ratio=0.3")
    seen: list[int] = []
    select = Query.select_by_attention

    def counting(self, plan, attention):
        seen.append(len(plan) - plan.end)
        return select(self, plan, attention)

    monkeypatch.setattr(Query, "select_by_attention", counting)
    llm.generate_batch(requests, **OPTIONS)
    assert seen == [sum(len(llm.prompts.build(*each).question) for each in requests)]
    everything = llm.generate_batch(requests, policy="query:ratio=1", **OPTIONS)
    assert ids(everything) == ids(llm.generate_batch(requests, policy="full", **OPTIONS))


def test_many_questions_are_looked_at_in_whole_and_one_long_question_at_its_end(monkeypatch):
    looked, pool = [], Query.pool
    monkeypatch.setattr(Query, "pool", lambda self, weights: looked.append(weights.shape[1]) or pool(self, weights))
    llm, policy = wrapped(), "query:ratio=0.2"
    questions = [" ".join([question] * 4) for question in QUESTIONS]
    rows = sum(len(llm.prompts.build(question, TEXTS).question) for question in questions)
    assert rows > LOOK_ROWS
    llm.generate_batch([(question, TEXTS) for question in questions], policy=policy, **OPTIONS)
    assert set(looked) == {rows}
    looked.clear()
    llm.prefill(" ".join(questions), TEXTS, policy=policy)
    assert set(looked) == {LOOK_ROWS}


def test_each_sequence_ends_at_its_own_end():
    llm = wrapped(policy="full")
    requests = [(question, TEXTS) for question in QUESTIONS]
    whole = ids(llm.generate_batch(requests, **OPTIONS))
    eos = [whole[0][2], whole[1][5]]
    wanted = [ask(llm, each, eos_token_id=eos, **OPTIONS).token_ids for each in requests]
    assert len({len(each) for each in wanted}) > 1
    config = GenerationConfig(eos_token_id=eos)
    for given in ({"eos_token_id": each} for each in (eos, tuple(eos), torch.tensor(eos))):
        assert ids(llm.generate_batch(requests, **given, **OPTIONS)) == wanted
    assert ids(llm.generate_batch(requests, generation_config=config, **OPTIONS)) == wanted


def test_stop_strings_end_each_sequence_by_itself():
    llm = wrapped(policy="full")
    requests = [(question, TEXTS) for question in QUESTIONS]
    first = llm.generate_batch(requests, **OPTIONS)[0].token_ids
    stop = next(text for token in first[1:] if (text := llm.tokenizer.decode(token)).isascii())
    wanted = [ask(llm, each, stop_strings=[stop], **OPTIONS).token_ids for each in requests]
    assert len(wanted[0]) < 10
    assert ids(llm.generate_batch(requests, stop_strings=[stop], **OPTIONS)) == wanted
    for asked in (requests, requests[:1]):  # together, and alone
        config = GenerationConfig(stop_strings=[stop])
        assert ids(llm.generate_batch(asked, generation_config=config, **OPTIONS)) == wanted[: len(asked)]


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


def test_a_model_that_cannot_is_served_one_by_one_and_says_so_once(monkeypatch, caplog):
    tried = []
    monkeypatch.setattr("chunkcache.blend.hydragen.can_share", lambda decoder: tried.append(decoder))
    warn_once.cache_clear()
    llm, seen = wrapped(policy="full"), []
    wanted = ids(ask(llm, each, **OPTIONS) for each in MIXED)
    with caplog.at_level(logging.WARNING, "chunkcache"):
        for _ in range(2):
            got = llm.generate_batch(MIXED, on_batch=seen.append, **OPTIONS)
            assert ids(got) == wanted
            assert {each.stats.batched for each in got} == {1}
    assert len([record for record in caplog.records if "one by one" in record.message]) == 1
    assert all(len(batch.requests) == 1 for batch in seen)
    assert len(tried) == 1


def test_it_is_counted_how_many_were_decoded_together():
    got = wrapped(policy="full").generate_batch([(q, TEXTS) for q in QUESTIONS] + [("Why?",)], max_batch=3, **OPTIONS)
    assert sorted(each.stats.batched for each in got) == [1, 1, 3, 3, 3]


def test_a_guarded_policy_answers_each_question_by_itself():
    accepts = GuardModel(((-99.0, 0.0, 0.0),) * 3, ((0.05, 0.0),))
    given = Calibration(wrapped().fingerprint, None, accepts)
    one, many = (wrapped(policy="query:ratio=0.1,guard=0.05", calibration=given) for _ in range(2))
    requests = [(question, TEXTS) for question in QUESTIONS]
    got = many.generate_batch(requests, **OPTIONS)
    assert ids(got) == ids(ask(one, each, **OPTIONS) for each in requests)
    assert [(each.stats.guard_passes, each.stats.batched) for each in got] == [(1, 1)] * len(QUESTIONS)


@pytest.mark.parametrize("policy", ["full", "reuse", "query:ratio=0.3"])
def test_stages_are_those_of_the_group_and_count_once(policy):
    requests = [(question, chunks) for chunks in (TEXTS, TEXTS[::-1]) for question in QUESTIONS]
    got = wrapped(policy=policy).generate_batch(requests, max_batch=2, **OPTIONS)
    one_at_a_time = ("tokenize_s", "lookup_s", "compute_s", "prefill_s", "assemble_s", "select_s", "recompute_s")
    spent = sum(getattr(each.stats, name) for each in got for name in one_at_a_time[:4])
    assert spent < max(each.ttft_s for each in got)  # of the whole call; nothing is counted twice
    for each in got:
        stages = each.stats.stages()
        assert sum(stages.values()) == pytest.approx(each.ttft_s)
        assert stages["other"] >= 0
    for group in (got[:4], got[4:]):
        fusions = 2 if policy.startswith("query") else 1  # each batch, where the questions are looked at
        assert sum(each.stats.recompute_s > 0 for each in group) == fusions
        assert sum(each.stats.prefill_s > 0 for each in group) == 2


@pytest.mark.parametrize(("policy", "hits"), [("full", 0), ("prefix", 3), ("reuse", 3), ("query:ratio=0.3", 3)])
def test_later_members_hit_what_the_first_looked_up_or_stored(policy, hits):
    got = wrapped(policy=policy).generate_batch([(question, TEXTS) for question in QUESTIONS], max_batch=2, **OPTIONS)
    assert sorted(each.stats.hits for each in got) == [0, hits, hits, hits]
    assert sum(each.stats.misses for each in got) == hits


class _Fails(LogitsProcessor):
    """Raises when the tokens of one batch are all there."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("in mid-batch")
        return scores


def test_an_error_in_mid_batch_loses_nothing_that_is_done_and_leaves_the_model_as_it_was():
    model = tiny_model()
    llm = wrapped(model, policy="query:ratio=0.3")
    requests = [(question, TEXTS) for question in QUESTIONS]
    before, kept = snapshot(model), {}
    fails = LogitsProcessorList([_Fails(OPTIONS["max_new_tokens"] + 3)])

    def keep(batch):
        kept.update(zip(batch.requests, batch.generations, strict=True))

    with pytest.raises(ZeroDivisionError):
        llm.generate_batch(requests, max_batch=2, on_batch=keep, logits_processor=fails, **OPTIONS)
    assert snapshot(model) == before
    whole = llm.generate_batch(requests, max_batch=2, **OPTIONS)
    assert len(kept) == 2
    assert all(each.token_ids == whole[index].token_ids for index, each in kept.items())


def test_each_output_is_its_own():
    got = wrapped(policy="full").generate_batch([(question, TEXTS) for question in QUESTIONS], **OPTIONS)
    for each in got:
        assert each.output.shape[0] == 1
        assert each.output.untyped_storage().nbytes() == each.output.nbytes
        assert each.output[0, -10:].tolist()[: len(each.token_ids)] == each.token_ids


def test_wrong_requests_are_named_before_any_work():
    store = CountingStore()
    llm = wrapped(store=store)
    long = ["word " * 2000]
    for request, error in (
        (("", TEXTS), InputError),
        (("Why?", [" "]), InputError),
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
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"min_length": 5},
        {"generation_config": GenerationConfig(no_repeat_ngram_size=3)},
        {"prefix_allowed_tokens_fn": lambda batch, sent: [1]},
    ],
)
def test_what_a_batch_cannot_do_is_refused(options):
    with pytest.raises(InputError):
        wrapped().generate_batch(MIXED, **options)


def test_an_unknown_policy_is_refused_and_no_request_is_no_answer():
    with pytest.raises(PolicyError):
        wrapped().generate_batch(MIXED, policy="nonsense")
    assert wrapped().generate_batch([]) == []


def test_processors_and_penalties_see_no_padding():
    llm = wrapped(own_model(), policy="full")
    requests = [(question, TEXTS) for question in QUESTIONS]
    first = llm.generate(*requests[0], **OPTIONS).token_ids[0]
    for more in (
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 5, "eos_token_id": first},
        {"bad_words_ids": [[first]]},
    ):
        options = {**OPTIONS, **more}
        assert ids(llm.generate_batch(requests, **options)) == ids(ask(llm, each, **options) for each in requests)
