"""Prompts read as the chat template renders the same messages, token by token, whatever its shape."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from support.llm import QUESTION, TEXTS
from support.prompts import HOSTILE, KINDS, body, folded, marking, rendered, tokenizer_of
from support.templates import TEMPLATES

import chunkcache
from chunkcache.library.registry import ChunkRegistry
from chunkcache.prompt import PromptBuilder
from chunkcache.prompt.messages import MessageBuilder, PromptChunk, Turn

texts = st.text("abc deE.,!?\n12é世 ", min_size=1, max_size=24).filter(str.strip).map(str.strip)
histories = st.tuples(st.none() | texts, st.lists(st.tuples(texts, texts), max_size=2), texts)


def messages_of(history: Any) -> list[dict[str, str]]:
    system, turns, last = history
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": last}]


def test_there_are_enough_shapes():
    assert len(TEMPLATES) >= 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=12)
@given(history=histories)
def test_a_chat_has_the_ids_of_the_template(kind, name, history):
    template, messages = TEMPLATES[name], messages_of(history)
    tokenizer = tokenizer_of(kind, template)
    prompt = MessageBuilder(PromptBuilder(tokenizer), ChunkRegistry()).build(messages)
    assert list(prompt.token_ids) == rendered(tokenizer, folded(template, messages))[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_question_over_chunks_reads_as_the_template(kind, name, system):
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    prompts = PromptBuilder(tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    asked = {"role": "user", "content": [*map(PromptChunk, TEXTS), QUESTION]}
    prompt = MessageBuilder(prompts, ChunkRegistry()).build([*messages, asked])
    whole = folded(template, [*messages, {"role": "user", "content": body(QUESTION, TEXTS)}])
    _, ids = rendered(tokenizer, whole)
    assert tokenizer.decode(prompt.token_ids) == tokenizer.decode(ids)
    assert prompt.chunks == tuple(map(prompts.chunk, TEXTS))
    if "no system role" not in template or not system:
        assert prompts.build(QUESTION, TEXTS, system).token_ids == prompt.token_ids
        assert prompts.prefix(system) == prompt.prefix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_from_outside_adds_no_special_token(kind, name):
    tokenizer = tokenizer_of(kind, TEMPLATES[name])
    build = MessageBuilder(PromptBuilder(tokenizer), ChunkRegistry()).build
    special = marking(tokenizer)

    def count(text: str, question: str) -> int:
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": [PromptChunk(text), question]},
        ]
        return sum(token in special for token in build(messages).token_ids)

    assert count(HOSTILE, HOSTILE) == count("It ends.", "Why?")


@pytest.mark.parametrize("swallows", [False, True], ids=["", "tags that swallow the space behind them"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_from_outside_leaves_what_stands_round_it_as_it_is(kind, name, swallows):
    tokenizer = tokenizer_of(kind, TEMPLATES[name], rstrip=swallows)
    build = MessageBuilder(PromptBuilder(tokenizer), ChunkRegistry()).build

    def said(text: str) -> str:
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Why?"},
        ]
        return tokenizer.decode(build(messages).token_ids)

    assert said(HOSTILE) == said("QQ").replace("QQ", HOSTILE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_reads_as_the_template_renders_it_then(kind, name):
    """An answer is the text that its own tokens are behind the prompt, a space at its beginning included.

    Behind a special token some of these tokenizers put a space of their own, which an answer need not have.
    """
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    prompts = PromptBuilder(tokenizer)
    build = MessageBuilder(prompts, ChunkRegistry()).of_turns
    answers = _answers(tokenizer)
    turns, messages = [Turn("system", "Be brief.")], [{"role": "system", "content": "Be brief."}]
    for question, chunks in ((QUESTION, TEXTS[:2]), ("And the ferry?", TEXTS[1:]), ("Why?", ())):
        turns.append(Turn("user", question, tuple(chunks), framed=True))
        messages.append({"role": "user", "content": body(question, chunks)})
        _, ids = rendered(tokenizer, folded(template, messages))
        said = build(turns).token_ids
        assert close(tokenizer.decode(said)) == close(tokenizer.decode(ids))
        spoken = next(answers, ())
        text = prompts.text_of(spoken)
        assert tokenizer.decode([*said, *spoken]) == tokenizer.decode(said) + str(text)
        turns.append(Turn("assistant", text, token_ids=spoken))
        messages.append({"role": "assistant", "content": text})


def close(text: str) -> str:
    return re.sub(r"(?<=[]>]) +", "", text)


def _answers(tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """Yield answers as a model gives them: as they stand behind a text, with a space at the beginning or without."""
    behind = len(tokenizer("It was", add_special_tokens=False).input_ids)
    yield tuple(tokenizer("It was opened in 1931.", add_special_tokens=False).input_ids[behind:])
    yield tuple(tokenizer("It was twice a day", add_special_tokens=False).input_ids[behind:])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_of_a_model_reads_as_the_template_renders_it_then(name):
    template = TEMPLATES[name]
    tokenizer = tokenizer_of("byte level", template)
    model = zoo.new("llama", vocab_size=len(tokenizer) + 8, max_position_embeddings=2048)
    llm = chunkcache.wrap(model, copy.deepcopy(tokenizer), policy="full", store="memory://")
    conversation = llm.conversation("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question, chunks in ((QUESTION, TEXTS[:2]), ("And the ferry?", TEXTS[1:]), ("Why?", ())):
        messages.append({"role": "user", "content": body(question, chunks)})
        ids = conversation.prefill(question, chunks).input_ids[0].tolist()
        assert tokenizer.decode(ids) == rendered(tokenizer, folded(template, messages))[0]
        plain = {
            "max_new_tokens": 4,
            "do_sample": False,
            "suppress_tokens": [0, 1, 2, 3, *range(500, len(tokenizer) + 8)],
        }
        answer = conversation.generate(question, chunks, **plain)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer.token_ids)})
