"""The face that users see: its four ways to run a request agree with one another and with plain transformers."""

from __future__ import annotations

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers_tokenizer import tiny_tokenizer
from support.llm import (
    QUESTION,
    TEXTS,
    chat_tokenizer,
    own_model,
    plain,
    prompt_ids,
    snapshot,
    tiny_model,
    wrapped,
)
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import chunkcache
from chunkcache import blend
from chunkcache.blend import parse_policy
from chunkcache.kv import ChunkKV
from chunkcache.store import Budget, MemoryStore

FAMILIES = ["llama", "mistral-sliding", "gemma3", "qwen3-moe"]
ONE = TEXTS[:1]
EXACT = {  # policies and prompts for which nothing but rounding may differ from full prefill
    "full": ("full", TEXTS),
    "prefix": ("prefix", TEXTS),
    "link, one chunk": ("link:k=8", ONE),
    "reuse, one chunk": ("reuse", ONE),
    "cacheblend, one chunk": ("cacheblend", ONE),
    "cacheblend, all": ("cacheblend:ratio=1", TEXTS),
    "link, no chunks": ("link:k=8", ()),
}
exact = pytest.mark.parametrize(("policy", "chunks"), EXACT.values(), ids=EXACT)
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def own_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1]


def assert_close(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


# --- precompute


def test_precompute_is_idempotent():
    llm = wrapped()
    lengths = [len(llm.prompts.chunk(text)) for text in TEXTS]
    assert llm.precompute(TEXTS) == chunkcache.PrecomputeResult(3, 3, sum(lengths))
    writes = llm.store.stats().writes
    assert llm.precompute(TEXTS) == chunkcache.PrecomputeResult(3, 0, 0)
    assert llm.store.stats().writes == writes


def test_precompute_stores_the_prefix_too():
    llm = wrapped()
    llm.precompute(TEXTS)
    assert llm.store.stats().entries == 1 + len(TEXTS)


def test_duplicates_are_computed_once():
    llm = wrapped()
    assert llm.precompute([TEXTS[0], TEXTS[1], TEXTS[0], f" {TEXTS[1]}\n"]).computed == 2


def test_precompute_belongs_to_a_system_prompt():
    llm = wrapped()
    llm.precompute(TEXTS, system="Be brief.")
    assert llm.prefill(QUESTION, TEXTS, system="Be brief.").stats.misses == 0
    assert llm.precompute(TEXTS).computed == 3


def test_progress_ends_with_all_of_them():
    seen = []
    wrapped().precompute([*TEXTS, TEXTS[0]], on_progress=lambda done, all_: seen.append((done, all_)))
    assert seen[-1] == (3, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_precomputed_together_or_alone_answers_alike(name):
    together, alone = wrapped(tiny_model(name), policy="reuse"), wrapped(tiny_model(name), policy="reuse")
    together.precompute(TEXTS)
    for text in TEXTS:
        alone.precompute([text])
    assert_close(together.prefill(QUESTION, TEXTS).logits, alone.prefill(QUESTION, TEXTS).logits)
    assert alone.prefill(QUESTION, TEXTS).stats.hits == 3


def test_without_precompute_the_answer_is_the_same():
    warm, cold = wrapped(), wrapped()
    warm.precompute(TEXTS)
    assert_close(cold.prefill(QUESTION, TEXTS).logits, warm.prefill(QUESTION, TEXTS).logits)


# --- agreement


@pytest.mark.parametrize("name", FAMILIES)
@exact
def test_generate_is_the_models_own(name, policy, chunks):
    model = tiny_model(name)
    llm = wrapped(model)
    llm.precompute(chunks)
    expected = plain(model, prompt_ids(llm, chunks=chunks), do_sample=False)
    for _ in range(2):  # the second finds what the first remembered
        out = llm.generate(QUESTION, chunks, policy=policy, **GREEDY)
        assert out.token_ids == expected
    assert out.text == llm.tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", FAMILIES)
@exact
def test_prefill_is_the_models_own(name, policy, chunks):
    model = tiny_model(name)
    llm = wrapped(model)
    ids = prompt_ids(llm, chunks=chunks)
    pre = llm.prefill(QUESTION, chunks, policy=policy)
    assert_close(pre.logits, own_logits(model, ids))
    assert pre.logits.ndim == 1
    assert pre.input_ids.tolist() == ids.tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", blend.POLICIES)
def test_all_ways_to_run_a_request_agree(name, policy):
    model = tiny_model(name)
    llm = wrapped(model, policy=policy)
    out = llm.generate(QUESTION, TEXTS, **GREEDY)
    stream = llm.stream(QUESTION, TEXTS, **GREEDY)
    assert "".join(stream).strip() == out.text
    assert stream.result.token_ids == out.token_ids
    pre = llm.prefill(QUESTION, TEXTS)
    assert int(pre.logits.argmax()) == out.token_ids[0]
    inputs = llm.prepare_inputs(QUESTION, TEXTS)
    assert inputs["input_ids"].tolist() == pre.input_ids.tolist()
    assert new_ids(model.generate(**inputs, **GREEDY), inputs) == out.token_ids


def new_ids(output: torch.Tensor, inputs) -> list[int]:
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefilled_cache_goes_on_like_the_models_own(name):
    model = tiny_model(name)
    pre = wrapped(model).prefill(QUESTION, TEXTS, policy="prefix")
    tokens = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        logits = model(input_ids=tokens, past_key_values=pre.past_key_values).logits[0, -1]
    assert_close(logits, own_logits(model, torch.cat((pre.input_ids, tokens), dim=1)))
    assert pre.past_key_values.get_seq_length() == pre.input_ids.shape[1] + 3


def test_inputs_serve_plain_sampling():
    model = tiny_model()
    llm = wrapped(model)
    expected = plain(model, prompt_ids(llm), seed=5, do_sample=True, temperature=0.9)
    inputs = llm.prepare_inputs(QUESTION, TEXTS, policy="full")
    torch.manual_seed(5)
    output = model.generate(**inputs, do_sample=True, temperature=0.9, max_new_tokens=8, num_beams=1)
    assert new_ids(output, inputs) == expected


def test_policies_differ_where_they_should():
    llm = wrapped()
    logits = [llm.prefill(QUESTION, TEXTS, policy=p).logits for p in ("full", "reuse", "link:k=8", "cacheblend")]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-3 for other in logits[i + 1 :])


def test_plain_text_models_work():
    llm = chunkcache.wrap(tiny_model(), tiny_tokenizer(512))
    assert llm.generate(QUESTION, ONE, **GREEDY).token_ids == plain(
        llm.model, prompt_ids(llm, chunks=ONE), do_sample=False
    )


def test_a_system_prompt_changes_the_answer():
    llm = wrapped()
    briefly = llm.prefill(QUESTION, TEXTS, system="Be brief.").logits
    assert (briefly - llm.prefill(QUESTION, TEXTS).logits).abs().max() > 1e-3


def test_duplicate_chunks_are_served():
    llm = wrapped(policy="prefix")
    chunks = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    expected = own_logits(llm.model, prompt_ids(llm, chunks=chunks))
    for _ in range(2):
        assert_close(llm.prefill(QUESTION, chunks).logits, expected)
    assert llm.prefill(QUESTION, chunks, policy="link").stats.hits == 4


def test_bfloat16_works():
    model = tiny_model(dtype=torch.bfloat16)
    pre = wrapped(model).prefill(QUESTION, ONE)
    assert pre.logits.dtype == pre.past_key_values.layers[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(pre.logits, own_logits(model, pre.input_ids), atol=0.3, rtol=0.1)


# --- every keyword of generate()


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def no_even_tokens(input_ids, scores):
    scores = scores.clone()
    scores[:, ::2] = -torch.inf
    return scores


KEYWORDS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(256))},
    "logits_processor": {"logits_processor": [no_even_tokens]},
    "stopping_criteria": {"stopping_criteria": [StopAfter(140)], "max_new_tokens": 20},
    "generation_config": {"generation_config": GenerationConfig(do_sample=True, top_k=7, max_new_tokens=8)},
    "num_beams": {"num_beams": 3},
    "length_penalty": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "stop_strings": {"stop_strings": list("aeiotns"), "tokenizer": chat_tokenizer()},
}


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("keyword", KEYWORDS)
@pytest.mark.parametrize(("policy", "chunks"), [("full", TEXTS), ("link:k=8", ONE)], ids=["full", "link"])
def test_keywords_do_what_they_do_in_transformers(name, keyword, policy, chunks):
    model = tiny_model(name)
    llm = wrapped(model)
    options = {"max_new_tokens": 8, **KEYWORDS[keyword]}
    expected = plain(model, prompt_ids(llm, chunks=chunks), seed=11, **options)
    torch.manual_seed(11)
    assert llm.generate(QUESTION, chunks, policy=policy, **options).token_ids == expected


