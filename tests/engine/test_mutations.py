"""Any changes of a model in any order, over one disk store: each request is answered as the model itself would.

CHUNKCACHE_EXAMPLES sets how many orders are tried, of up to eight changes each; `pytest -s` prints how many changes
were made. Adapters are among them where peft is installed: `make test-adapters`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.changing import CHANGES, error_of, fill_lora, warm
from support.llm import own_model as tiny

from chunkcache.store import open_store

pytestmark = pytest.mark.filterwarnings("ignore")
HAS_PEFT = find_spec("peft") is not None
EXAMPLES = int(os.environ.get("CHUNKCACHE_EXAMPLES", "12"))
ADAPTERS = ("one", "two")
mutations = [0]


def to_bfloat16_and_back(model: Any) -> None:
    model.to(torch.bfloat16).float()


def unhook(model: Any) -> None:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon += 0.1
    model.model.layers[0].input_layernorm.variance_epsilon += 0.1


def attention(model: Any) -> None:
    model.set_attn_implementation("eager" if model.config._attn_implementation == "sdpa" else "sdpa")


def swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def row(model: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[50] += 1.0


OTHERS: list[Callable[[Any], None]] = [to_bfloat16_and_back, unhook, epsilon, attention, swap_layers, row]
if HAS_PEFT:
    OTHERS += [
        lambda model: model.set_adapter("one"),
        lambda model: model.set_adapter("two"),
        lambda model: model.disable_adapters(),
        lambda model: model.enable_adapters(),
        lambda model: [m.scale_layer(1.5) for m in model.modules() if hasattr(m, "scale_layer")],
        lambda model: [m.merge() for m in model.modules() if hasattr(m, "merged_adapters") and not m.merged],
        lambda model: [m.unmerge() for m in model.modules() if hasattr(m, "merged_adapters") and m.merged],
    ]


def subject() -> Any:
    model = tiny()
    if HAS_PEFT:
        from peft import LoraConfig

        for name in ADAPTERS:
            model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]), name)
    return fill_lora(model)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with open_store(f"disk://{tmp_path_factory.mktemp('shared')}?max_bytes=256MiB") as opened:
        yield opened
    print(f"{mutations[0]} changes")


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.sampled_from([*CHANGES.values(), *OTHERS, "wrap"]), min_size=1, max_size=8))
def test_no_request_is_answered_from_the_kv_of_another_function(store, steps):
    model = subject()
    llm = warm(model, store=store)
    for step in steps:
        if step == "wrap":
            llm = warm(model, store=store)
        else:
            step(model)
            mutations[0] += 1
        assert error_of(llm, model) < 1e-4
