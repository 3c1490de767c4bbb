"""Chat: chunks inside messages are reused, and answers are those of the same tokens without reuse."""

from __future__ import annotations

import copy

import pytest
import torch
from support.llm import QUESTION, TEXTS, chat_tokenizer, own_model, plain, tiny_model, wrapped

import chunkcache
from chunkcache.errors import InputError, PromptError
from chunkcache.kv import chunk_name
from chunkcache.prompt.builder import PromptChunk
from chunkcache.store.memory import MemoryStore
from chunkcache.store.tiered import TieredStore

LISTED = [{"role": "user", "content": f"Context:\n[1] {TEXTS[0]}\n[2] {TEXTS[1]}\n\n[3] {TEXTS[2]}\n\n{QUESTION}"}]
TURNS = [
    {"role": "system", "content": f"Answer from this: {TEXTS[0]}"},
    {"role": "user", "content": "What do you know?"},
    {"role": "assistant", "content": "A lot."},
    {"role": "user", "content": f"{TEXTS[1]}\n\n{TEXTS[2]}\n\n{QUESTION}"},
]
TRIMMED = [
    {
        "role": "user",
        "content": [PromptChunk(TEXTS[0], joins_next=True), PromptChunk(TEXTS[1], skip_chars=15), TEXTS[2], QUESTION],
    }
]
MESSAGES = {"listed": LISTED, "turns": TURNS, "trimmed": TRIMMED}
EVERYTHING = "link:k=1000"  # recomputes every token of a chunk
each_message = pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)


def logits(llm, messages, policy):
    """Return the next token's logits `[vocab]`, and what the request did."""
    prefilled = llm.engine.prefill(llm.engine.prepare(lambda: llm.chat_prompt(messages), policy))
    return prefilled.logits, prefilled.stats


@each_message
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
def test_with_everything_recomputed_the_logits_are_full_prefills(name, messages):
    llm = wrapped(tiny_model(name))
    llm.precompute(TEXTS)
    for _ in range(2):  # the second time another prompt has begun alike
        full, _ = logits(llm, messages, "full")
        recomputed, stats = logits(llm, messages, EVERYTHING)
        assert stats.reused_tokens > 0
        torch.testing.assert_close(recomputed, full, rtol=1e-4, atol=1e-4)


@each_message
def test_chunks_are_reused_wherever_they_stand(messages):
    llm = wrapped()
    llm.precompute(TEXTS)
    stats = llm.chat(messages, policy="reuse", max_new_tokens=2).stats
    chunks = 2 if messages is TRIMMED else 3
    assert (stats.hits, stats.misses, stats.chunks) == (chunks, 0, chunks)
    assert stats.reused_tokens > stats.tokens / 2


@each_message
def test_prefix_reuses_what_stood_behind_the_same_tokens(messages):
    llm = wrapped()
    llm.register(TEXTS)
    full, _ = logits(llm, messages, "full")
    logits(llm, messages, "prefix")
    again, stats = logits(llm, messages, "prefix")
    assert stats.exact_tokens == stats.reused_tokens > stats.tokens / 3
    torch.testing.assert_close(again, full, rtol=1e-4, atol=1e-4)


def test_full_is_plain_transformers():
    llm = wrapped()
    llm.precompute(TEXTS)
    ids = llm.tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert llm.chat_prompt(TURNS).token_ids == tuple(ids[0].tolist())
    assert llm.chat(TURNS, policy="full", max_new_tokens=8).token_ids == plain(llm.model, ids)


def test_passages_are_answered_like_chunks():
    llm = wrapped()
    asked = [{"role": "user", "content": [*map(PromptChunk, TEXTS), QUESTION]}]
    assert llm.chat(asked, max_new_tokens=8).token_ids == llm.generate(QUESTION, TEXTS, max_new_tokens=8).token_ids


def test_a_known_text_that_is_not_stored_is_computed_and_then_reused():
    llm = wrapped()
    llm.register(TEXTS)
    first, second = (llm.chat(LISTED, max_new_tokens=8) for _ in range(2))
    assert (first.stats.misses, second.stats.hits) == (3, 3)
    assert first.token_ids == second.token_ids


def test_what_nobody_made_known_is_prefilled():
    llm = wrapped()
    stats = llm.chat(LISTED, max_new_tokens=2).stats
    assert (stats.chunks, stats.reused_tokens) == (0, 0)


def test_chunks_of_another_system_prompt_are_found_where_they_are_stored():
    llm = wrapped()
    llm.precompute(TEXTS, system="Be brief.")
    assert llm.chat(LISTED, max_new_tokens=2).stats.hits == 3


def test_a_stream_says_what_chat_says():
    llm = wrapped()
    llm.precompute(TEXTS)
    stream = llm.chat_stream(LISTED, max_new_tokens=8)
    assert "".join(stream).strip() == llm.chat(LISTED, max_new_tokens=8).text
    assert stream.result.stats.hits == 3


