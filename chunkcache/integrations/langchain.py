"""The LangChain plug-in: a retriever and a chat model for chains that stay as they are.

chat = ChatChunkCache(llm=llm)
retriever = ChunkCacheRetriever(retriever=store.as_retriever(), llm=llm)
chain = {"context": retriever, "question": RunnablePassthrough()} | prompt | chat
"""

from __future__ import annotations

from chunkcache.errors import missing_extra

try:
    from chunkcache.integrations.langchain_chat import ChatChunkCache
    from chunkcache.integrations.langchain_messages import document_block
    from chunkcache.integrations.langchain_retriever import ChunkCacheRetriever, ChunkRetriever
    from chunkcache.integrations.precomputing import CHUNK_KEY
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("langchain_core"):
        raise
    raise missing_extra("langchain", "the LangChain plug-in", error) from error

__all__ = ["CHUNK_KEY", "ChatChunkCache", "ChunkCacheRetriever", "ChunkRetriever", "document_block"]
