"""Models under torch.compile are served, in whichever way they were compiled; what serves them is not compiled."""

from __future__ import annotations

import pytest
import torch
from support.llm import QUESTION, TEXTS, chat_tokenizer
from support.llm import own_model as tiny

import chunkcache


def whole(model):
    """torch.compile(model)."""
    return torch.compile(model, backend="eager")


def in_place(model):
    """model.compile()."""
    model.compile(backend="eager")
    return model


def by_layer(model):
    """layer.compile()."""
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def forward(model):
    """model.forward = torch.compile(model.forward)."""
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def layers_wrapped(model):
    """layers[i] = torch.compile(layers[i])."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


def wrapped(model):
    llm = chunkcache.wrap(model, chat_tokenizer(), policy="link:k=4")
    llm.precompute(TEXTS)
    return llm


COMPILED = {way.__name__: way for way in (whole, in_place, by_layer, forward, layers_wrapped)}


@pytest.mark.parametrize("compiled", sorted(COMPILED))
def test_a_compiled_model_is_served_as_it_was_before(compiled):
    """Its shadows are not compiled, so what they compute is the model's own to the last bit."""
    want, plain = wrapped(model := tiny()), {}
    for policy in ("full", "link:k=4", "cacheblend"):
        plain[policy] = want.prefill(QUESTION, TEXTS, policy=policy).logits
    llm = wrapped(COMPILED[compiled](tiny()))
    assert llm.fingerprint == want.fingerprint
    for policy, logits in plain.items():
        assert torch.equal(llm.prefill(QUESTION, TEXTS, policy=policy).logits, logits)
    options = {"max_new_tokens": 4, "policy": "link:k=4"}
    assert llm.generate(QUESTION, TEXTS, **options).token_ids == want.generate(QUESTION, TEXTS, **options).token_ids
    served = llm.engine.served.current()
    assert llm.engine.served.current() is served  # nothing has changed from one look to the next
    COMPILED[compiled](model)
    assert torch.equal(want.prefill(QUESTION, TEXTS, policy="full").logits, plain["full"])


def test_a_model_that_is_compiled_whole_can_be_attached_to():
    compiled = torch.compile(tiny(), backend="eager")
    llm = wrapped(compiled)
    ids = torch.tensor([llm.prompts.build(QUESTION, TEXTS).token_ids])
    with llm.attached():
        compiled.generate(ids, max_new_tokens=2, pad_token_id=3)
    assert llm.last_stats.hits >= len(TEXTS)  # the prefix is one, too
