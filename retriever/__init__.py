"""Text in, ranked chunks out: load documents, split them token-exactly, embed, index, search, and follow changes."""

from chunkcache.retriever.chunking import Chunk, split
from chunkcache.retriever.documents import Document, load_documents
from chunkcache.retriever.embedder import Embedder
from chunkcache.retriever.index import VectorIndex
from chunkcache.retriever.reranker import CrossEncoderReranker, Reranker
from chunkcache.retriever.retriever import Change, Hit, Retriever

__all__ = [
    "Change",
    "Chunk",
    "CrossEncoderReranker",
    "Document",
    "Embedder",
    "Hit",
    "Reranker",
    "Retriever",
    "VectorIndex",
    "load_documents",
    "split",
]