def test_stop_strings_end_the_answer():
    llm = wrapped(own_model())
    whole = llm.chat(LISTED, max_new_tokens=12)
    stop = llm.tokenizer.decode(whole.token_ids[3:5])
    stopped = llm.chat(LISTED, max_new_tokens=12, stop_strings=[stop])
    assert len(stopped.token_ids) < len(whole.token_ids)
    assert stop in llm.tokenizer.decode(stopped.token_ids)


def test_prefetch_says_what_is_missing_and_brings_the_rest_near():
    near, far = MemoryStore(), MemoryStore()
    wrapped(store=far).precompute(TEXTS[:2])
    llm = wrapped(store=TieredStore([near, far]))
    assert llm.prefetch([TEXTS[2], TEXTS[0], TEXTS[2]]) == [TEXTS[2]]
    llm.store.flush()
    assert [key in near for key in llm.keys(TEXTS)] == [True, False, False]
    stats = llm.chat(LISTED, max_new_tokens=2).stats
    assert (stats.hits, stats.misses) == (1, 1)  # both are known now


@pytest.mark.parametrize("how", ["text", "document", "all", "update"])
def test_what_is_forgotten_is_no_longer_found(how):
    llm = wrapped()
    llm.precompute(TEXTS, documents=["a", "b", "b"])
    if how == "update":
        llm.update_document("a", ["Another text, long enough to be found in a message."])
    else:
        llm.delete(**{"text": {"texts": [TEXTS[0]]}, "document": {"document": "a"}, "all": {"tenant": True}}[how])
    stats = llm.chat(LISTED, max_new_tokens=2).stats
    assert stats.chunks == (0 if how == "all" else 2)


def test_bad_options_and_messages_are_refused():
    llm = wrapped()
    with pytest.raises(InputError, match="num_return_sequences"):
        llm.chat(LISTED, num_return_sequences=2)
    with pytest.raises(PromptError, match="no text"):
        llm.chat_stream([])


@pytest.mark.parametrize("policy", ["prefix", "cachecraft:alpha=0.3", "query"])
def test_a_chunk_that_stands_in_part_is_forgotten_with_its_document(policy):
    llm = wrapped(policy=policy)
    llm.register(TEXTS, documents=["d"] * 3)
    llm.chat([{"role": "user", "content": f"Context: {TEXTS[0]} and {TEXTS[1]} {QUESTION}"}], max_new_tokens=2)
    chunks = [entry for entry in llm.store.entries() if entry.documents]
    assert len(chunks) >= 2
    llm.delete(document="d")
    names = {chunk_name(llm.prompts.chunk(text)) for text in TEXTS}
    assert not [entry for entry in llm.store.entries() if names & set(entry.chunks) or entry.documents]


def test_what_was_computed_for_a_request_was_not_cached():
    llm = wrapped()
    first, second = (llm.generate(QUESTION, TEXTS, max_new_tokens=2).stats for _ in range(2))
    assert (first.cached_tokens, first.computed_tokens) == (0, first.reused_tokens)
    assert (second.cached_tokens, second.computed_tokens) == (second.reused_tokens, 0)
    assert first.reused_tokens == second.reused_tokens > 0


def test_what_stands_before_the_chunks_of_one_prompt_alone_is_not_stored():
    llm = wrapped()
    llm.precompute(TEXTS)
    before = llm.store.stats().entries
    llm.chat([{"role": "user", "content": f"My password is hunter2. {TEXTS[0]}\n\n{QUESTION}"}], max_new_tokens=2)
    assert llm.store.stats().entries == before


def test_options_of_the_template_that_stand_before_the_chunks_are_the_same_in_precompute_and_in_a_request():
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = "<s>system\n{{ mood }}</s>\n" + tokenizer.chat_template
    llm = chunkcache.wrap(tiny_model(), tokenizer, policy="reuse")
    calm = {"template_options": {"mood": "calm"}}
    assert llm.precompute(TEXTS[:2], **calm).computed == 2
    assert llm.prefetch(TEXTS, **calm) == [TEXTS[2]]
    assert llm.register(TEXTS, **calm) == llm.keys(TEXTS, **calm) != llm.keys(TEXTS)
    assert llm.update_document("a", TEXTS[1:], **calm).computed == 1
    for prefilled in (llm.prefill(QUESTION, TEXTS, **calm), llm.generate(QUESTION, TEXTS, max_new_tokens=2, **calm)):
        assert (prefilled.stats.hits, prefilled.stats.misses) == (3, 0)
    asked = [{"role": "user", "content": [*map(PromptChunk, TEXTS), QUESTION]}]
    assert llm.chat(asked, max_new_tokens=2, **calm).stats.hits == 3
    assert (
        llm.chat_prompt(asked, **calm).token_ids
        == llm.prompts.with_options({"mood": "calm"}).build(QUESTION, TEXTS).token_ids
    )
    batch = llm.generate_batch([(QUESTION, TEXTS)], max_new_tokens=2, **calm)
    assert batch[0].stats.hits == 3
    with pytest.raises(PromptError, match="does not read 'mod'"):
        llm.precompute(TEXTS, template_options={"mod": "calm"})
