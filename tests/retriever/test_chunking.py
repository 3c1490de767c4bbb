"""Splitting: the bound and the words hold on any text; cuts and overlaps fall where they should, and stay there."""

from __future__ import annotations

import copy
import random

import pytest
import regex
from helpers_tokenizer import tiny_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chunkcache.errors import InputError
from chunkcache.retriever.chunking import split
from chunkcache.retriever.documents import Document


def document(text):
    return Document("d.md", "d", text)


def tokens(text, tokenizer):
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


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


BLANK = regex.compile(r"\s(?!\p{GCB=Extend}|\p{GCB=SpacingMark}|\p{GCB=ZWJ})")  # what carries a mark is a character


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts, size=st.integers(40, 60), overlap=st.integers(0, 4))
@example(text="000000 " + "\u0300" * 17, size=40, overlap=0)
def test_no_chunk_is_over_the_bound_and_no_character_is_lost(name, text, size, overlap):
    tokenizer = TOKENIZERS[name]
    chunks = split(document(text), tokenizer, size=size, overlap=overlap)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.start + len(chunk.text)]
        assert chunk.tokens == tokens(chunk.text, tokenizer) <= size
    plain = split(document(text), tokenizer, size=size - overlap)
    assert "".join("".join(chunk.text.split()) for chunk in plain) == "".join(text.split())
    end = 0
    for chunk in plain:
        assert chunk.text == chunk.text.rstrip() != ""
        assert not BLANK.match(chunk.text)
        assert not text[end : chunk.start].strip()
        end = chunk.start + len(chunk.text)
    assert not text[end:].strip()
    assert len(chunks) == len(plain)
    for chunk, own in zip(chunks, plain, strict=True):
        assert chunk.text.endswith(own.text)


@given(text=prose, size=st.integers(8, 40))
def test_small_chunks_of_long_words_hold_the_bound_too(text, size):
    for chunk in split(document(text), tiny_tokenizer(), size=size):
        assert chunk.tokens == tokens(chunk.text, tiny_tokenizer()) <= size


@pytest.mark.parametrize("text", ["<pad>" * 300, "<s>user\nHow deep?</s>\n<s>assistant\n9 metres.</s>\n" * 30])
@pytest.mark.parametrize("overlap", [0, 6])
def test_special_tokens_count_as_the_text_that_they_are(text, overlap):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    before = tokenizer(text).input_ids
    for chunk in split(document(text), tokenizer, size=32, overlap=overlap):
        assert chunk.tokens == tokens(chunk.text, tiny_tokenizer()) <= 32
    assert tokenizer(text).input_ids == before  # the caller's tokenizer is as it was
    tokenizer.add_tokens(["metres."])
    for chunk in split(document(text), tokenizer, size=32, overlap=overlap):
        assert chunk.tokens == tokens(chunk.text, copy.deepcopy(tokenizer))


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


def test_an_overlap_is_whole_sentences_where_one_fits_else_whole_words():
    text = "The ferry sails twice a day in spring. It rests. " * 12
    size = tokens("The ferry sails twice a day in spring. It rests. " * 2, tiny_tokenizer())
    for overlap, allowed in ((8, {"It rests."}), (4, {"rests.", "in spring."})):
        chunks = split(document(text), tiny_tokenizer(), size=size, overlap=overlap)
        plain = split(document(text), tiny_tokenizer(), size=size - overlap)
        repeated = {c.text.removesuffix(own.text).strip() for c, own in zip(chunks[1:], plain[1:], strict=True)}
        assert repeated == allowed


def story(count=200, seed=0):
    """Sentences of 8 to 20 words; no two are the same."""
    draw = random.Random(seed)
    stock = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiou" for c in ("n", "rk", "ll", "st")]
    return [" ".join(draw.choices(stock, k=draw.randint(8, 20))).capitalize() + "." for _ in range(count)]


def ids(text):
    return [chunk.id for chunk in split(document(text), tiny_tokenizer(), size=256)]


