"""What the tests of the public face share: texts, tokenizers, a wrapped tiny model, plain generation beside it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import chunkcache
from chunkcache.models import ALIASES

VOCAB = 512  # covers every id of `tiny_tokenizer`
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
QUESTION = "In which year was the bridge opened?"
TEXTS = (
    "The bridge over the river was opened to the public in 1931, after nine years of work.",
    "In winter the ferry sails only when the sea is calm, and the bread of the day is yesterday's.",
    "The lighthouse keeper wrote down the weather every morning and every evening for forty years; "
    "nobody has read it.",
)


@cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with a chat template that trims what it is given."""
    tokenizer = copy.deepcopy(tiny_tokenizer(VOCAB))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(name: str = "llama", **options: Any) -> PreTrainedModel:
    """Return a shared tiny model whose vocabulary covers the tiny tokenizer's."""
    return zoo.build(name, vocab_size=VOCAB, **options)


def own_model(name: str = "llama", **options: Any) -> PreTrainedModel:
    """Return a tiny model that the test may change."""
    return zoo.new(name, vocab_size=VOCAB, **options)


def wrapped(model: PreTrainedModel | None = None, **options: Any) -> chunkcache.CachedLLM:
    """Wrap `model`, by default a tiny Llama, with a chat tokenizer and an empty store."""
    return chunkcache.wrap(model or tiny_model(), chat_tokenizer(), **options)


def real_model(name: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the real small model of an alias; skip the test where its package is not installed."""
    try:
        ALIASES[name].path()
    except chunkcache.ModelNotFoundError as error:
        pytest.skip(str(error))
    return chunkcache.load_model(name, device="cpu", dtype=dtype)


def saved_model(folder: Path) -> str:
    """Save a tiny Llama and its tokenizer in `folder`, and return its path as text."""
    tiny_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def prompt_ids(llm: chunkcache.CachedLLM, question: str = QUESTION, chunks: Any = TEXTS) -> Tensor:
    """Return the ids `[1, tokens]` that `llm` prefills for this request."""
    return torch.tensor([llm.prompts.build(question, chunks).token_ids])


def plain(model: PreTrainedModel, input_ids: Tensor, seed: int = 0, **options: Any) -> list[int]:
    """Return the new token ids of the model's own `generate()`, with nothing of ours in its way."""
    torch.manual_seed(seed)
    options = {"max_new_tokens": 8, "pad_token_id": 3, **options}
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    sequences = output if isinstance(output, Tensor) else output.sequences
    return sequences[0, input_ids.shape[1] :].tolist()


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Return all that a request might leave behind on a model: hooks, attributes, settings."""
    state: dict[str, Any] = {"attention": model.config.get_text_config()._attn_implementation}
    for name, module in model.named_modules():
        state[name] = (
            sorted(module.__dict__),
            [len(value) for key, value in sorted(module.__dict__.items()) if key.endswith("_hooks")],
            module.training,
        )
    state["generation"] = model.generation_config.to_dict()
    return state
