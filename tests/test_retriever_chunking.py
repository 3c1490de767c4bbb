"""Splitting: the bound and the words hold on any text; cuts and overlaps fall where they should."""

from __future__ import annotations

import pytest
from helpers_tokenizer import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chunkcache.errors import InputError
from chunkcache.retriever.chunking import split
from chunkcache.retriever.documents import Document


def document(text):
    return Document("d.md", "d", text)


def tokens(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def odd_tokenizer():
    """Marks the start of every piece, expands characters, and merges across words: counts do not add up."""
    pieces = [(chr(c), -8.0) for c in range(33, 127)] + [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("aa", -1.0),
        ("a▁a", -1.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=94, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"byte-level": tiny_tokenizer(), "odd": odd_tokenizer()}

words = st.text(st.sampled_from("ab.,!?-é漢😀ﷺ\u200d"), min_size=1, max_size=12)
spaces = st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\u3000", "\r\n"])
prose = st.lists(st.tuples(words, spaces), max_size=60).map(lambda pairs: "".join(w + s for w, s in pairs))
texts = st.one_of(prose, st.text(max_size=300))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts, size=st.integers(40, 60), overlap=st.integers(0, 4))
def test_no_chunk_is_over_the_bound_and_no_character_is_lost(name, text, size, overlap):
    tokenizer = TOKENIZERS[name]
    chunks = split(document(text), tokenizer, size=size, overlap=overlap)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        assert chunk.text in text
        assert chunk.tokens == tokens(chunk.text, tokenizer) <= size
    plain = split(document(text), tokenizer, size=size - overlap)
    assert "".join("".join(chunk.text.split()) for chunk in plain) == "".join(text.split())
    assert len(chunks) == len(plain)
    for chunk, own in zip(chunks, plain, strict=True):
        assert chunk.text.endswith(own.text)


def test_cuts_fall_between_paragraphs_then_sentences():
    paragraphs = [f"The ferry number {i} sails in the morning. It is back by night." for i in range(6)]
    size = 2 * tokens(paragraphs[0], tiny_tokenizer()) + 4
    chunks = split(document("\n\n".join(paragraphs)), tiny_tokenizer(), size=size)
    assert [chunk.text for chunk in chunks] == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4)]
    for chunk in split(document(" ".join(paragraphs)), tiny_tokenizer(), size=size):
        assert chunk.text.endswith(".")


def test_a_short_document_is_one_chunk_and_nothing_is_added():
    [chunk] = split(Document("a/b.md", "A title", "Just a line."), tiny_tokenizer())
    assert (chunk.document_id, chunk.index, chunk.text) == ("a/b.md", 0, "Just a line.")


def test_white_space_alone_has_no_chunks():
    assert split(document(" \n\t"), tiny_tokenizer()) == []
    assert split(document(""), tiny_tokenizer()) == []


@pytest.mark.parametrize("text", ["The ferry sails twice a day in spring. " * 20, "海上的渡船每天都開。" * 20])
def test_an_overlap_repeats_the_end_of_the_chunk_before(text):
    overlap = 12
    chunks = split(document(text), tiny_tokenizer(), size=60, overlap=overlap)
    plain = split(document(text), tiny_tokenizer(), size=60 - overlap)
    for before, chunk, own in zip(plain, chunks[1:], plain[1:], strict=False):
        repeated = chunk.text.removesuffix(own.text)
        assert repeated.strip()
        assert before.text.endswith(repeated.strip())
        assert tokens(repeated, tiny_tokenizer()) <= overlap


def test_a_long_text_is_counted_without_a_warning(caplog):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, model_max_length=8)
    split(document("word " * 100), tokenizer, size=64)
    assert caplog.text == ""


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (-1, 0), (8, 8), (8, 9), (8, -1)])
def test_a_size_or_overlap_out_of_range_is_refused(size, overlap):
    with pytest.raises(InputError, match=r"is not possible: give"):
        split(document("text"), tiny_tokenizer(), size=size, overlap=overlap)


def test_a_character_wider_than_the_size_is_refused():
    with pytest.raises(InputError, match=r"'😀' in 'd\.md' has 4 tokens.*larger size"):
        split(document("well 😀"), tiny_tokenizer(), size=3)