def test_every_keyword_changes_something():
    """The test above shows nothing for a keyword that would not change the plain answer."""
    llm = wrapped()
    ids = prompt_ids(llm)
    greedy = plain(llm.model, ids, do_sample=False)
    same = {name for name, options in KEYWORDS.items() if plain(llm.model, ids, seed=11, **options) == greedy}
    assert same <= {"greedy", "prompt_lookup_num_tokens"}


def test_max_new_tokens_limits_and_min_new_tokens_lengthens():
    llm = wrapped()
    first = llm.generate(QUESTION, TEXTS, max_new_tokens=1).token_ids
    assert len(first) == 1
    options = {"eos_token_id": first[0], "max_new_tokens": 8}
    assert llm.generate(QUESTION, TEXTS, **options).token_ids == first
    longer = llm.generate(QUESTION, TEXTS, min_new_tokens=6, **options).token_ids
    assert len(longer) >= 6
    assert first[0] not in longer[:6]


def test_any_of_several_eos_ids_ends_the_answer():
    llm = wrapped()
    tokens = llm.generate(QUESTION, TEXTS, **GREEDY).token_ids
    stop = next(token for token in tokens if token != tokens[0])
    unseen = next(token for token in range(100) if token not in tokens)
    out = llm.generate(QUESTION, TEXTS, eos_token_id=[unseen, stop], **GREEDY)
    assert out.token_ids == tokens[: tokens.index(stop) + 1]


