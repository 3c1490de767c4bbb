"""How a wrapped model is made and closed, and the names of the release before."""

from __future__ import annotations

import pytest
import torch
from support.llm import QUESTION, TEXTS, chat_tokenizer, own_model, saved_model, tiny_model, wrapped

import chunkcache
from chunkcache.store import DiskStore, MemoryStore


def test_a_name_is_loaded_and_wrapped(tmp_path):
    with chunkcache.CachedLLM.from_pretrained(saved_model(tmp_path), device="cpu", policy="reuse") as llm:
        assert (llm.policy.name, llm.model.device.type) == ("reuse", "cpu")
        assert llm.generate(QUESTION, TEXTS, max_new_tokens=2).token_ids
    with pytest.raises(chunkcache.ModelNotFoundError):
        chunkcache.CachedLLM.from_pretrained(str(tmp_path / "nowhere"))


def test_all_after_the_tokenizer_goes_by_name():
    with pytest.raises(TypeError, match="positional"):
        chunkcache.wrap(tiny_model(), chat_tokenizer(), "memory://")


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'polcy'"):
        wrapped(polcy="reuse")


def test_closing_gives_generate_back_and_closes_the_store_that_was_opened_here(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(DiskStore, "close", lambda self: closed.append(self))
    model = own_model()
    with wrapped(model, store=f"disk://{tmp_path}/kv") as llm:
        llm.attach()
        assert "generate" in model.__dict__
    assert closed == [llm.store]
    assert "generate" not in model.__dict__


def test_a_store_of_the_callers_own_stays_open(monkeypatch):
    closed = []
    monkeypatch.setattr(MemoryStore, "close", lambda self: closed.append(self))
    with wrapped(store=MemoryStore()):
        pass
    assert closed == []


def test_the_salt_of_old_is_the_tenant():
    with pytest.warns(DeprecationWarning, match=r"wrap\(salt=\) is now tenant="):
        old = wrapped(salt="acme")
    assert old.keys(TEXTS) == wrapped(tenant="acme").keys(TEXTS) != wrapped().keys(TEXTS)


def test_old_methods_do_what_the_new_ones_do():
    llm = wrapped()
    llm.precompute(TEXTS, documents=["d"] * 3)
    with pytest.warns(DeprecationWarning, match=r"llm\.inputs is now llm\.prepare_inputs"):
        old = llm.inputs(QUESTION, TEXTS)
    assert torch.equal(old["input_ids"], llm.prepare_inputs(QUESTION, TEXTS)["input_ids"])
    with pytest.warns(DeprecationWarning, match=r"llm\.know is now llm\.register"):
        llm.know(TEXTS)
    with pytest.warns(DeprecationWarning, match=r"llm\.forget is now llm\.delete"):
        assert llm.forget(texts=TEXTS[:1]) == 1
    with pytest.warns(DeprecationWarning, match="llm.delete"):
        assert llm.forget(document="d") == 2
    with pytest.warns(DeprecationWarning, match="llm.delete"):
        llm.forget()
    assert not list(llm.store.entries())


def test_an_old_prefill_output_has_its_cache_under_the_new_name():
    prefilled = wrapped().prefill(QUESTION, TEXTS)
    with pytest.warns(DeprecationWarning, match=r"\.cache is now .*past_key_values"):
        assert prefilled.cache is prefilled.past_key_values
