"""A shadow computes what its model computes, with its weights, and what is done to it stays with it."""

from __future__ import annotations

import functools
import gc
import weakref
from types import MethodType

import pytest
import torch
import zoo
from accelerate.hooks import ModelHook, add_hook_to_module
from support import blend as h

from chunkcache.blend.shadow import shadow_of

IDS = h.random_ids(30)
ATTENTION = "model.layers.1.self_attn"


@pytest.fixture
def model():
    return zoo.new("llama")


@pytest.fixture
def shadow(model):
    return shadow_of(model, [ATTENTION], None)


def logits(model):
    return h.own_prefill(model, IDS)[0]


def assert_same(value, expected):
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


def test_it_computes_the_same(model, shadow):
    assert_same(logits(shadow), logits(model))


def test_it_shares_every_weight_and_buffer(model, shadow):
    for own, theirs in (
        (shadow.named_parameters, model.named_parameters),
        (shadow.named_buffers, model.named_buffers),
    ):
        own, theirs = dict(own()), dict(theirs())
        assert own.keys() == theirs.keys()
        assert all(own[name] is theirs[name] for name in own)


def test_only_modules_on_the_way_are_copies(model, shadow):
    theirs = dict(model.named_modules())
    copies = {name for name, module in shadow.named_modules() if module is not theirs[name]}
    assert copies == {"", "model", "model.layers", "model.layers.1", ATTENTION}


def test_it_generates_the_same(model, shadow):
    options = {"max_new_tokens": 5, "attention_mask": torch.ones(1, 30, dtype=torch.int64)}
    ids = torch.tensor([IDS])
    assert torch.equal(shadow.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("name", ["", "model", "model.layers.1", ATTENTION])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_its_hooks_do_not_run_on_the_model(model, shadow, name, register):
    seen = []
    getattr(shadow.get_submodule(name), register)(lambda *_: seen.append(name))
    logits(model)
    assert seen == []
    logits(shadow)
    assert seen == [name]


def test_hooks_that_the_model_has_run_on_it_and_can_be_removed_from_it_alone(model):
    seen = []
    module = model.get_submodule(ATTENTION)
    module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    shadow = shadow_of(model, [ATTENTION], None)
    logits(shadow)
    assert seen == [1]
    shadow.get_submodule(ATTENTION)._forward_pre_hooks.clear()
    logits(shadow)
    assert seen == [1]
    logits(model)
    assert seen == [1, 1]


def test_its_config_is_its_own(model):
    shadow = shadow_of(model, [ATTENTION], "eager")
    assert shadow.config._attn_implementation == "eager"
    assert shadow.get_submodule(ATTENTION).config is shadow.config is shadow.model.config
    assert model.config._attn_implementation == model.get_submodule(ATTENTION).config._attn_implementation == "sdpa"
    assert_same(logits(shadow), logits(model))


def test_a_shadow_of_a_shadow(model, shadow):
    assert_same(logits(shadow_of(shadow, [ATTENTION], None)), logits(model))


def test_a_forward_replaced_by_accelerate_runs_on_the_shadows_own_modules(model):
    seen = []

    class Noting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    layer = model.get_submodule("model.layers.1")
    add_hook_to_module(layer, Noting())
    shadow = shadow_of(model, [ATTENTION], None)
    inside = []
    shadow.get_submodule(ATTENTION).register_forward_hook(lambda *_: inside.append(1))
    logits(shadow)
    assert seen == [shadow.get_submodule("model.layers.1")]
    assert inside == [1]
    logits(model)
    assert seen[1] is layer
    assert inside == [1]


@pytest.mark.parametrize("bind", [lambda f, module: MethodType(f, module), functools.partial])
def test_a_forward_bound_by_hand_runs_on_the_shadows_own_modules(model, bind):
    seen = []
    layer = model.get_submodule("model.layers.1")

    def forward(self, *args, **kwargs):
        seen.append(self)
        return type(self).forward(self, *args, **kwargs)

    layer.forward = bind(forward, layer)
    shadow = shadow_of(model, [ATTENTION], None)
    logits(shadow)
    assert seen == [shadow.get_submodule("model.layers.1")]


def test_it_is_freed_without_garbage_collection(model):
    gc.collect()
    gc.disable()
    try:
        shadow = weakref.ref(shadow_of(model, [ATTENTION], None))
        assert shadow() is None
    finally:
        gc.enable()
