"""chunkcache: reuse the KV caches of retrieved chunks in retrieval-augmented generation.

    import chunkcache

    llm = chunkcache.wrap(model, tokenizer)
    llm.precompute(texts)
    out = llm.generate("question", chunks=texts)

The names below are imported when they are first used, because torch and transformers take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chunkcache.blend import Policy
    from chunkcache.corpus import Corpus
    from chunkcache.engine.batch import Batch
    from chunkcache.engine.chunks import PrecomputeResult
    from chunkcache.engine.conversation import Conversation
    from chunkcache.engine.engine import PrefillOutput
    from chunkcache.engine.generation import Generation
    from chunkcache.engine.grouping import Request
    from chunkcache.engine.stats import RequestStats
    from chunkcache.engine.streaming import TextStream
    from chunkcache.errors import (
        CalibrationError,
        ChunkCacheError,
        ContextLengthError,
        DocumentError,
        EntryLostError,
        InputError,
        ModelNotFoundError,
        PeerError,
        PolicyError,
        PromptError,
        QueueFullError,
        ResultsError,
        SelfCheckError,
        ServingError,
        StoreURLError,
        TokenizerMismatchError,
        UnsupportedModelError,
    )
    from chunkcache.library.neighbours import Neighbours
    from chunkcache.llm import CachedLLM, wrap
    from chunkcache.models import load_model
    from chunkcache.prompt import PromptChunk
    from chunkcache.retriever import Retriever, load_documents
    from chunkcache.store import Store, open_store

__version__ = _version("chunkcache")

_MODULES = {
    "blend": ("Policy",),
    "corpus": ("Corpus",),
    "engine.batch": ("Batch",),
    "engine.chunks": ("PrecomputeResult",),
    "engine.conversation": ("Conversation",),
    "engine.engine": ("PrefillOutput",),
    "engine.generation": ("Generation",),
    "engine.grouping": ("Request",),
    "engine.stats": ("RequestStats",),
    "engine.streaming": ("TextStream",),
    "library.neighbours": ("Neighbours",),
    "llm": ("CachedLLM", "wrap"),
    "models": ("load_model",),
    "prompt": ("PromptChunk",),
    "retriever": ("Retriever", "load_documents"),
    "store": ("Store", "open_store"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_RENAMED = {"Passage": "PromptChunk", "Precomputed": "PrecomputeResult", "Prefilled": "PrefillOutput"}

__all__ = [
    "Batch",
    "CachedLLM",
    "CalibrationError",
    "ChunkCacheError",
    "ContextLengthError",
    "Conversation",
    "Corpus",
    "DocumentError",
    "EntryLostError",
    "Generation",
    "InputError",
    "ModelNotFoundError",
    "Neighbours",
    "PeerError",
    "Policy",
    "PolicyError",
    "PrecomputeResult",
    "PrefillOutput",
    "PromptChunk",
    "PromptError",
    "QueueFullError",
    "Request",
    "RequestStats",
    "ResultsError",
    "Retriever",
    "SelfCheckError",
    "ServingError",
    "Store",
    "StoreURLError",
    "TextStream",
    "TokenizerMismatchError",
    "UnsupportedModelError",
    "__version__",
    "load_documents",
    "load_model",
    "open_store",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        from chunkcache.deprecated import warn_renamed

        warn_renamed(f"chunkcache.{name}", f"chunkcache.{_RENAMED[name]}")
        name = _RENAMED[name]
    if name not in __all__:
        raise AttributeError(f"module 'chunkcache' has no attribute {name!r}")
    return getattr(import_module(f"chunkcache.{_MODULE_OF.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
