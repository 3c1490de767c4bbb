"""Owners: a chunk is an orphan when the last document that had it is gone."""

from __future__ import annotations

from chunkcache.library.documents import Owners


def owning(**documents: str) -> Owners:
    """Return owners of chunks named by one letter each, by document."""
    owners = Owners()
    for document, chunks in documents.items():
        for chunk in chunks:
            owners.add(chunk, document)
    return owners


def test_documents_of_chunks():
    owners = owning(one="ab", two="bc")
    assert [owners.of(chunks) for chunks in ("a", "b", "x", "ac")] == [{"one"}, {"one", "two"}, set(), {"one", "two"}]


def test_chunks_of_no_other_document_are_orphans():
    owners = owning(one="abd", two="bc")
    assert owners.drop("one", but="d") == {"a"}
    assert [owners.of(chunk) for chunk in "abd"] == [set(), {"two"}, {"one"}]
    assert owners.drop("two") == {"b", "c"}
    assert owners.drop("two") == set()


def test_forgotten_chunks_have_no_documents():
    owners = owning(one="ab")
    owners.forget("a")
    owners.forget("never known")
    assert (owners.of("a"), owners.of("b")) == (set(), {"one"})
    owners.clear()
    assert owners.of("b") == set()
