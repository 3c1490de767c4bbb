"""LangChain retrievers: one that has the KV of what another one finds ready in time, and our own as one of them."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import patch_config, run_in_executor
from pydantic import ConfigDict, Field, InstanceOf, PrivateAttr

from chunkcache.blend import Policy
from chunkcache.integrations.precomputing import CHUNK_KEY, BackgroundPrecompute
from chunkcache.llm import CachedLLM
from chunkcache.retriever.retriever import Hit, Retriever


class ChunkCacheRetriever(BaseRetriever):
    """Any LangChain retriever, of whose Documents the KV are on the way while the prompt is still being made.

    The Documents come as the inner retriever returns them, if no other order is asked for, with one more entry in
    their metadata, `CHUNK_KEY`. One that cannot be cached, because it is white space or longer than the model's
    context, comes without it.

    Attributes:
        retriever: the retriever whose Documents these are; it also gets the config and other keywords of a call.
        llm: what will answer; the same that the chat model has.
        precompute: when KV that are missing are computed. "now" is before the Documents are returned, which costs a
            request nothing: it would compute them itself. "background" is meanwhile, for chains that have more to do
            before the answer, and "never" leaves it to the request.
        system: the system prompt of the requests, if they have one; chunks are computed behind it.
        policy: the policy of the requests; None for the llm's own.
        document_key: name of the metadata that say which document a text is from, for `llm.forget(document=...)`.
            Where they are missing, the Document's id is taken.
        k: how many Documents are passed on at most; None for all.
        reorder: by how many ranks a Document may move, so that more stand behind the same ones as in an earlier
            prompt; that helps policies that store chunks in their context: `prefix`, `cachecraft`.
        distinct: whether Documents that say nothing new are left out: repeats, and what another says whole.
    """

    model_config = ConfigDict(extra="forbid")

    retriever: RetrieverLike
    llm: InstanceOf[CachedLLM] = Field(repr=False)
    precompute: Literal["now", "background", "never"] = "now"
    system: str | None = None
    policy: str | InstanceOf[Policy] | None = None
    document_key: str = "source"
    k: int | None = Field(default=None, ge=1)
    reorder: int = Field(default=0, ge=0)
    distinct: bool = False

    _ahead: BackgroundPrecompute = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Refuse a policy that is unknown; like other bad fields it raises pydantic's ValidationError."""
        super().model_post_init(context)
        self._ahead = BackgroundPrecompute(
            self.llm, self.precompute, self.system, self.policy, self.reorder, self.distinct
        )

    @property
    def ahead(self) -> BackgroundPrecompute:
        """What prefetches and precomputes; it counts what went wrong, and can be waited for and closed."""
        return self._ahead

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Return the Documents for a query; keywords are the inner retriever's."""
        return super().invoke(input, config, within=config, **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Return the Documents for a query; keywords are the inner retriever's."""
        return await super().ainvoke(input, config, within=config, **kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        within: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(within, callbacks=run_manager.get_child())
        return self._ready(self.retriever.invoke(query, config, **kwargs), kwargs.get("k", self.k))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        within: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(within, callbacks=run_manager.get_child())
        found = await self.retriever.ainvoke(query, config, **kwargs)
        return await run_in_executor(None, self._ready, found, kwargs.get("k", self.k))

    def _ready(self, found: list[Document], k: int | None) -> list[Document]:
        found = found[:k]
        documents = [found[index] for index in self._ahead.order([document.page_content for document in found])]
        texts = [document.page_content for document in documents]
        digests = self._ahead.take(texts, [self._owner(document) for document in documents])
        # Copies: some stores hand out the very objects that they hold.
        return [
            document.model_copy(update={"metadata": {**document.metadata, CHUNK_KEY: digest}} if digest else None)
            for document, digest in zip(documents, digests, strict=True)
        ]

    def _owner(self, document: Document) -> str | None:
        owner = document.metadata.get(self.document_key)
        owner = document.id if owner is None else owner
        return None if owner is None else str(owner)


class ChunkRetriever(BaseRetriever):
    """The retriever of chunkcache as one of LangChain's.

    A Document has the text and id of a chunk, and as metadata the id of its document (`source`), its place in that
    (`index`) and its score.

    Attributes:
        retriever: made by `Retriever.build`.
        k: how many chunks are returned at most.
        mode: how they are searched for; None for the retriever's own way.
    """

    model_config = ConfigDict(extra="forbid")

    retriever: InstanceOf[Retriever] = Field(repr=False)
    k: int = Field(default=4, ge=1)
    mode: str | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        mode: str | None = None,
    ) -> list[Document]:
        return self._search(query, k, mode)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        mode: str | None = None,
    ) -> list[Document]:
        return await run_in_executor(None, self._search, query, k, mode)

    def _search(self, query: str, k: int | None, mode: str | None) -> list[Document]:
        hits = self.retriever.search(query, self.k if k is None else k, self.mode if mode is None else mode)
        return [_as_document(hit) for hit in hits]


def _as_document(hit: Hit) -> Document:
    chunk = hit.chunk
    metadata = {"source": chunk.document_id, "index": chunk.index, "score": hit.score}
    return Document(page_content=chunk.text, id=chunk.id, metadata=metadata)
