"""An unchanged `model.generate(input_ids)` reuses the chunks in its prompt, and is itself again afterwards.

Under the policy `prefix` every token that is not exact is recomputed, so wherever chunks are found the answer
must be the plain one; other policies show that less was computed.
"""

from __future__ import annotations

import pytest
import torch
from support.llm import QUESTION, TEXTS, chat_tokenizer, own_model, plain, prompt_ids, snapshot, tiny_model, wrapped
from transformers import DynamicCache, GenerationConfig

import chunkcache
from chunkcache.blend import parse_policy
from chunkcache.store import MemoryStore

FAMILIES = ["llama", "mistral-sliding", "gemma3"]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 3}


def ready(model=None, policy: str = "prefix", **options) -> chunkcache.CachedLLM:
    llm = wrapped(model, policy=policy, **options)
    llm.precompute(TEXTS)
    return llm


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(chat_tokenizer()(text).input_ids)


def prompt_of(llm, *parts) -> torch.Tensor:
    """Join parts, each a text or the number of a chunk, with nothing between them."""
    ids = [llm.prompts.chunk(TEXTS[part]) if isinstance(part, int) else ids_of(part) for part in parts]
    return torch.tensor([sum(ids, ())])


def new_ids(output: torch.Tensor, prompt: torch.Tensor) -> list[int]:
    return output[0, prompt.shape[1] :].tolist()


ARRANGEMENTS = {
    "one in the middle": ("Look at this: ", 2, "Now, who wrote it down?"),
    "at the start": (0, "When was that?"),
    "several, no separators": ("Read. ", 0, 1, 2, "Well?"),
    "another order": ("Some words before. ", 2, 0, "and then", 1, "What else?"),
    "twice": ("x", 1, 1, "Why?"),
    "up to the very end": ("What follows is a chunk. ", 0),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parts", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_chunks_are_found_anywhere(name, parts):
    model = tiny_model(name)
    llm = ready(model)
    prompt = prompt_of(llm, *parts)
    expected = plain(model, prompt, do_sample=False, max_new_tokens=6)
    with llm.attached():
        assert new_ids(model.generate(prompt, **GREEDY), prompt) == expected
    wanted = [part for part in parts if isinstance(part, int)]
    assert llm.last_stats.hits == llm.last_stats.chunks == len(wanted)
    last = 1 if parts[-1] in wanted else 0  # the last token is always computed
    assert llm.last_stats.reused_tokens == sum(len(llm.prompts.chunk(TEXTS[part])) for part in wanted) - last
    assert (llm.last_stats.fallbacks, llm.last_stats.misses) == (0, 0)


@pytest.mark.parametrize("before", ["sp", "193", "第", "_"])
@pytest.mark.parametrize("text", ["reading of the dough in 1931, after a yes or a no", "橋は一九年に開通。"])
def test_a_text_is_found_right_behind_a_letter_or_a_digit(before, text):
    model = tiny_model()
    llm = wrapped(model, policy="prefix")
    llm.precompute([text])
    prompt = torch.tensor([ids_of(f"Read this: {before}{text}in full, and say: when?")])
    expected = plain(model, prompt, do_sample=False, max_new_tokens=6)
    with llm.attached():
        assert new_ids(model.generate(prompt, **GREEDY), prompt) == expected
    chunk = llm.prompts.chunk(text)
    assert llm.last_stats.hits == 1
    assert 16 <= llm.last_stats.reused_tokens < len(chunk) < 32
    message = [{"role": "user", "content": f"Read this: {before}{text}, and say: when?"}]
    assert llm.chat(message, max_new_tokens=2).stats.chunks == (len(text) >= 32)


def test_edges_that_tokenise_differently_are_left_out():
    model = tiny_model()
    llm = ready(model)
    text = f"({TEXTS[2]})"  # its first and last tokens merge with the brackets or lack the separator
    prompt = torch.tensor([ids_of(f"Read {text} and say: who?")])
    expected = plain(model, prompt, do_sample=False, max_new_tokens=6)
    with llm.attached():
        assert new_ids(model.generate(prompt, **GREEDY), prompt) == expected
    assert 16 <= llm.last_stats.reused_tokens < len(llm.prompts.chunk(TEXTS[2]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", ["reuse", "link:k=8", "cacheblend:ratio=0.15"])
def test_the_first_chunk_behind_the_prefix_is_exact(name, policy):
    model = tiny_model(name)
    llm = ready(model, policy)
    prompt = prompt_ids(llm, chunks=TEXTS[:1])
    expected = plain(model, prompt, do_sample=False, max_new_tokens=6)
    with llm.attached():
        assert new_ids(model.generate(prompt, **GREEDY), prompt) == expected
    assert llm.last_stats.exact_tokens == llm.last_stats.reused_tokens
    assert llm.last_stats.recomputed_share < 0.5


def test_the_policy_decides_how_much_is_computed():
    model = tiny_model()
    shares = []
    for policy in ("reuse", "link:k=4", "cacheblend:ratio=0.5", "prefix"):
        llm = ready(model, policy)
        prompt = prompt_of(llm, "Read. ", 0, 1, 2, "Well?")
        with llm.attached():
            model.generate(prompt, **GREEDY)
        assert llm.last_stats.policy.startswith(policy)
        shares.append(llm.last_stats.recomputed_share)
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert shares[-1] == 1


def test_reuse_gives_what_the_same_reuse_gives_through_the_wrapper():
    model = tiny_model()
    llm = ready(model, "link:k=4")
    prompt = prompt_ids(llm)
    with llm.attached():
        attached = new_ids(model.generate(prompt, **GREEDY), prompt)
    assert attached == llm.generate(QUESTION, TEXTS, do_sample=False, max_new_tokens=6).token_ids
    assert attached != plain(model, prompt, do_sample=False, max_new_tokens=6)  # so it did reuse


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model.generate(ids, **GREEDY),
        lambda model, ids: model.generate(inputs=ids, **GREEDY),
        lambda model, ids: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY),
        lambda model, ids: model.generate(ids, GenerationConfig(**GREEDY)),
        lambda model, ids: model.generate(ids, generation_config=GenerationConfig(**GREEDY), use_cache=True),
        lambda model, ids: model.generate(ids, return_dict_in_generate=True, **GREEDY).sequences,
    ],
    ids=["positional", "inputs", "keywords", "config", "config by name", "dict"],
)
def test_every_way_to_call_it(call):
    model = tiny_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, 0, "Well?")
    expected = call(model, prompt).tolist()
    with llm.attached():
        assert call(model, prompt).tolist() == expected
    assert llm.last_stats.hits == 2


