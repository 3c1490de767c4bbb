"""What is recomputed once the first token is out: the tokens after it are decoded over better KV."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import zoo
from support import blend as h

from chunkcache.blend import SelectivePrefill
from chunkcache.blend.query import Query

IDS = h.random_ids()
NEXT = torch.tensor([[17]])

models = pytest.mark.parametrize(
    ("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED]
)


@cache
def own(name, attention):
    """The model's own prefill, and logits of the token behind it."""
    model = zoo.build(name, attention)
    logits, prefilled = h.own_prefill(model, IDS)
    layers = h.layers_of(prefilled)
    with torch.no_grad():
        following = model(
            input_ids=NEXT, position_ids=torch.tensor([[len(IDS)]]), past_key_values=prefilled, use_cache=True
        )
    return logits, layers, following.logits[0, -1]


def wrong(name, attention, policy, **options):
    prefilled = h.own_prefill(zoo.build(name, attention), IDS)[1]
    return SelectivePrefill(h.decoder(name, attention), h.wrong_plan(IDS, prefilled), policy, **options)


def decode(prefill, token=NEXT):
    with torch.no_grad():
        return prefill.model(input_ids=token, past_key_values=prefill.cache, use_cache=True).logits[0, -1]


@models
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_with_every_token_left_for_later_wrong_kv_are_gone_once_the_first_token_is_out(name, attention, ratio):
    logits, layers, _ = own(name, attention)
    prefill = wrong(name, attention, Query(ratio=ratio, later=1.0), trim=False)
    first = prefill.run()
    assert (first - logits[-1]).abs().amax() > 1e-3
    prefill.cache.catch_up()
    for layer, wanted in zip(h.layers_of(prefill.cache, 0, len(IDS)), layers, strict=True):
        torch.testing.assert_close(layer, wanted, atol=1e-4, rtol=0)


@models
def test_trimmed_windows_are_those_of_the_repaired_kv(name, attention):
    prefill = wrong(name, attention, Query(ratio=0.0, later=1.0))
    prefill.run()
    torch.testing.assert_close(decode(prefill), own(name, attention)[2], atol=1e-4, rtol=0)
