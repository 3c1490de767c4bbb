"""Deprecated: the pipeline is `chunkcache.integrations.transformers`; this path goes with the next release."""

from __future__ import annotations

import warnings

from chunkcache.integrations.transformers import TASK, Answer, ChunkCacheRagPipeline

__all__ = ["TASK", "Answer", "ChunkCacheRagPipeline"]

warnings.warn(
    "chunkcache.pipeline has moved: import chunkcache.integrations.transformers", DeprecationWarning, stacklevel=2
)
