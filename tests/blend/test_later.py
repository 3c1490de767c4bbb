"""What is recomputed once the first token is out: the tokens after it are decoded over better KV."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import zoo
from support import blend as h

from chunkcache.blend import SelectivePrefill
from chunkcache.blend.query import Query

IDS = h.random_ids()
EVERYTHING = Query(ratio=0.0, later=1.0)
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
    torch.manual_seed(0)
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
    prefill = wrong(name, attention, EVERYTHING)
    prefill.run()
    torch.testing.assert_close(decode(prefill), own(name, attention)[2], atol=1e-4, rtol=0)


class TestItIsDoneWhereTheCacheIs:
    """The cache is the caller's, who may do with it what transformers' own caches allow."""

    def prefilled(self, policy=EVERYTHING, name="llama"):
        prefill = wrong(name, "sdpa", policy)
        prefill.run()
        return prefill

    def test_by_a_first_pass_in_inference_mode_and_a_second_out_of_it(self):
        with torch.inference_mode():
            prefill = self.prefilled()
        prefill.cache.catch_up()
        for layer, wanted in zip(h.layers_of(prefill.cache), own("llama", "sdpa")[1], strict=True):
            torch.testing.assert_close(layer, wanted, atol=1e-4, rtol=0)

    def test_in_a_deep_copy_which_has_no_model_of_its_own(self):
        prefill = self.prefilled()
        copied = copy.deepcopy(prefill.cache)
        assert copied.later._decoder is prefill.cache.later._decoder
        copied.catch_up()
        assert prefill.cache.later.rows is None
        torch.testing.assert_close(h.layers_of(copied)[1], own("llama", "sdpa")[1][1], atol=1e-4, rtol=0)

    def test_before_copies_of_the_sequence_are_made(self):
        prefill = self.prefilled()
        prefill.cache.batch_repeat_interleave(3)
        for layer, wanted in zip(h.layers_of(prefill.cache), own("llama", "sdpa")[1], strict=True):
            assert layer.shape[0] == 6
            torch.testing.assert_close(layer[:1], wanted[:1], atol=1e-4, rtol=0)

    def test_before_it_is_cropped(self):
        prefill = self.prefilled()
        prefill.cache.crop(-20)
        assert prefill.cache.get_seq_length() == len(IDS) - 20
        for layer, wanted in zip(h.layers_of(prefill.cache), own("llama", "sdpa")[1], strict=True):
            torch.testing.assert_close(layer, wanted[:, :, :-20], atol=1e-4, rtol=0)


def test_where_the_prefill_recomputes_as_much_nothing_is_left():
    for policy in (Query(ratio=0.5, later=0.4), Query(later=0.0), Query()):
        prefill = wrong("llama", "sdpa", policy)
        prefill.run()
        assert prefill.cache.later is None


def test_the_rows_that_the_question_looks_at_most_are_recomputed():
    """By the same attention, and as many, as if they had been before the first token."""
    before = wrong("llama", "sdpa", Query(ratio=0.3))
    before.run()
    after = wrong("llama", "sdpa", Query(ratio=0.0, later=0.3))
    after.run()
    after.cache.catch_up()
    assert after.cache.later.rows.tolist() == before.cache.computed_rows[0].tolist()
    for layer, wanted in zip(h.layers_of(after.cache), h.layers_of(before.cache), strict=True):
        torch.testing.assert_close(layer, wanted, atol=1e-4, rtol=0)


def test_a_question_that_is_used_no_more_is_left_out():
    prefill = wrong("llama", "sdpa", Query(ratio=0.0, later=0.3))
    prefill.run()
    whole = wrong("llama", "sdpa", Query(ratio=0.0, later=0.3))
    whole.run()
    prefill.cache.catch_up(question=False)
    whole.cache.catch_up()
    end = prefill.cache.later._end
    rows = whole.cache.later.rows
    assert 0 < len(prefill.cache.later.rows) < len(rows)
    assert prefill.cache.later.rows.tolist() == rows[rows < end].tolist()
    for layer, wanted in zip(h.layers_of(prefill.cache), h.layers_of(whole.cache), strict=True):
        torch.testing.assert_close(layer[:, :, :end], wanted[:, :, :end])
