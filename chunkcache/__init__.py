"""chunkcache: reuse the KV caches of retrieved chunks in retrieval-augmented generation.

    import chunkcache

    llm = chunkcache.wrap(model, tokenizer)
    llm.precompute(texts)
    out = llm.generate("question", chunks=texts)
"""

from __future__ import annotations

from importlib.metadata import version as _version

from chunkcache.errors import (
    ChunkCacheError,
    ContextLengthError,
    DocumentError,
    InputError,
    ModelNotFoundError,
    PolicyError,
    PromptError,
    SelfCheckError,
    StoreURLError,
    TokenizerMismatchError,
    UnsupportedModelError,
)
from chunkcache.generation import Generation, TextStream
from chunkcache.llm import CachedLLM, Precomputed, Prefilled, wrap
from chunkcache.models import load_model
from chunkcache.stats import RequestStats
from chunkcache.store import Store, open_store

__version__ = _version("chunkcache")

__all__ = [
    "CachedLLM",
    "ChunkCacheError",
    "ContextLengthError",
    "DocumentError",
    "Generation",
    "InputError",
    "ModelNotFoundError",
    "PolicyError",
    "Precomputed",
    "Prefilled",
    "PromptError",
    "RequestStats",
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
