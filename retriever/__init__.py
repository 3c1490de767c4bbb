"""Text in, ranked chunks out: load documents, split them token-exactly, embed, index and search them."""

from chunkcache.retriever.chunking import Chunk, split
from chunkcache.retriever.documents import Document, load_documents
from chunkcache.retriever.embedder import Embedder
from chunkcache.retriever.index import FlatIndex
from chunkcache.retriever.retriever import Hit, Retriever

__all__ = ["Chunk", "Document", "Embedder", "FlatIndex", "Hit", "Retriever", "load_documents", "split"]
