"""kvboost 0.9: chunks that are cached independently, stitched together, and repaired or not.

Settings, and why:

- One kvboost chunk for each part of the prompt, by way of its chunk registry. Its own grid of 128 tokens cuts a
  passage at places that depend on what stands before it, so that a passage in another place is never found again.
- `overlap_k=16`, `sink_tokens=32`, the values of its own published benchmark: each chunk is computed behind the end
  of the one before and the first tokens of the prompt. That costs nothing at request time.
- The model is loaded here and not by its `from_pretrained`, which would make it float16. Its flash kernel is for
  GPUs, and its paged engine changes decoding only, in float16.
- Token ids go in by way of its `_encode`, so that nothing is tokenised on the clock. The first token is timed where
  it is handed out (`on_token`): its own `ttft_ms` starts only after lookup, stitching and repair.
- A budget that holds every chunk. No prompt is added to the cache by being asked (`cacheable_prefix_len=0`), so that
  a prompt that comes again is no faster than the first time.

It matches a chunk exactly only behind the same chunks as when it was stored. So there are two peers of it:

`InOrder`, its best case: prefix and chunks are cached in the very order of the request to come, at the positions
they will have. No repair: `selective`, its default, took twice as long on prompts of 1,000 tokens and was no nearer
to a full prefill (KL 0.075 and 0.112 both ways); `cacheblend` was nearer, but took as long as a full prefill.

`AnyOrder`: each chunk is cached on its own behind the prefix, as our policies do it. From the second chunk on, it
finds them by content only, and then always runs its CacheBlend repair: a full forward over all cached tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from kvboost import KVBoost, RecomputeStrategy  # type: ignore[import-not-found]
from kvboost.chunk_registry import ChunkRegistry  # type: ignore[import-not-found]
from kvboost.compat import check_model_compatibility  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

Parts = Sequence[Sequence[int]]
BUDGET = 16 << 30  # bytes of chunk KV


class PartRegistry(ChunkRegistry):  # type: ignore[misc]
    """Cuts a prompt at the parts that it was told of; what is behind them is in no chunk."""

    lengths: tuple[int, ...] = ()

    def split(self, token_ids: list[int], text: str = "", boundary_tokens: Any = None) -> list[Any]:
        """Return (start, end, ids) of each part."""
        bounds = pairwise((0, *accumulate(self.lengths)))
        return [(start, end, token_ids[start:end]) for start, end in bounds if start < end]


class InOrder:
    """Prefix and chunks are cached in the order of the request."""

    packages = ("torch", "transformers", "kvboost")
    strategy = "none"

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load a model from a folder, in the dtype it was saved in."""
        torch.set_num_threads(threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        check_model_compatibility(loaded)
        settings = {"recompute_strategy": self.strategy, "overlap_k": 16, "sink_tokens": 32}
        self._engine = KVBoost(loaded, AutoTokenizer.from_pretrained(model), max_cache_bytes=BUDGET, device="cpu",
                               **{**settings, "recompute_strategy": RecomputeStrategy(self.strategy)})  # fmt: skip
        self._registry = self._engine.chunk_registry = self._engine.assembler.registry = PartRegistry()
        return {**settings, "chunks": "one for each part", "warmed": self.__doc__, "dtype": str(loaded.dtype)}

    def warm(self, parts: Parts) -> None:
        """Forget all chunks, and cache these."""
        self._engine.reset_cache()
        self._cache(parts)

    def answer(self, parts: Parts, answer_tokens: int) -> tuple[float, list[int], Any]:
        """Return the TTFT in seconds, the greedy answer, and the first token's logits."""
        tokens: list[int] = []
        times: list[float] = []

        def on_token(token: int) -> None:
            times.append(time.perf_counter())
            tokens.append(token)

        self._is_next(parts, len(parts) - 1)
        started = time.perf_counter()
        found = self._engine.generate("", answer_tokens, cacheable_prefix_len=0, on_token=on_token)
        return times[0] - started, tokens, found.first_token_logits

    def _cache(self, parts: Parts) -> None:
        self._is_next(parts, len(parts))
        self._engine.warm("")

    def _is_next(self, parts: Parts, cached: int) -> None:
        """Let the engine take these ids for its next text, the first so many parts as chunks."""
        ids = list(chain(*parts))
        self._engine._encode = lambda text: ids
        self._registry.lengths = tuple(len(part) for part in parts[:cached])


class AnyOrder(InOrder):
    """Each chunk is cached on its own behind the prefix."""

    strategy = "cacheblend"

    def _cache(self, parts: Parts) -> None:
        prefix, *chunks = parts
        for chunk in chunks:
            super()._cache([prefix, chunk])
