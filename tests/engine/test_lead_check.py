"""The lead-in is measured on packaged documents, and a model that it harms goes without."""

from __future__ import annotations

import copy

import pytest
import zoo
from support.llm import VOCAB, chat_tokenizer, wrapped

from chunkcache.engine import lead_check
from chunkcache.engine.lead_check import LeadCheck, check_lead_in


@pytest.fixture
def llm(monkeypatch):
    """A model with room for the packaged documents, which are cut short."""
    monkeypatch.setattr(lead_check, "CHARACTERS", 80)
    model = zoo.new("llama", vocab_size=VOCAB, max_position_embeddings=4096)
    return wrapped(model, lead_in="Some words that stand before a chunk. " * 3)


def test_it_says_what_it_measured(llm):
    steps = []
    found = check_lead_in(llm.engine.decoder, llm.prompts, lambda *step: steps.append(step))
    assert isinstance(found, LeadCheck)
    assert steps == [(n + 1, lead_check.SETS) for n in range(lead_check.SETS)]
    assert found.answers > lead_check.SETS
    assert found.tokens > found.answers
    assert found.kl_alone > 0
    assert found.kl_lead > 0
    assert found.lead == (1024 if found.kl_lead <= found.kl_alone else 0)


def test_a_lead_in_that_harms_is_noticed(llm, monkeypatch):
    monkeypatch.setattr(lead_check, "DOCUMENTS", 1)  # one chunk alone behind the prefix is exact
    found = check_lead_in(llm.engine.decoder, llm.prompts)
    assert found.kl_alone == pytest.approx(0, abs=1e-5)
    assert found.kl_lead > 1e-4
    assert found.lead == 0


def test_a_lead_in_that_helps_is_kept(llm, monkeypatch):
    stored = lead_check._stored

    def right_behind_it(decoder, prompt, lead_in):
        true, alone, _ = stored(decoder, prompt, lead_in)
        return [true, alone, true]

    monkeypatch.setattr(lead_check, "_stored", right_behind_it)
    found = check_lead_in(llm.engine.decoder, llm.prompts)
    assert found.kl_lead == pytest.approx(0, abs=1e-5)
    assert found.lead == 1024


def test_without_a_lead_in_or_room_for_one_nothing_is_measured(llm):
    assert check_lead_in(llm.engine.decoder, wrapped(lead_in=" ").prompts) is None
    small = wrapped(zoo.new("llama", vocab_size=VOCAB))
    assert check_lead_in(small.engine.decoder, small.prompts) is None


def test_a_model_without_a_template_has_no_prefix_of_its_own(llm):
    tokenizer = copy.deepcopy(chat_tokenizer())  # all tests share that one
    tokenizer.chat_template = None
    import chunkcache

    plain = chunkcache.wrap(llm.model, tokenizer, lead_in="Some words. ", instruction="")
    assert check_lead_in(plain.engine.decoder, plain.prompts) is not None
