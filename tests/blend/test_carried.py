"""The question goes on from where its look at the chunks ended, joined there by the rows that were selected."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import zoo
from support import blend as h

from chunkcache.blend.policy import Policy
from chunkcache.blend.query import Query

IDS = h.random_ids()
SELECTED = torch.tensor([8, 9, 20, 35, 41, 69])
STOP = 2  # the first layer that is not looked at
LAST = 3  # rows at the end that are computed anew


@pytest.fixture(autouse=True)
def few_last_rows(monkeypatch):
    """The question of these tests is short."""
    for module in ("carried", "prefill"):
        monkeypatch.setattr(f"chunkcache.blend.{module}.LAST", LAST)


models = pytest.mark.parametrize(
    ("name", "attention"), [pytest.param(*served, id="-".join(served)) for served in zoo.SERVED]
)


@dataclass(frozen=True)
class Carrying(Policy):
    """Selects fixed rows after a look at the first layers."""

    name = "carrying"
    layers: int = STOP
    nothing: bool = False

    def select(self, plan):
        raise AssertionError("asked")

    def attention_layers(self, layers):
        return range(self.layers)

    def carries(self):
        return True

    def select_by_attention(self, plan, attention):
        return SELECTED[:0] if self.nothing else SELECTED


def frozen(model):
    """The KV of the chunks in place, as `chunk_plan` has them."""
    spans = [((start, end), h.alone(model, IDS[start:end], start)) for start, end in ((0, h.PREFIX), *h.CHUNKS)]
    layers = [torch.zeros(2, layer.shape[1], h.TOKENS, layer.shape[3]) for layer in spans[0][1].layers]
    for (start, end), kv in spans:
        for layer, stored in zip(layers, kv.layers, strict=True):
            layer[:, :, start:end] = stored
    return layers


@models
def test_it_is_two_passes_of_the_model_with_the_rows_joined_between(name, attention):
    model = zoo.build(name, attention)
    decoder = h.decoder(name, attention)
    plan = h.chunk_plan(model, IDS)
    carried = h.Selective(decoder, plan, Carrying())
    fresh, rows = plan.fresh, torch.cat((plan.fresh, SELECTED)).sort().values
    below = torch.cat((SELECTED, fresh[-LAST:]))
    assert all(carried.rows_at[layer].tolist() == below.tolist() for layer in range(STOP))
    assert all(carried.rows_at[layer].tolist() == rows.tolist() for layer in range(STOP, zoo.LAYERS))

    looked, hidden = {}, []
    stop = decoder.layers[STOP]

    def take(_, args, kwargs):
        hidden.append((kwargs.get("hidden_states", args[0] if args else None))[:, fresh].clone())

    kv = frozen(model)
    handle = stop.register_forward_pre_hook(take, with_kwargs=True)
    _, first = h.own_prefill(model, IDS, cache=h.FrozenCache(kv, dict.fromkeys(range(zoo.LAYERS), fresh)))
    handle.remove()
    for layer in range(STOP):
        looked[layer] = h.layers_of(first)[layer]

    def put(_, args, kwargs):
        states = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
        states[:, fresh[:-LAST]] = hidden[0][:, :-LAST]
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": states}
        return (states, *args[1:]), kwargs

    handle = stop.register_forward_pre_hook(put, with_kwargs=True)
    kv = [looked.get(layer, stored) for layer, stored in enumerate(kv)]
    rows_at = {layer: below if layer < STOP else rows for layer in range(zoo.LAYERS)}
    logits, second = h.own_prefill(model, IDS, cache=h.FrozenCache(kv, rows_at))
    handle.remove()
    torch.testing.assert_close(carried.logits[-1], logits[-1], atol=1e-4, rtol=0)
    for layer, expected in zip(carried.layers, h.layers_of(second), strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-4, rtol=0)


@models
def test_over_right_kv_it_is_the_models_own_prefill(name, attention):
    decoder = h.decoder(name, attention)
    logits, cache = h.own_prefill(decoder.model, IDS)
    carried = h.Selective(decoder, h.right_plan(IDS, cache), Carrying())
    torch.testing.assert_close(carried.logits[-1], logits[-1], atol=1e-4, rtol=0)
    for layer, expected in zip(carried.layers, h.layers_of(cache), strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", [Carrying(nothing=True), Carrying(layers=zoo.LAYERS)], ids=["nothing", "all"])
def test_with_no_row_or_no_layer_left_the_question_is_computed_anew(policy):
    decoder = h.decoder("llama")
    plan = h.chunk_plan(decoder.model, IDS)
    carried = h.Selective(decoder, plan, policy)
    rows = plan.fresh if policy.nothing else torch.cat((plan.fresh, SELECTED)).sort().values
    assert all(at.tolist() == rows.tolist() for at in carried.rows_at.values())


def test_a_short_question_is_computed_anew(monkeypatch):
    decoder = h.decoder("llama")
    plan = h.chunk_plan(decoder.model, IDS)
    monkeypatch.setattr("chunkcache.blend.prefill.LAST", len(plan.fresh) // 2)
    carried = h.Selective(decoder, plan, Carrying())
    rows = torch.cat((plan.fresh, SELECTED)).sort().values
    assert all(at.tolist() == rows.tolist() for at in carried.rows_at.values())


def test_a_query_policy_carries_where_it_recomputes_little():
    assert Query().carries()
    assert not Query(ratio=1.0).carries()  # with every token selected it is full prefill
    assert not Query(guard=0.05).carries()


def test_it_looks_only_where_the_whole_prompt_is_seen():
    decoder = h.decoder("gemma3")
    whole = [index for index, window in enumerate(decoder._windows) if window is None]
    assert 0 < len(whole) < zoo.LAYERS
    assert decoder.seeing_all(range(zoo.LAYERS)) == whole
    other = next(index for index in range(zoo.LAYERS) if index not in whole)
    assert decoder.seeing_all([other]) == [min(whole, key=lambda index: abs(index - other))]
    assert list(h.decoder("llama").seeing_all([1])) == [1]