def test_sampling_is_the_same_with_the_same_seed():
    model = tiny_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, 0, "Well?")
    expected = plain(model, prompt, seed=3, do_sample=True, top_k=40)
    torch.manual_seed(3)
    with llm.attached():
        output = model.generate(prompt, do_sample=True, top_k=40, max_new_tokens=8, pad_token_id=3)
    assert new_ids(output, prompt) == expected


UNTOUCHED = {
    "nothing found": ("plain words without any chunk", {}),
    "beams": (None, {"num_beams": 3}),
    "several answers": (None, {"num_return_sequences": 2, "do_sample": True}),
    "a cache kind": (None, {"cache_implementation": "static"}),
    "no cache": (None, {"use_cache": False}),
    "chunked prefill": (None, {"prefill_chunk_size": 16}),
    "prompt lookup": (None, {"prompt_lookup_num_tokens": 3}),
    "beams by config": (None, {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=6, pad_token_id=3)}),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_it_cannot_help_goes_straight_through(case):
    text, options = UNTOUCHED[case]
    options = options if "generation_config" in options else {**GREEDY, **options}
    model = tiny_model()
    llm = ready(model)
    prompt = torch.tensor([ids_of(text)]) if text else prompt_of(llm, "Read. ", 2, 0, "Well?")
    torch.manual_seed(0)
    expected = model.generate(prompt, **options).tolist()
    torch.manual_seed(0)
    with llm.attached():
        assert model.generate(prompt, **options).tolist() == expected
    assert (llm.last_stats.fallbacks, llm.last_stats.hits) == (1, 0)


def test_a_generation_config_by_place_counts():
    model = tiny_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, 0, "Well?")
    config = GenerationConfig(num_beams=2, max_new_tokens=6, pad_token_id=3)
    expected = model.generate(prompt, config).tolist()
    with llm.attached():
        assert model.generate(prompt, config).tolist() == expected
    assert (llm.last_stats.fallbacks, llm.last_stats.hits) == (1, 0)


def test_a_batch_goes_straight_through():
    model = tiny_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, 0, "Well?").repeat(2, 1)
    prompt[1, 0] = 77
    options = {**GREEDY, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **options).tolist()
    with llm.attached():
        assert model.generate(prompt, **options).tolist() == expected
    assert llm.last_stats.fallbacks == 1


def test_a_padded_prompt_goes_straight_through():
    model = tiny_model()
    llm = ready(model)
    prompt = torch.cat((torch.tensor([[3, 3]]), prompt_of(llm, "Read. ", 2, "Well?")), dim=1)
    options = {**GREEDY, "attention_mask": (prompt != 3).long()}
    expected = model.generate(prompt, **options).tolist()
    with llm.attached():
        assert model.generate(prompt, **options).tolist() == expected
    assert llm.last_stats.fallbacks == 1


