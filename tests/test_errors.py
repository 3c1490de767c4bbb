"""The error tree is what its docstring draws, and every message names the value and the way out."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import zoo
from helpers_tokenizer import tiny_tokenizer
from support.llm import CHAT_TEMPLATE, QUESTION, TEXTS, chat_tokenizer, own_model, tiny_model, wrapped

import chunkcache
from chunkcache import errors
from chunkcache.errors import (
    ChunkCacheError,
    ContextLengthError,
    InputError,
    PolicyError,
    PromptError,
    StoreURLError,
    TokenizerMismatchError,
    UnsupportedModelError,
)

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
LONG = " ".join(TEXTS) * 6  # 540 tokens where the tiny models' context is 512


def drawn_parents() -> dict[str, str | None]:
    """Return each error of the docstring's tree with the one it hangs on."""
    parents: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"[\s│├└─]*(\w+Error)\b", line)
        if found:
            depth = found.start(1)
            path = [(column, name) for column, name in path if column < depth]
            parents[found[1]] = path[-1][1] if path else None
            path.append((depth, found[1]))
    return parents


def test_the_tree_is_drawn_as_it_is():
    actual = {
        name: next((base.__name__ for base in cls.__bases__ if base.__name__ in CLASSES), None)
        for name, cls in CLASSES.items()
    }
    assert drawn_parents() == actual


def test_one_base_catches_all():
    assert all(issubclass(cls, ChunkCacheError) for cls in CLASSES.values())


def test_input_errors_are_value_errors():
    assert issubclass(InputError, ValueError)
    assert not issubclass(UnsupportedModelError, ValueError)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_says_when_it_is_raised(name):
    assert CLASSES[name].__doc__


MISUSES = {
    "empty question": (PromptError, ["''", "pass"], lambda llm: llm.generate("", TEXTS)),
    "blank question": (PromptError, [r"' \n'", "pass"], lambda llm: llm.prefill(" \n", TEXTS)),
    "several questions": (PromptError, ["list", "call again"], lambda llm: llm.generate(["a", "b"], TEXTS)),
    "no question": (PromptError, ["NoneType", "pass one string"], lambda llm: llm.prepare_inputs(None, TEXTS)),
    "empty chunk": (
        PromptError,
        ["a chunk is empty", "text in it"],
        lambda llm: llm.generate(QUESTION, [TEXTS[0], ""]),
    ),
    "chunk is bytes": (PromptError, ["a chunk is a bytes", "a string"], lambda llm: llm.precompute([b"x"])),
    "long chunk": (ContextLengthError, ["512", "smaller chunks"], lambda llm: llm.precompute([LONG])),
    "long prompt": (ContextLengthError, ["512", "fewer or shorter"], lambda llm: llm.generate(QUESTION, [LONG])),
    "long prompt to prefill": (ContextLengthError, ["512"], lambda llm: llm.prefill(QUESTION, TEXTS * 6)),
    "long answer": (
        ContextLengthError,
        ["500", "512", "lower max_new_tokens"],
        lambda llm: llm.generate(QUESTION, TEXTS, max_new_tokens=500),
    ),
    "unknown policy": (
        PolicyError,
        ["'magic'", "link", "cacheblend"],
        lambda llm: llm.generate(QUESTION, TEXTS, policy="magic"),
    ),
    "unknown option": (PolicyError, ["'n'", "k=8"], lambda llm: llm.prefill(QUESTION, TEXTS, policy="link:n=3")),
    "value out of range": (
        PolicyError,
        ["1.5", "between 0 and 1"],
        lambda llm: llm.prepare_inputs(QUESTION, TEXTS, policy="cacheblend:ratio=1.5"),
    ),
    "several answers": (
        InputError,
        ["num_return_sequences=2", "once for each"],
        lambda llm: llm.generate(QUESTION, num_return_sequences=2),
    ),
    "own cache": (
        InputError,
        ["past_key_values", "llm.prepare_inputs"],
        lambda llm: llm.generate(QUESTION, past_key_values=None),
    ),
    "own ids": (InputError, ["input_ids", "llm.prepare_inputs"], lambda llm: llm.stream(QUESTION, input_ids=[[1]])),
    "no cache": (
        InputError,
        ["use_cache=False", "leave it out"],
        lambda llm: llm.generate(QUESTION, use_cache=False),
    ),
    "chunked prefill": (
        InputError,
        ["prefill_chunk_size", "leave it out"],
        lambda llm: llm.generate(QUESTION, prefill_chunk_size=7),
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_named_with_the_way_out(misuse):
    error, phrases, call = MISUSES[misuse]
    with pytest.raises(error) as caught:
        call(wrapped())
    for phrase in phrases:
        assert phrase in str(caught.value)


@pytest.mark.parametrize("config", [{"num_return_sequences": 2, "do_sample": True}, {"prefill_chunk_size": 7}])
def test_a_generation_config_is_checked_like_keywords(config):
    generation_config = copy.deepcopy(tiny_model().generation_config)
    generation_config.update(**config)
    with pytest.raises(InputError, match=next(iter(config))):
        wrapped().generate(QUESTION, TEXTS, generation_config=generation_config)


def test_one_string_as_chunks_is_refused():
    with pytest.raises(PromptError, match="chunks"):
        wrapped().generate(QUESTION, chunks="abc", max_new_tokens=1)


def test_one_string_as_texts_is_refused():
    with pytest.raises(PromptError, match="texts"):
        wrapped().precompute("abc")


def test_a_template_without_a_system_role_is_named():
    tokenizer = copy.deepcopy(chat_tokenizer())
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + CHAT_TEMPLATE
    )
    with pytest.raises(PromptError, match="System role not supported"):
        chunkcache.wrap(tiny_model(), tokenizer).generate(QUESTION, TEXTS, system="Be brief.")


@pytest.mark.parametrize(
    ("store", "phrases"),
    [
        ("floppy://a", ["'floppy://a'", "memory://"]),
        ("memory://?size=1GiB", ["'size'", "max_bytes"]),
        ("memory://?max_bytes=lots", ["'lots'", "2GiB"]),
    ],
)
def test_unknown_store_is_named(store, phrases):
    with pytest.raises(StoreURLError) as caught:
        wrapped(store=store)
    assert all(phrase in str(caught.value) for phrase in phrases)


def test_foreign_tokenizer_is_named():
    with pytest.raises(TokenizerMismatchError, match=r"ids up to \d+, the model embeds only 300: load the tokenizer"):
        chunkcache.wrap(zoo.build("llama", vocab_size=300), tiny_tokenizer(512))


def test_meta_device_is_named():
    with pytest.raises(InputError, match=r"offloaded, or not loaded .*meta device"):
        wrapped(own_model().to("meta"))


def test_training_mode_is_named():
    with pytest.raises(InputError, match=r"training mode.*model\.eval\(\)"):
        wrapped(own_model().train())


def test_a_refused_model_is_left_as_it_was():
    model = own_model().train()
    with pytest.raises(InputError):
        wrapped(model)
    assert model.training
    assert "generate" not in model.__dict__
