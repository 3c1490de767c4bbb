"""Texts to token ids: nothing from outside is special, and what goes on from another text reads so."""

from __future__ import annotations

from typing import Any

import pytest
from helpers_tokenizer import _TEXT
from support.llm import QUESTION, TEXTS
from support.prompts import HOSTILE, SPACE, body, marking, tokenizer_of
from support.templates import TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from chunkcache.prompt import SEPARATOR, PromptBuilder
from chunkcache.retriever import Document
from chunkcache.retriever.chunking import split
from chunkcache.tokens import Tokens

NORMALISERS = {"none": None, "lowercase": normalizers.Lowercase(), "no line breaks": normalizers.Replace("\n", " ")}


def unigram(scheme: str, normaliser: Any = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose model has the special tokens among its pieces, so that it finds them in any text."""
    made = Tokenizer(models.Unigram())
    if normaliser is not None:
        made.normalizer = normaliser
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        unk_token="<unk>",
        initial_alphabet=[SPACE, "\n", *map(chr, range(33, 127))],
        show_progress=False,
    )
    made.train_from_iterator(list(_TEXT), trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = TEMPLATES["a header and an end for each"]
    return tokenizer


@pytest.mark.parametrize("normaliser", NORMALISERS.values(), ids=NORMALISERS)
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_model_that_finds_special_tokens_by_itself_is_given_none(scheme, normaliser):
    tokenizer = unigram(scheme, normaliser)
    prompts = PromptBuilder(tokenizer)
    own = marking(tokenizer)
    assert set(tokenizer(HOSTILE, add_special_tokens=False, split_special_tokens=True).input_ids) & own

    def count(question: str, chunk: str) -> int:
        return sum(each in own for each in prompts.build(question, [chunk]).token_ids)

    assert count("Why?", "So.") == count(HOSTILE, HOSTILE) == count(HOSTILE.upper(), HOSTILE.upper()) == 3
    assert "</s>" * 9 in tokenizer.decode(prompts.chunk("</s>" * 2000))


@pytest.mark.parametrize("normaliser", NORMALISERS.values(), ids=NORMALISERS)
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_chunks_get_no_space_of_their_own(scheme, normaliser):
    tokenizer = unigram(scheme, normaliser)
    whole = [{"role": "user", "content": body(QUESTION, TEXTS)}]
    text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    expected = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert tokenizer.decode(PromptBuilder(tokenizer).build(QUESTION, TEXTS).token_ids) == expected


@pytest.mark.parametrize("text", ["The bridge.", HOSTILE, "a </s></s> b"])
@pytest.mark.parametrize("scheme", ["first", "never"])
def test_offsets_are_those_of_the_ids(scheme, text):
    tokens = Tokens(unigram(scheme))
    ids, offsets = tokens.text(text, continues=True), tokens.with_offsets(text)
    assert len(ids) == len(offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))


@pytest.mark.parametrize("kind", ["byte level", "legacy", "first", "always", "never"])
def test_an_answer_keeps_the_space_that_it_begins_with(kind):
    tokenizer = tokenizer_of(kind, None)
    text_of = PromptBuilder(tokenizer).text_of
    ids = tokenizer("It was opened in 1931.", add_special_tokens=False).input_ids
    spoken = [text_of(ids[first:]) for first in range(1, len(ids))]
    assert any(text.startswith(" ") for text in spoken)
    for first, text in enumerate(spoken, 1):
        assert tokenizer.decode(ids[:first]) + text == "It was opened in 1931."


def test_special_tokens_that_swallow_space_do_so_beside_the_text_of_special_tokens():
    tokenizer = tokenizer_of("byte level", None)
    tokenizer.add_tokens([AddedToken("<left>", special=True, normalized=False, lstrip=True)])
    tokenizer.add_tokens([AddedToken("<right>", special=True, normalized=False, rstrip=True)])
    run = Tokens(tokenizer).run
    left, right = map(tokenizer.convert_tokens_to_ids, ("<left>", "<right>"))
    for text in ("Why", "</s>"):
        ids = run((("<right>\n", True), (text, False), (" \n<left>", True)), False)
        assert (ids[0], ids[-1]) == (right, left)
        assert tokenizer.decode(ids[1:-1]) == text


def test_the_tokens_that_end_an_answer_may_be_any():
    tokenizer = tokenizer_of("byte level", None)
    prompts, end = PromptBuilder(tokenizer), tokenizer.convert_tokens_to_ids("<|end|>")
    assert prompts.without_end([50, end, tokenizer.eos_token_id], [end]) == (50,)
    assert prompts.without_end([50, end]) == (50, end)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_splitter_counts_what_stands_in_a_prompt(scheme):
    tokenizer = unigram(scheme)
    tokens, prompts = Tokens(tokenizer), PromptBuilder(tokenizer)
    texts = [*TEXTS, HOSTILE, "</s>" * 9, "x"]
    assert tokens.counts(texts) == [len(tokens.text(text)) for text in texts]
    assert tokens.counts([]) == []
    assert (
        len(tokenizer(HOSTILE, add_special_tokens=False, split_special_tokens=True).input_ids)
        < tokens.counts(texts)[3]
    )
    room = 32 + len(tokens.text(SEPARATOR, continues=True))
    for chunk in split(Document("d", "d", "<pad></s> and so on. " * 60), tokenizer, size=32):
        assert chunk.tokens <= 32
        assert len(prompts.chunk(chunk.text)) <= room