def test_a_dict_comes_back_whole():
    llm = wrapped()
    out = llm.generate(
        QUESTION, TEXTS, policy="full", return_dict_in_generate=True, output_scores=True, output_logits=True, **GREEDY
    )
    ids = prompt_ids(llm)
    expected = llm.model.generate(
        ids, return_dict_in_generate=True, output_scores=True, output_logits=True, pad_token_id=3, **GREEDY
    )
    assert out.output.sequences.tolist() == expected.sequences.tolist()
    assert out.token_ids == expected.sequences[0, ids.shape[1] :].tolist()
    for one, other in zip(out.output.scores + out.output.logits, expected.scores + expected.logits, strict=True):
        assert_close(one, other)
    assert out.output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_a_streamer_gets_every_token():
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    llm, streamer = wrapped(), Collect()
    out = llm.generate(QUESTION, TEXTS, streamer=streamer, **GREEDY)
    assert streamer.ids == [*prompt_ids(llm)[0].tolist(), *out.token_ids]
    assert streamer.ended


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=str)
def test_an_assistant_changes_nothing_but_speed(options):
    model = tiny_model()
    llm = wrapped(model)
    assistant = own_model(num_hidden_layers=2)
    expected = plain(model, prompt_ids(llm), seed=2, assistant_model=copy.deepcopy(assistant), **options)
    torch.manual_seed(2)
    out = llm.generate(QUESTION, TEXTS, policy="full", max_new_tokens=8, assistant_model=assistant, **options)
    assert out.token_ids == expected


def test_the_length_in_a_generation_config_counts():
    out = wrapped().generate(QUESTION, TEXTS, generation_config=GenerationConfig(max_new_tokens=5, do_sample=False))
    assert len(out.token_ids) == 5


def test_max_length_counts():
    llm = wrapped()
    length = prompt_ids(llm).shape[1]
    assert len(llm.generate(QUESTION, TEXTS, max_length=length + 5).token_ids) == 5


def test_prompt_and_answer_may_fill_the_context():
    llm = wrapped()
    length = prompt_ids(llm).shape[1]
    stop = [StopAfter(length + 1)]
    room = 512 - length
    assert llm.generate(QUESTION, TEXTS, max_new_tokens=room, stopping_criteria=stop).token_ids
    with pytest.raises(chunkcache.ContextLengthError, match=f"{length} tokens and {room + 1} new ones"):
        llm.generate(QUESTION, TEXTS, max_new_tokens=room + 1, stopping_criteria=stop)


def test_beams_of_the_models_own_config_count():
    model = own_model()
    llm = wrapped(model)
    expected = plain(model, prompt_ids(llm), num_beams=3)
    model.generation_config.num_beams = 3
    assert llm.generate(QUESTION, TEXTS, policy="full", max_new_tokens=8).token_ids == expected
    options = {"generation_config": GenerationConfig(max_new_tokens=8), "max_new_tokens": 8}
    assert llm.generate(QUESTION, TEXTS, policy="full", **options).token_ids == expected