EDITS = {
    "edit": lambda sentences, at: sentences.__setitem__(at, sentences[at].replace(" ", " not ", 1)),
    "rewrite": lambda sentences, at: sentences.__setitem__(at, "This has been written anew from the first word."),
    "insert": lambda sentences, at: sentences.insert(at, "This has been put in between two of the others."),
    "delete": lambda sentences, at: sentences.pop(at),
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("length", [200, 6], ids=["one paragraph", "paragraphs of 6"])
def test_an_edited_sentence_changes_only_the_chunks_around_it(kind, length):
    sentences = story(seed=1)

    def text(paragraphs):
        return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)

    before = [sentences[i : i + length] for i in range(0, 200, length)]
    old = ids(text(before))
    assert len(old) > 40
    changed = []
    for at in range(4, 200, 7):
        after = [list(paragraph) for paragraph in before]
        EDITS[kind](after[at // length], at % length)
        changed.append(len(set(ids(text(after))) - set(old)))
    assert sum(changed) / len(changed) <= 3
    assert max(changed) <= 10
    assert sorted(changed)[len(changed) // 2] <= 2


def test_of_200_sentences_all_chunks_but_three_survive_an_edit_in_the_middle():
    before = story(seed=1)
    old = ids(" ".join(before))
    for edit in EDITS.values():
        after = list(before)
        edit(after, 100)
        new = ids(" ".join(after))
        assert 1 <= len(set(new) - set(old)) <= 3
        assert len(set(old) - set(new)) <= 3


def test_chunks_are_filled():
    chunks = split(document(" ".join(story())), tiny_tokenizer(), size=512)
    assert sum(chunk.tokens for chunk in chunks) / len(chunks) >= 0.8 * 512
    assert min(chunk.tokens for chunk in chunks[:-1]) >= 0.2 * 512


def test_an_id_is_of_the_document_and_the_text_alone():
    text = " ".join(story(40))
    [first, second, *_] = split(document(text), tiny_tokenizer(), size=512)
    assert first.id != second.id
    assert split(Document("other", "", text), tiny_tokenizer(), size=512)[0].id != first.id
    assert split(Document("d.md", "a title", first.text), tiny_tokenizer(), size=512)[0].id == first.id
    assert split(document(f"\n  {first.text} "), tiny_tokenizer(), size=512)[0].id == first.id
    assert first.id == "d03c40629c4875a700f51d2725d2639d"  # what is stored under it would be lost if it changed


def test_the_same_text_twice_has_two_ids():
    line = "The ferry sails."
    size = tokens(line, tiny_tokenizer())
    chunks = split(document(f"{line}\n\n" * 3), tiny_tokenizer(), size=size)
    assert [chunk.text for chunk in chunks] == [line] * 3
    assert [chunk.id for chunk in chunks] == [chunks[0].id, f"{chunks[0].id}-2", f"{chunks[0].id}-3"]


def test_a_heading_stays_with_the_text_below_it():
    sections = [f"## Part {i}\n\n{' '.join(story(5, seed=i))}" for i in range(12)]
    for size in (200, 350, 512):
        chunks = split(document("\n\n".join(sections)), tiny_tokenizer(), size=size)
        assert len(chunks) > 6
        for chunk in chunks:
            assert not chunk.text.splitlines()[-1].startswith("##")
        assert any(chunk.text.startswith("## ") for chunk in chunks[1:])


def test_abbreviations_do_not_end_sentences_and_other_scripts_do():
    text = "Dr. Finch paid Mrs. Oakshade 3.50 crowns on Jan. 9 at St. Ives. " * 30
    for chunk in split(document(text), tiny_tokenizer(), size=150):
        assert chunk.text.startswith("Dr.")
        assert chunk.text.endswith("Ives.")
    for chunk in split(document("海上的渡船每天都開。今天很好！" * 400), tiny_tokenizer(), size=150):
        assert chunk.text[-1] in "。！"


def test_a_sentence_longer_than_a_chunk_is_cut_at_clauses_then_words():
    clauses = ", ".join(" ".join(sentence[:-1].split()) for sentence in story(20))
    for chunk in split(document(clauses), tiny_tokenizer(), size=300)[:-1]:
        assert chunk.text.endswith(",")
    words = clauses.replace(",", "")
    assert {w for chunk in split(document(words), tiny_tokenizer(), size=300) for w in chunk.text.split()} == set(
        words.split()
    )


@pytest.mark.parametrize(
    "text",
    [
        "a\n\n" * 5000,
        "word " * 20000,
        "海上。" * 5000,
        "x1" * 20000,
        '"a. b" ' * 5000,
        "1. a\n" * 10000,
        "# a\n" * 5000,
    ],
)
def test_odd_long_texts_are_cut_within_the_bound(text):
    chunks = split(document(text), tiny_tokenizer(), size=300)
    assert "".join("".join(chunk.text.split()) for chunk in chunks) == "".join(text.split())
    assert max(chunk.tokens for chunk in chunks) <= 300


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
