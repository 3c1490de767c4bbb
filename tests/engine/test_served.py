"""A model that changes after it was wrapped is never answered from KV of what it was."""

from __future__ import annotations

import threading

import pytest
import torch
import zoo
from support.changing import CHANGES, OPTIONS, error_of, in_place, one_row_by_data, tokenizer, warm
from support.llm import QUESTION, TEXTS, VOCAB
from support.llm import own_model as tiny

import chunkcache
from chunkcache.errors import InputError
from chunkcache.store import open_store


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_the_next_request(change):
    model = tiny()
    llm = warm(model)
    before = llm.fingerprint
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens > 0
    change(model)
    assert error_of(llm, model) < 1e-4
    assert llm.fingerprint != before
    answer = llm.generate(QUESTION, TEXTS, max_new_tokens=6, **OPTIONS)
    ids = llm.prefill(QUESTION, TEXTS).input_ids
    own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **OPTIONS)
    assert answer.token_ids == own[0, ids.shape[1] :].tolist()
    with llm.attached():
        attached = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **OPTIONS)
    assert attached.tolist() == own.tolist()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_is_written_under_the_key_of_what_it_was(change, tmp_path):
    store = open_store(f"disk://{tmp_path}")
    model = tiny()
    llm = chunkcache.wrap(model, tokenizer(), store=store, policy="prefix")
    change(model)
    llm.precompute(TEXTS)
    llm.prefill(QUESTION, TEXTS)
    store.flush()
    other = tiny()
    fresh = chunkcache.wrap(other, tokenizer(), store=store, policy="prefix")
    assert fresh.prefill(QUESTION, TEXTS).stats.cached_tokens == 0
    assert error_of(fresh, other) < 1e-4


def test_what_comes_back_is_found_again():
    model = tiny()
    llm = warm(model)
    before, cached = llm.fingerprint, llm.prefill(QUESTION, TEXTS).stats.cached_tokens
    with model.model.layers[0].register_forward_hook(lambda module, given, out: out + 1):
        assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens == 0
    assert llm.fingerprint == before
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens == cached


def test_the_kv_of_one_hook_are_not_those_of_the_next():
    model = tiny()
    llm = warm(model)
    for scale in (1.1, 1.3):
        with model.model.layers[0].register_forward_hook(lambda module, given, out, scale=scale: out * scale):
            llm.precompute(TEXTS)
            assert error_of(llm, model) < 1e-4


def test_a_change_of_dtype_serves_none_of_the_old_kv():
    model = tiny()
    llm = warm(model)
    model.to(torch.bfloat16)
    done = llm.prefill(QUESTION, TEXTS)
    assert done.stats.cached_tokens == 0
    assert done.logits.dtype == torch.bfloat16


def test_rounded_rotary_frequencies_are_another_model():
    """`.to(bfloat16)` rounds them, loading in bfloat16 does not; the weights are the same bit for bit."""
    rounded, loaded_so = tiny().to(torch.bfloat16), tiny().to(torch.bfloat16)
    loaded_so.model.rotary_emb.inv_freq = tiny().model.rotary_emb.inv_freq
    first = chunkcache.wrap(rounded, tokenizer()).fingerprint
    assert first != chunkcache.wrap(loaded_so, tokenizer()).fingerprint


def test_what_is_computed_while_the_model_changes_is_not_stored(caplog):
    """A weight sync comes in the middle of an answer; what its prefill computed is of the weights before."""
    model = tiny()
    llm = chunkcache.wrap(model, tokenizer(), policy="prefix")
    old = llm.fingerprint

    class Sync(torch.nn.Module):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            in_place(model)
            return scores

    entries = len(list(llm.store.entries()))
    llm.generate(QUESTION, TEXTS, max_new_tokens=2, logits_processor=[Sync()], **OPTIONS)
    assert len(list(llm.store.entries())) == entries + 1  # the prefix, which was computed before
    assert "the model changed while chunks were computed" in caplog.text
    assert llm.fingerprint != old
    assert error_of(llm, model) < 1e-4