@pytest.mark.parametrize("default", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_setting_in_the_models_config_does_no_harm(default):
    model = own_model()
    llm = wrapped(model)
    expected = plain(model, prompt_ids(llm), do_sample=False)
    model.generation_config.update(**default)
    assert llm.generate(QUESTION, TEXTS, policy="full", **GREEDY).token_ids == expected


def test_options_of_the_caller_are_left_as_they_were():
    criteria, processors = [StopAfter(500)], [no_even_tokens]
    config = GenerationConfig(max_new_tokens=4)
    before = config.to_dict()
    llm = wrapped()
    options = {"stopping_criteria": criteria, "logits_processor": processors, "generation_config": config}
    llm.generate(QUESTION, TEXTS, **options)
    list(llm.stream(QUESTION, TEXTS, **options))
    assert len(criteria) == len(processors) == 1
    assert config.to_dict() == before


# --- the model is left as it was


CALLS = {
    "generate": lambda llm, **options: llm.generate(QUESTION, TEXTS, max_new_tokens=3, **options),
    "beams": lambda llm, **options: llm.generate(QUESTION, TEXTS, max_new_tokens=3, num_beams=2, **options),
    "stream": lambda llm, **options: list(llm.stream(QUESTION, TEXTS, max_new_tokens=3, **options)),
    "prefill": lambda llm: llm.prefill(QUESTION, TEXTS),
    "inputs": lambda llm: llm.prepare_inputs(QUESTION, TEXTS),
    "precompute": lambda llm: llm.precompute(TEXTS),
}
POLICIES = list(blend.POLICIES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_call_leaves_a_trace(policy, attention):
    model = own_model(attention=attention)
    before = snapshot(model)
    llm = wrapped(model, policy=policy)
    assert snapshot(model) == before
    for call in CALLS.values():
        call(llm)
        assert snapshot(model) == before


@pytest.mark.parametrize("call", ["generate", "beams", "stream"])
@pytest.mark.parametrize("policy", ["link:k=8", "cacheblend:ratio=0.3"])
def test_an_error_while_decoding_leaves_no_trace(call, policy):
    def fail(input_ids, scores):
        raise ZeroDivisionError

    model = own_model()
    llm = wrapped(model, policy=policy)
    expected, before = llm.prefill(QUESTION, TEXTS).logits, snapshot(model)
    with pytest.raises(ZeroDivisionError):
        CALLS[call](llm, logits_processor=[fail])
    assert snapshot(model) == before
    assert torch.equal(llm.prefill(QUESTION, TEXTS).logits, expected)


@pytest.mark.parametrize("call", ["generate", "beams", "stream", "prefill", "inputs"])
@pytest.mark.parametrize("policy", ["link:k=8", "cacheblend:ratio=0.3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_an_error_in_a_layer_leaves_no_trace(call, policy, layer):
    def fail(*_):
        raise ZeroDivisionError

    model = own_model()
    llm = wrapped(model, policy=policy)
    expected, before = llm.prefill(QUESTION, TEXTS).logits, snapshot(model)
    with model.model.layers[layer].mlp.register_forward_hook(fail), pytest.raises(ZeroDivisionError):
        CALLS[call](llm)
    assert snapshot(model) == before
    assert torch.equal(llm.prefill(QUESTION, TEXTS).logits, expected)


# --- stream


def test_leaving_a_stream_stops_the_thread():
    llm = wrapped()
    stream = llm.stream(QUESTION, TEXTS, max_new_tokens=300, min_new_tokens=300)
    for _ in stream:
        break
    assert all(thread.name != "chunkcache-stream" for thread in threading.enumerate())
    assert len(stream.result.token_ids) < 300


def test_a_stream_keeps_the_callers_criteria():
    llm = wrapped()
    length = prompt_ids(llm).shape[1]
    stream = llm.stream(QUESTION, TEXTS, max_new_tokens=30, stopping_criteria=[StopAfter(length + 4)])
    list(stream)
    assert len(stream.result.token_ids) == 4


def test_bad_input_to_stream_is_raised_at_once():
    with pytest.raises(chunkcache.PromptError):
        wrapped().stream("", TEXTS)


def test_an_error_in_a_stream_reaches_the_loop():
    with pytest.raises(chunkcache.ContextLengthError, match="512"):
        list(wrapped().stream(QUESTION, TEXTS, max_new_tokens=1000))


# --- policies


def test_a_policy_is_overridden_per_call():
    llm = wrapped(policy="reuse")
    assert llm.generate(QUESTION, TEXTS, max_new_tokens=1).stats.policy == "reuse"
    for policy in ("full", "link:k=3", parse_policy("cacheblend:ratio=0.5")):
        assert llm.generate(QUESTION, TEXTS, policy=policy, max_new_tokens=1).stats.policy.startswith(str(policy))
        assert llm.prefill(QUESTION, TEXTS, policy=policy).stats.policy.startswith(str(policy))
    assert llm.policy == parse_policy("reuse")


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_remembers_chunks_in_their_context(name):
    llm = wrapped(tiny_model(name), policy="prefix")
    first = llm.prefill(QUESTION, TEXTS)
    again = llm.prefill("Why?", TEXTS)
    in_chunks = sum(len(llm.prompts.chunk(text)) for text in TEXTS)
    assert again.stats.exact_tokens == again.stats.reused_tokens == len(llm.prompts.prefix()) + in_chunks
    assert again.stats.recomputed_share < 0.3
    assert_close(llm.prefill(QUESTION, TEXTS).logits, first.logits)
    assert_close(again.logits, own_logits(llm.model, prompt_ids(llm, "Why?")))


def test_prefix_knows_nothing_of_another_order():
    llm = wrapped(policy="prefix")
    llm.prefill(QUESTION, TEXTS)
    other = [TEXTS[0], TEXTS[2], TEXTS[1]]
    pre = llm.prefill(QUESTION, other)
    assert pre.stats.exact_tokens == len(llm.prompts.prefix()) + len(llm.prompts.chunk(TEXTS[0]))
    assert_close(pre.logits, own_logits(llm.model, prompt_ids(llm, chunks=other)))
    assert llm.prefill(QUESTION, other).stats.hits == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_other_policies_use_what_prefix_remembered(name):
    llm = wrapped(tiny_model(name), policy="reuse")
    llm.generate(QUESTION, TEXTS, policy="prefix", max_new_tokens=2)
    pre = llm.prefill(QUESTION, TEXTS)
    assert pre.stats.exact_tokens == pre.stats.reused_tokens
    assert_close(pre.logits, own_logits(llm.model, pre.input_ids))


# --- the store


@pytest.mark.parametrize("policy", POLICIES)
def test_a_store_too_small_for_a_chunk_still_answers(policy):
    small, big = wrapped(store="memory://?max_bytes=1KiB", policy=policy), wrapped(policy=policy)
    small.precompute(TEXTS)
    for _ in range(2):
        expected = big.generate(QUESTION, TEXTS, **GREEDY).token_ids
        assert small.generate(QUESTION, TEXTS, **GREEDY).token_ids == expected
    stats = small.store.stats()
    assert (stats.entries, stats.nbytes) == (0, 0)
    assert stats.refused > 0


def test_a_store_for_one_chunk_evicts_and_answers():
    big = wrapped()
    big.precompute(TEXTS)
    room = max(len(big.prompts.chunk(text)) for text in TEXTS) * 4 * 2 * 2 * 16 * 4
    tight = wrapped(store=MemoryStore(Budget(room)))
    for chunks in (TEXTS, TEXTS[::-1]):
        assert_close(tight.prefill(QUESTION, chunks).logits, big.prefill(QUESTION, chunks).logits)
    assert tight.store.stats().evictions > 0
    assert tight.store.stats().nbytes <= room


def test_wrappers_share_a_store_unless_their_salt_differs():
    store = MemoryStore()
    wrapped(store=store, tenant="a").precompute(TEXTS)
    assert wrapped(store=store, tenant="a").precompute(TEXTS).computed == 0
    assert wrapped(store=store, tenant="b").precompute(TEXTS).computed == 3
    assert wrapped(store=store).precompute(TEXTS).computed == 3


def test_another_model_does_not_see_the_chunks():
    store = MemoryStore()
    wrapped(store=store).precompute(TEXTS)
    other = own_model()
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight.mul_(2)
    assert wrapped(other, store=store).precompute(TEXTS).computed == 3


def held(store):
    return {entry.key: store.peek(entry.key) for entry in store.entries()}


def test_a_poisoned_entry_is_not_used():
    llm = wrapped()
    llm.precompute(TEXTS)
    expected = llm.prefill(QUESTION, TEXTS).logits
    for key, kv in held(llm.store).items():
        wrong = ChunkKV.of([9] * len(kv), kv.position, [torch.zeros_like(layer) for layer in kv.layers])
        llm.store.put(key, wrong)
    assert_close(llm.prefill(QUESTION, TEXTS).logits, expected)
    assert llm.store.stats().mismatches == 4


def test_a_request_leaves_stored_chunks_alone():
    llm = wrapped(policy="cacheblend:ratio=0.5")
    llm.precompute(TEXTS)
    before = {key: [layer.clone() for layer in kv.layers] for key, kv in held(llm.store).items()}
    for policy in POLICIES:
        llm.generate(QUESTION, TEXTS[::-1], policy=policy, **GREEDY)
    for key, layers in before.items():
        assert all(map(torch.equal, llm.store.peek(key).layers, layers))


# --- secrets


def test_no_text_id_or_salt_is_logged_or_used_as_a_key(caplog):
    caplog.set_level(logging.DEBUG)
    llm = wrapped(store="memory://?max_bytes=40KiB", tenant="tenant-secret-7")
    llm.precompute([*TEXTS, " ".join(TEXTS)], system="The password is swordfish.")
    llm.generate(QUESTION, TEXTS, system="The password is swordfish.", **GREEDY)
    key, chunk = next(iter(held(llm.store))), llm.prompts.chunk(TEXTS[0])
    llm.store.put(key, ChunkKV.of(chunk, 0, [torch.zeros(2, 2, 1, 16)]))
    assert llm.store.get(key, chunk[1:]) is None
    with llm.attached():
        llm.model.generate(prompt_ids(llm), pad_token_id=3, **GREEDY)
    assert len(caplog.records) >= 2  # a refused and a mismatching entry
    said = caplog.text + repr([record.__dict__ for record in caplog.records]) + repr(list(llm.store.entries()))
    secrets = [QUESTION, "tenant-secret", "swordfish", *(text[:20] for text in TEXTS)]
    secrets += [", ".join(map(str, llm.prompts.chunk(text)[:4])) for text in TEXTS]
    assert not [secret for secret in secrets if secret in said]


# --- several threads


@pytest.mark.parametrize("policy", POLICIES)
def test_threads_get_what_they_would_get_alone(policy):
    llm = wrapped(policy=policy)
    requests = [(QUESTION, TEXTS), ("Why?", TEXTS[::-1]), ("Who wrote it?", TEXTS[1:]), ("When?", [])]

    def answer(request):
        return [llm.generate(*request, **GREEDY).token_ids for _ in range(4)]

    expected = [answer(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, requests)) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", [1, 3])
def test_a_forward_of_another_thread_may_fall_into_a_prefill(policy, layer, attention):
    """While a selective prefill stands in `layer`, a whole other forward of the same model runs."""
    model = own_model(attention=attention)
    llm, another = wrapped(model, policy=policy), wrapped(model, policy=policy)
    ids, cache, armed, other, before = torch.arange(10, 40)[None], DynamicCache(), [], [], snapshot(model)
    main = threading.current_thread()

    def forward():
        with torch.no_grad():
            other.append(model(input_ids=ids, past_key_values=cache).logits[0, -1])

    def interrupt(*_):
        if armed and threading.current_thread() is main and not other:
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()

    with model.model.layers[layer].mlp.register_forward_hook(interrupt):
        another.precompute(TEXTS)
        expected = another.prefill(QUESTION, TEXTS).logits
        llm.precompute(TEXTS)
        armed.append(True)
        logits = llm.prefill(QUESTION, TEXTS).logits
    assert_close(logits, expected)
    assert_close(other[0], own_logits(model, ids))
    assert snapshot(model) == before


def test_a_forward_may_outlast_the_request_it_began_in():
    """Hooks are looked up when a forward starts; it may come to them when the request has taken them away."""
    model = own_model()
    llm = wrapped(model)
    expected = own_logits(model, prompt_ids(llm))
    started, ended, waited, other = threading.Event(), threading.Event(), [], []

    def wait(*_):
        if threading.current_thread() is thread:
            started.set()
            waited.append(ended.wait(20))

    def start(input_ids, scores, **_):
        if not started.is_set():
            thread.start()
            assert started.wait(20)
        return torch.tensor([False])

    thread = threading.Thread(target=lambda: other.append(own_logits(model, prompt_ids(llm))))
    with model.register_forward_pre_hook(wait):
        llm.generate(QUESTION, TEXTS, stopping_criteria=[start], **GREEDY)
        ended.set()
        thread.join()
    assert waited == [True]  # it did begin in the request, and go on after it
    assert_close(other[0], expected)
