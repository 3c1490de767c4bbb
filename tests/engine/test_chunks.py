"""What works ahead of requests: documents as they come, keys, updates that are refused, one verb to delete."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from support.llm import QUESTION, TEXTS, wrapped

from chunkcache.errors import ContextLengthError, InputError, PromptError
from chunkcache.kv import hashed_label
from chunkcache.store import EntryFilter

LONG = "a word " * 600  # more than the context of the tiny model


@dataclass
class Document:
    """As LangChain's."""

    page_content: str
    id: str | None = None


def entries_of(llm, document: str) -> int:
    return len(list(llm.store.entries(EntryFilter(document=hashed_label("document", document)))))


def test_documents_are_taken_as_they_come():
    llm = wrapped()
    documents = [Document(TEXTS[0], "a.md"), SimpleNamespace(text=TEXTS[1], id="a.md"), Document(TEXTS[2])]
    assert llm.precompute(documents).computed == 3
    assert entries_of(llm, "a.md") == 2
    assert llm.precompute(TEXTS).computed == 0
    expected = llm.generate(QUESTION, TEXTS, max_new_tokens=4).token_ids
    assert llm.generate(QUESTION, documents, max_new_tokens=4).token_ids == expected
    assert llm.prefetch([Document("Not stored yet, and long enough."), documents[0]]) == [
        Document("Not stored yet, and long enough.")
    ]


def test_a_named_document_goes_before_its_own_id():
    llm = wrapped()
    llm.precompute([Document(TEXTS[0], "own")], documents=["given"])
    assert (entries_of(llm, "own"), entries_of(llm, "given")) == (0, 1)


@pytest.mark.parametrize("wrong", [3, None, SimpleNamespace(page_content=7), b"bytes"])
def test_what_has_no_text_is_named(wrong):
    with pytest.raises(PromptError, match=f"a chunk is a {type(wrong).__name__}"):
        wrapped().precompute([wrong])


def test_registered_chunks_have_the_keys_that_they_are_stored_under():
    llm = wrapped()
    keys = llm.register(TEXTS)
    assert keys == llm.keys(TEXTS)
    assert not any(key in llm.store for key in keys)
    llm.precompute(TEXTS)
    assert all(key in llm.store for key in keys)


@pytest.mark.parametrize(
    ("texts", "error"),
    [("Hello", PromptError), ("Hello there", PromptError), (["new", ""], PromptError), (["new", 3], PromptError)],
)
@pytest.mark.parametrize("compute", [True, False])
def test_a_refused_update_deletes_nothing(texts, error, compute):
    llm = wrapped()
    llm.precompute(TEXTS, documents=["d"] * 3)
    with pytest.raises(error):
        llm.update_document("d", texts, compute=compute)
    assert entries_of(llm, "d") == 3
    assert llm.generate(QUESTION, TEXTS, max_new_tokens=1).stats.misses == 0


def test_what_is_stale_goes_though_the_new_cannot_be_computed():
    llm = wrapped()
    llm.precompute(TEXTS, documents=["d"] * 3)
    assert llm.update_document("d", [TEXTS[0], LONG]).skipped == 1
    assert entries_of(llm, "d") == 1
    with pytest.raises(ContextLengthError):
        llm.update_document("d", [LONG])
    assert entries_of(llm, "d") == 0


def test_texts_that_are_too_long_are_left_out_counted_and_said_once(caplog):
    llm, other = wrapped(), LONG + "again"
    done = llm.precompute([LONG, TEXTS[0], other, TEXTS[1], LONG], documents=["d"] * 5)
    assert (done.chunks, done.computed, done.skipped) == (4, 2, 2)
    [said] = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "2 of 4 chunks" in said
    assert "a word" not in said
    assert entries_of(llm, "d") == 2
    again = llm.precompute([LONG, *TEXTS[:2]])
    assert (again.computed, again.skipped) == (0, 1)
    assert llm.generate(QUESTION, TEXTS[:2], max_new_tokens=1).stats.misses == 0


def test_one_text_that_is_too_long_is_refused_as_is_a_request_over_it():
    llm = wrapped()
    with pytest.raises(ContextLengthError, match="smaller chunks"):
        llm.precompute([LONG])
    with pytest.raises(ContextLengthError):
        llm.generate(QUESTION, [TEXTS[0], LONG], max_new_tokens=1)


@pytest.mark.parametrize("named", [{}, {"document": "d", "texts": TEXTS}, {"texts": TEXTS, "tenant": True}])
def test_what_to_delete_must_be_named_in_one_way(named):
    llm = wrapped()
    llm.precompute(TEXTS, documents=["d"] * 3)
    with pytest.raises(InputError, match=r"document=, texts= and tenant=True"):
        llm.delete(**named)
    assert entries_of(llm, "d") == 3


def test_deleting_no_texts_deletes_nothing():
    llm = wrapped()
    llm.precompute(TEXTS, documents=["d"] * 3)
    assert llm.delete(texts=[]) == 0
    assert llm.delete(texts=TEXTS[:1]) == 1
    assert entries_of(llm, "d") == 2
    assert llm.delete(tenant=True) > 2
    assert not list(llm.store.entries())
