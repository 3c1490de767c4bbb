"""What clients send to change the documents of an index."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, field_validator

from chunkcache.serve.fields import IndexName, Strict, Text
from chunkcache.serve.protocol import Salted

DocumentId = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Title = Annotated[str, StringConstraints(max_length=1024)]


class IndexedDocument(Strict):
    """A document as it is added or updated."""

    id: DocumentId
    title: Title = ""
    text: Text

    @field_validator("text")
    @classmethod
    def _has_text(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("there is nothing but white space in it")
        return text


class DocumentsRequest(Salted):
    """POST /v1/documents: documents to add to an index, or to put in the place of those with their ids."""

    index: IndexName
    documents: list[IndexedDocument] = Field(min_length=1, max_length=1024)

    @field_validator("documents")
    @classmethod
    def _ids_differ(cls, documents: list[IndexedDocument]) -> list[IndexedDocument]:
        if len({document.id for document in documents}) < len(documents):
            raise ValueError("two have the same id; give each one of its own")
        return documents