def test_a_cache_of_the_callers_goes_straight_through():
    model = tiny_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, 0, "Well?")
    expected = model.generate(prompt, **GREEDY).tolist()
    cache = DynamicCache()
    with llm.attached():
        assert model.generate(prompt, past_key_values=cache, **GREEDY).tolist() == expected
    assert llm.last_stats.fallbacks == 1
    assert cache.get_seq_length() == len(expected[0]) - 1


def test_policy_full_reuses_nothing():
    model = tiny_model()
    llm = ready(model, "full")
    prompt = prompt_of(llm, "Read. ", 2, "Well?")
    expected = model.generate(prompt, **GREEDY).tolist()
    with llm.attached():
        assert model.generate(prompt, **GREEDY).tolist() == expected
    assert llm.last_stats.fallbacks == 1


def test_a_chunk_that_has_gone_is_a_miss():
    model = tiny_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, "Well?")
    expected = model.generate(prompt, **GREEDY).tolist()
    llm.store.clear()
    with llm.attached():
        assert model.generate(prompt, **GREEDY).tolist() == expected
    assert (llm.last_stats.misses, llm.last_stats.fallbacks) == (1, 1)


def test_chunks_in_a_shared_store_are_found():
    model, store = tiny_model(), MemoryStore()
    ready(model, store=store)
    second = ready(model, store=store)  # nothing left to compute, but as findable
    prompt = prompt_of(second, "Read. ", 2, "Well?")
    with second.attached():
        model.generate(prompt, **GREEDY)
    assert second.last_stats.hits == 1


def test_the_wrapper_works_while_attached():
    model = tiny_model()
    llm = ready(model, "link:k=4")
    expected = llm.generate(QUESTION, TEXTS, do_sample=False, max_new_tokens=6).token_ids
    with llm.attached():
        assert llm.generate(QUESTION, TEXTS, do_sample=False, max_new_tokens=6).token_ids == expected


def test_leaving_gives_the_model_its_own_generate_back():
    model = own_model()
    llm = ready(model)
    before, own = snapshot(model), model.generate
    with llm.attached() as same:
        assert same is llm
        assert "generate" in model.__dict__
        model.generate(prompt_of(llm, "Read. ", 2, "Well?"), **GREEDY)
    assert snapshot(model) == before
    assert model.generate == own


def test_an_error_inside_leaves_nothing_behind():
    model = own_model()
    llm = ready(model)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), llm.attached():
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_an_error_in_generate_leaves_nothing_behind():
    model = own_model()
    llm = ready(model)
    prompt = prompt_of(llm, "Read. ", 2, 0, "Well?")
    expected = model.generate(prompt, **GREEDY).tolist()
    before = snapshot(model)

    def fail(ids, scores):
        raise ZeroDivisionError

    with llm.attached():
        with pytest.raises(ZeroDivisionError):
            model.generate(prompt, logits_processor=[fail], **GREEDY)
        assert model.generate(prompt, **GREEDY).tolist() == expected
    assert snapshot(model) == before


def test_attach_and_detach_may_be_repeated():
    model = own_model()
    llm = ready(model)
    before = snapshot(model)
    assert llm.attach() is llm
    llm.attach()
    llm.detach()
    assert snapshot(model) == before
    llm.detach()
    assert snapshot(model) == before
    with llm.attached():
        model.generate(prompt_of(llm, "Read. ", 2, "Well?"), **GREEDY)
    assert llm.last_stats.hits == 1


def test_another_generate_on_the_instance_is_given_back():
    model = own_model()
    llm = ready(model)
    calls = []

    def theirs(*args, **kwargs):
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    model.generate = theirs
    with llm.attached():
        model.generate(prompt_of(llm, "Read. ", 2, "Well?"), **GREEDY)
        assert llm.last_stats.hits == 1
        model.generate(prompt_of(llm, "no chunk in here"), **GREEDY)
    assert model.generate is theirs
    assert calls  # at least what is not ours to serve goes to it


def test_two_wrappers_may_leave_in_any_order():
    model = own_model()
    first, second = ready(model), ready(model)
    before = snapshot(model)
    first.attach()
    second.attach()
    first.detach()
    second.detach()
    assert snapshot(model) == before


def test_there_are_no_stats_before_the_first_call():
    llm = ready()
    assert llm.last_stats is None


def test_the_attached_model_goes_by_the_wrappers_policy_of_the_moment():
    model = own_model()
    llm = ready(model, "reuse")
    with llm.attached():
        llm.policy = "link:k=1"
        model.generate(prompt_of(llm, "Read. ", 2, "Well?"), **GREEDY)
    assert llm.last_stats.policy == "link:k=1"
    assert llm.policy == parse_policy("link:k=1")


def test_attached_may_be_nested():
    model = own_model()
    llm = ready(model)
    with llm.attached():
        with llm.attached():
            pass
        assert "generate" in model.__dict__
    assert "generate" not in model.__dict__
