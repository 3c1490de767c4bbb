"""What the tests of a model that changes share: a store that is warm, the error of a prefill, ways to change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from helpers_tokenizer import tiny_tokenizer
from support.llm import QUESTION, TEXTS, VOCAB

import chunkcache

OPTIONS: dict[str, Any] = {"do_sample": False, "pad_token_id": 3, "eos_token_id": None}


def tokenizer():
    """Return a tokenizer without a chat template."""
    return copy.deepcopy(tiny_tokenizer(VOCAB))


def warm(model: Any, **options: Any) -> chunkcache.CachedLLM:
    """Wrap a model under an exact policy, and let the store have what a request needs."""
    llm = chunkcache.wrap(model, tokenizer(), **{"policy": "prefix", **options})
    llm.precompute(TEXTS)
    llm.prefill(QUESTION, TEXTS)
    return llm


def error_of(llm: chunkcache.CachedLLM, model: Any) -> float:
    """Return the relative error of a prefill's logits against the model's own."""
    done = llm.prefill(QUESTION, TEXTS)
    with torch.no_grad():
        own = model(input_ids=done.input_ids).logits[0, -1].float()
    return float((done.logits.float() - own).norm() / own.norm())


def fill_lora(model: Any) -> Any:
    """Give adapters weights that show, the same each time; return the model in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1.5)


def by_data(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def one_row_by_data(model: Any) -> None:
    model.model.embed_tokens.weight.data[40:80] += 0.5


def replaced(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight.detach() * 2)


def loaded(model: Any) -> None:
    model.load_state_dict({name: weight * 1.3 for name, weight in model.state_dict().items()})


def rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def scaling(model: Any) -> None:
    model.model.layers[2].self_attn.scaling *= 2


def hooked(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, given, out: out * 1.2)


def pre_hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, given: (given[0] * 1.2,))


def two_at_once(model: Any) -> None:
    """One write that torch counts, and one that it does not."""
    one_row_by_data(model)
    in_place(model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    change.__name__: change
    for change in (
        in_place,
        by_data,
        one_row_by_data,
        replaced,
        loaded,
        rope,
        scaling,
        hooked,
        pre_hooked,
        two_at_once,
    )
}
