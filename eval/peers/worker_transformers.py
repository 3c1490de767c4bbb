"""transformers, alone: a full prefill, or one that goes on from the cache of the prompt's beginning.

Settings, the fastest found for one prompt at a time: SDPA attention, the output layer for the last token only
(`logits_to_keep=1`), inference mode, the model called directly, since `generate()` adds its own set-up to the first
token. No `torch.compile`: each new prompt length would compile again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from itertools import chain, takewhile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

Parts = Sequence[Sequence[int]]


class Full:
    """Prefills every prompt from its first token."""

    packages = ("torch", "transformers")

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load a model from a folder, in the dtype it was saved in."""
        torch.set_num_threads(threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self._model = loaded
        ends = loaded.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        attention = loaded.config._attn_implementation
        return {"dtype": str(loaded.dtype).removeprefix("torch."), "attention": attention, "logits_to_keep": 1}

    def warm(self, parts: Parts) -> None:
        """Compute ahead what can be: here, nothing."""

    @torch.inference_mode()
    def answer(self, parts: Parts, answer_tokens: int) -> tuple[float, list[int], Any]:
        """Return the TTFT in seconds, the greedy answer, and the first token's logits."""
        ids = list(chain(*parts))
        started = time.perf_counter()
        cache = self._cache(ids)
        logits = self._forward(ids[cache.get_seq_length() :], cache)
        answer = [int(logits.argmax())]
        seconds = time.perf_counter() - started
        first = logits
        while len(answer) < answer_tokens and answer[-1] not in self._ends:
            logits = self._forward(answer[-1:], cache)
            answer.append(int(logits.argmax()))
        return seconds, answer, first.float().numpy()

    def _cache(self, ids: list[int]) -> DynamicCache:
        """Return a cache of some of the first tokens, which the request may add to."""
        return DynamicCache(config=self._model.config)

    def _forward(self, ids: list[int], cache: DynamicCache) -> Any:
        given = torch.tensor([ids])
        return self._model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


class Prefix(Full):
    """Keeps the cache of the prefix and gives each request a copy of it, as transformers' documentation advises.

    Nothing of a request is kept after it: what two requests have in common is the prefix. The copy is on the clock.
    """

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load the model, with nothing kept yet."""
        settings = super().load(model, threads)
        self._kept: list[int] = []
        self._prefix = super()._cache([])
        return {**settings, "kept": "prefix", "cache": "DynamicCache, copied for each request"}

    @torch.inference_mode()
    def warm(self, parts: Parts) -> None:
        """Keep the prefix, if it is not kept already."""
        if list(parts[0]) != self._kept:
            self._kept, self._prefix = list(parts[0]), super()._cache([])
            if self._kept:
                self._forward(self._kept, self._prefix)

    def _cache(self, ids: list[int]) -> DynamicCache:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._kept, ids[:-1], strict=False))
        shared = sum(1 for _ in same)
        if not shared:
            return super()._cache(ids)
        cache = copy.deepcopy(self._prefix)
        if shared < len(self._kept):
            cache.crop(shared - len(self._kept))  # a negative number is that of tokens to drop
        return cache
