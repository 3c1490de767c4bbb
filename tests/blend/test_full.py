"""Where nothing is reused, the prefill is the model's own forward, bit for bit."""

from __future__ import annotations

import pytest
import torch
import zoo
from support import blend as h
from transformers import DynamicCache

from chunkcache.blend import Full, Link, Plan, Prefix, Query, SelectivePrefill

IDS = h.random_ids(40)


@torch.no_grad()
def plain(model, cache):
    return model(torch.tensor([IDS]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


@pytest.mark.parametrize(("name", "attention"), [(name, zoo.FAMILIES[name].attentions[0]) for name in zoo.FAMILIES])
def test_full_is_the_model_alone(name, attention):
    decoder = h.decoder(name, attention)
    own = DynamicCache(config=decoder.config)
    wanted = plain(decoder.model, own)
    prefill = SelectivePrefill(decoder, Plan(IDS), Full())
    assert torch.equal(prefill.run(), wanted)
    for mine, theirs in zip(prefill.cache.layers, own.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    assert prefill.cache.get_seq_length() == len(IDS)
    assert prefill.cache.computed == len(IDS) * zoo.LAYERS
    assert prefill.recompute_s > 0


@pytest.mark.parametrize("policy", [Full(), Link(k=2), Query(), Prefix()])
def test_no_row_mask_and_no_position_is_made(policy, monkeypatch):
    decoder = h.decoder("llama")
    prefill = SelectivePrefill(decoder, Plan(IDS), policy)
    monkeypatch.setattr(type(decoder), "masks", lambda *_: pytest.fail("a mask was made"))
    assert torch.equal(prefill.run(), plain(decoder.model, DynamicCache()))


@pytest.mark.parametrize("options", [{"keep": lambda span: True}, {"trim": False}])
def test_what_a_window_would_forget_is_there_where_it_is_wanted(options):
    decoder = h.decoder("mistral-sliding")
    prefill = SelectivePrefill(decoder, Plan(IDS, (h.Span(2, 30, IDS[2:30], 0, None),)), Full(), **options)
    prefill.run()
    if "keep" in options:
        _, own = h.own_prefill(decoder.model, IDS)
        for kept, wanted in zip(prefill.computed[2].layers, h.layers_of(own, 2, 30), strict=True):
            torch.testing.assert_close(kept, wanted, atol=1e-5, rtol=1e-4)
    else:
        assert prefill.cache.layers[0].keys.shape[2] == len(IDS)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_the_last_token_can_be_left_out(name):
    decoder = h.decoder(name)
    prefill = SelectivePrefill(decoder, Plan(IDS), Full())
    wanted = prefill.run(drop_last=True)
    with torch.no_grad():
        again = decoder.model(torch.tensor([IDS[-1:]]), past_key_values=prefill.cache).logits[0, -1]
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=0)
