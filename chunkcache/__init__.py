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
    from chunkcache.corpus import Corpus
    from chunkcache.engine.batch import Batch
    from chunkcache.engine.conversation import Conversation
    from chunkcache.engine.generation import Generation, TextStream
    from chunkcache.engine.grouping import Request
    from chunkcache.engine.precompute import PrecomputeResult
    from chunkcache.engine.stats import RequestStats
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
        ResultsError,
        SelfCheckError,
        StoreURLError,
        TokenizerMismatchError,
        UnsupportedModelError,
    )
    from chunkcache.llm import CachedLLM, PrefillOutput, wrap
    from chunkcache.models import load_model
    from chunkcache.prompt.builder import PromptChunk
    from chunkcache.store import Store, open_store

__version__ = _version("chunkcache")

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
    "PeerError",
    "PolicyError",
    "PrecomputeResult",
    "PrefillOutput",
    "PromptChunk",
    "PromptError",
    "Request",
    "RequestStats",
    "ResultsError",
    "SelfCheckError",
    "Store",
    "StoreURLError",
    "TextStream",
    "TokenizerMismatchError",
    "UnsupportedModelError",
    "__version__",
    "load_model",
    "open_store",
    "wrap",
]

_HOMES = {
    "corpus": ("Corpus",),
    "engine.batch": ("Batch",),
    "engine.conversation": ("Conversation",),
    "engine.generation": ("Generation", "TextStream"),
    "engine.grouping": ("Request",),
    "engine.precompute": ("PrecomputeResult",),
    "engine.stats": ("RequestStats",),
    "llm": ("CachedLLM", "PrefillOutput", "wrap"),
    "models": ("load_model",),
    "prompt.builder": ("PromptChunk",),
    "store": ("Store", "open_store"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chunkcache' has no attribute {name!r}")
    return getattr(import_module(f"chunkcache.{_HOME_OF.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
