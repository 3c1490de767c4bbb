"""Requests whose policy leaves something for later: the first token comes before it, and all others after."""

from __future__ import annotations

import pytest
import torch
from support.llm import QUESTION, TEXTS, plain, prompt_ids, tiny_model, wrapped

FIRST = "query:ratio=0,lead=0"  # nothing recomputed
ALL = f"{FIRST},later=1"  # and then everything
NAMES = ["llama", "gemma3", "mistral-sliding"]


@pytest.fixture(params=NAMES)
def llm(request):
    llm = wrapped(tiny_model(request.param))
    llm.precompute(TEXTS, policy=FIRST)
    return llm


def behind(llm, first, count):
    """What full prefill of the prompt and the token `first` goes on with."""
    ids = torch.cat((prompt_ids(llm), torch.tensor([[first]])), dim=1)
    return plain(llm.model, ids, max_new_tokens=count, do_sample=False)


def test_from_the_second_token_on_the_answer_is_that_of_full_prefill(llm):
    options = {"chunks": TEXTS[::-1], "max_new_tokens": 12, "do_sample": False}
    first = llm.generate(QUESTION, policy=FIRST, **options).token_ids
    answer = llm.generate(QUESTION, policy=ALL, **options).token_ids
    assert answer[0] == first[0]
    ids = torch.cat((prompt_ids(llm, chunks=TEXTS[::-1]), torch.tensor([[answer[0]]])), dim=1)
    assert answer[1:] == plain(llm.model, ids, max_new_tokens=11, do_sample=False)


def test_what_is_prefilled_is_repaired_before_it_is_decoded_on(llm):
    output = llm.prefill(QUESTION, TEXTS, policy=ALL)
    first = llm.prefill(QUESTION, TEXTS, policy=FIRST)
    torch.testing.assert_close(output.logits, first.logits)
    assert output.stats.later_rows == 0
    token = torch.tensor([[7]])
    with torch.no_grad():
        following = llm.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True).logits[0, -1]
    assert int(following.argmax()) == behind(llm, 7, 1)[0]


def test_inputs_for_a_generate_of_ones_own_are_repaired(llm):
    inputs = llm.prepare_inputs(QUESTION, TEXTS, policy=ALL)
    output = llm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == plain(
        llm.model, prompt_ids(llm), max_new_tokens=8, do_sample=False
    )


def test_beams_go_on_from_repaired_kv(llm):
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    answer = llm.generate(QUESTION, chunks=TEXTS, policy=ALL, **options).token_ids
    assert answer == plain(llm.model, prompt_ids(llm), **options)


def test_candidates_that_were_verified_with_the_prompt_are_left_alone(llm):
    options = {"max_new_tokens": 10, "do_sample": False}
    answer = llm.generate(QUESTION, chunks=TEXTS, policy=ALL, **options).token_ids
    looked_up = llm.generate(QUESTION, chunks=TEXTS, policy=ALL, prompt_lookup_num_tokens=3, **options)
    assert looked_up.stats.later_rows > 0
    assert looked_up.token_ids[0] == answer[0]
    assert len(looked_up.token_ids) == len(answer)


def test_the_models_own_generate_catches_up_when_it_is_attached():
    llm = wrapped(policy=ALL)
    llm.precompute(TEXTS)
    ids = prompt_ids(llm)
    with llm.attached():
        output = llm.model.generate(ids, max_new_tokens=8, do_sample=False)
    first = int(output[0, ids.shape[1]])
    assert llm.last_stats.later_rows > 0
    assert output[0, ids.shape[1] + 1 :].tolist() == behind(llm, first, 7)


def test_a_batch_over_shared_kv_is_repaired_first():
    llm = wrapped()
    llm.precompute(TEXTS, policy=FIRST)
    questions = (QUESTION, "When does the ferry sail?")
    answers = llm.generate_batch(
        [(question, TEXTS) for question in questions], policy=ALL, max_new_tokens=8, do_sample=False
    )
    for question, answer in zip(questions, answers, strict=True):
        ids = prompt_ids(llm, question)
        assert answer.token_ids == plain(llm.model, ids, max_new_tokens=8, do_sample=False)


def test_the_stats_tell_what_was_left_for_later(llm):
    answer = llm.generate(QUESTION, chunks=TEXTS, policy=f"{FIRST},later=0.2", max_new_tokens=3)
    stats = answer.stats
    chunks = sum(chunk.tokens for chunk in stats.report.chunks if not chunk.exact)
    again = sum(chunk.recomputed_tokens for chunk in stats.report.chunks)
    assert 0.2 * chunks <= again <= 0.2 * chunks + 1
    assert stats.later_rows > again
    assert stats.later_s > 0
    assert "recomputed" in dict(stats.report.states)
    alone = llm.generate(QUESTION, chunks=TEXTS, policy=f"{FIRST},later=0.2", max_new_tokens=1).stats
    assert (alone.later_rows, alone.later_s) == (0, 0.0)
    assert alone.recomputed_share == stats.recomputed_share  # of the prefill, before the first token


def test_a_conversation_goes_on_from_repaired_kv(llm):
    chat = llm.conversation()
    chat.generate(QUESTION, chunks=TEXTS, policy=ALL, max_new_tokens=1)
    full = llm.conversation()
    full.generate(QUESTION, chunks=TEXTS, policy="full", max_new_tokens=1)
    assert len(chat._head) == len(full._head) == len(chat.token_ids) - 1
    for one, other in zip(chat._head.layers, full._head.layers, strict=True):
        torch.testing.assert_close(one[:, :, -8:], other[:, :, -8:], atol=1e-4, rtol=0)
