"""A LangChain retriever that returns what it is given."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field


class ListRetriever(BaseRetriever):
    """Returns the Documents that it holds, and notes how it was called."""

    documents: list[Document]
    calls: list[tuple[str, Any]] = Field(default_factory=list)

    def _get_relevant_documents(self, query, *, run_manager):
        self.calls.append(("sync", run_manager))
        return self.documents

    async def _aget_relevant_documents(self, query, *, run_manager):
        self.calls.append(("async", run_manager))
        return self.documents
