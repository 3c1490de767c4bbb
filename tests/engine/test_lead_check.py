"""The lead-in is measured on packaged documents, and a model that it harms goes without."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import zoo
from support.llm import VOCAB, chat_tokenizer, wrapped

import chunkcache
from chunkcache.blend.reuse import Reuse
from chunkcache.engine import packaged as documents
from chunkcache.engine.lead_check import check_lead_in
from chunkcache.engine.packaged import packaged


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """The packaged documents, cut short for tiny models."""
    monkeypatch.setattr(documents, "CHARACTERS", 80)


@pytest.fixture(scope="module")
def llm():
    """A model with room for the packaged documents."""
    model = zoo.new("llama", vocab_size=VOCAB, max_position_embeddings=4096)
    return wrapped(model, lead_in="Some words that stand before a chunk. " * 3)


def test_it_says_what_it_measured(llm):
    steps = []
    asked = packaged(llm.engine.decoder, llm.prompts, lambda *step: steps.append(step))
    assert steps == [(n + 1, documents.SETS) for n in range(documents.SETS)]
    found = check_lead_in(llm.engine.decoder, asked)
    assert found.answers == len(asked) > documents.SETS
    assert found.tokens == sum(len(each.answer) for each in asked) > found.answers
    assert found.kl_alone > 0
    assert found.kl_lead > 0
    assert found.lead == (1024 if found.kl_lead <= found.kl_alone else 0)


def test_a_lead_in_that_harms_is_noticed(llm, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS", 1)  # one chunk alone behind the prefix is exact
    found = check_lead_in(llm.engine.decoder, packaged(llm.engine.decoder, llm.prompts))
    assert found.kl_alone == pytest.approx(0, abs=1e-5)
    assert found.kl_lead > 1e-4
    assert found.lead == 0


def test_a_lead_in_that_helps_is_kept(llm, monkeypatch):
    monkeypatch.setattr(documents, "DOCUMENTS", 1)
    asked = packaged(llm.engine.decoder, llm.prompts)
    found = check_lead_in(llm.engine.decoder, [replace(each, alone=each.behind, behind=each.alone) for each in asked])
    assert found.kl_lead < found.kl_alone
    assert found.lead == 1024


def test_what_is_computed_alone_right_behind_the_prefix_is_exact_there(llm):
    """A prompt of that chunk alone is answered as by full prefill; behind it others stand that are moved."""
    asked = packaged(llm.engine.decoder, llm.prompts)[0]
    assert asked.moved(llm.engine.decoder, Reuse(), lead=False).kl > 0
    whole = replace(asked, alone=asked.alone[:2], prompt=replace(asked.prompt, spans=asked.prompt.spans[:1]))
    moved = whole.moved(llm.engine.decoder, Reuse(), lead=False)
    assert moved.kl == pytest.approx(0, abs=1e-4)
    assert moved.tokens == len(asked.answer)


def test_without_a_lead_in_or_room_for_one_nothing_is_measured(llm):
    assert packaged(llm.engine.decoder, wrapped(lead_in=" ").prompts) == []
    small = wrapped(zoo.new("llama", vocab_size=VOCAB))
    assert packaged(small.engine.decoder, small.prompts) == []


def test_a_model_without_a_template_has_no_prefix_of_its_own(llm):
    tokenizer = copy.deepcopy(chat_tokenizer())  # all tests share that one
    tokenizer.chat_template = None
    plain = chunkcache.wrap(llm.model, tokenizer, lead_in="Some words. ", instruction="")
    assert check_lead_in(plain.engine.decoder, packaged(plain.engine.decoder, plain.prompts)).kl_lead > 0