def test_a_conversation_goes_on_with_the_model_as_it_is():
    model = tiny()
    llm = chunkcache.wrap(model, tokenizer(), policy="full")
    talk = llm.conversation()
    talk.generate(QUESTION, TEXTS[:1], max_new_tokens=3, **OPTIONS)
    in_place(model)
    done = talk.prefill("And the second?", TEXTS[1:])
    with torch.no_grad():
        own = model(input_ids=done.input_ids).logits[0, -1]
    assert float((done.logits - own).norm() / own.norm()) < 1e-4


def test_a_batch_is_of_the_model_as_it_is():
    model = tiny()
    llm = warm(model)
    in_place(model)
    requests = [(QUESTION, TEXTS), ("Who went away?", TEXTS)]
    answers = llm.generate_batch(requests, max_new_tokens=4, **OPTIONS)
    fresh = warm(model).generate_batch(requests, max_new_tokens=4, **OPTIONS)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in fresh]


def test_autocast_leaves_the_stored_kv_as_they_are():
    model = tiny()
    llm = chunkcache.wrap(model, tokenizer(), policy="prefix")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        llm.precompute(TEXTS)
        llm.prefill(QUESTION, TEXTS)
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens > 0
    assert error_of(llm, model) < 1e-4


def test_deletion_reaches_what_the_model_was():
    model = tiny()
    llm = chunkcache.wrap(model, tokenizer())
    llm.precompute(TEXTS, documents=["one"] * len(TEXTS))
    in_place(model)
    llm.precompute(TEXTS, documents=["one"] * len(TEXTS))
    assert llm.delete(document="one") == 2 * len(TEXTS)


@pytest.mark.parametrize(
    ("break_it", "kind", "says"),
    [
        (lambda model: model.train(), InputError, r"call model\.eval\(\) first"),
    ],
)
def test_a_model_that_can_no_longer_be_served_is_refused_at_the_next_request(break_it, kind, says):
    model = tiny()
    llm = warm(model)
    break_it(model)
    with pytest.raises(kind, match=says):
        llm.generate(QUESTION, TEXTS)


def test_an_unknown_adapter_is_refused_by_name():
    llm = chunkcache.wrap(tiny(), tokenizer())
    with pytest.raises(InputError, match=r"adapter='legal': the model has no such adapter \(it has none\)"):
        llm.generate(QUESTION, TEXTS, adapter="legal")


def test_requests_of_several_threads_notice_a_change_once():
    model = tiny()
    llm = warm(model)
    in_place(model)
    errors: list[float] = []
    threads = [threading.Thread(target=lambda: errors.append(error_of(llm, model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 4
    assert max(errors) < 1e-4


def test_refresh_reads_all_again():
    model = tiny()
    llm = warm(model)
    before = llm.fingerprint
    assert llm.refresh() == before
    one_row_by_data(model)
    assert llm.refresh() != before


def test_what_changes_no_output_is_no_change():
    model = tiny()
    llm = warm(model)
    before, served = llm.fingerprint, llm.engine.served.current()
    with llm.attached():
        assert llm.engine.served.current() is served
    model(input_ids=torch.arange(10, 20)[None], output_hidden_states=True, output_attentions=True)
    model.generate(torch.arange(10, 20)[None], max_new_tokens=2, **OPTIONS)
    assert llm.fingerprint == before
    assert llm.prefill(QUESTION, TEXTS).stats.cached_tokens > 0


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_no_family_changes_by_being_used(name):
    model = zoo.new(name, zoo.FAMILIES[name].attentions[0], vocab_size=VOCAB)
    llm = warm(model, policy="reuse")
    served = llm.engine.served.current()
    llm.generate(QUESTION, TEXTS, max_new_tokens=2, **OPTIONS)
    model.generate(torch.arange(10, 20)[None], max_new_tokens=2, **OPTIONS)
    assert llm.engine.served.current() is served
