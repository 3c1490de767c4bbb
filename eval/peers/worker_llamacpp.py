"""llama.cpp through llama-cpp-python, with its prompt cache: the longest common beginning stays in the context.

Settings, and why, each tried on prompts of 900 tokens on a CPU with AVX-512:

- The weights as float32, the ones that transformers computes with. A file of 4-bit weights took longer to prefill.
- `flash_attn`, which is faster than without.
- Keys and values as float32 (`type_k`, `type_v`): no slower than its default of float16, and exact.
- `n_batch` and `n_ubatch` of 512, its defaults: 256 and 2048 made no difference beyond the noise.
- As many threads for the prompt as for decoding, those that are measured. By default it would take them all.
- The context that the model was trained for (`n_ctx=0`).
- The cache that is in the context already (`generate` keeps what prompts have in common at the beginning), and not
  `LlamaRAMCache`, which saves and restores the same KV by copying them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

Parts = Sequence[Sequence[int]]


class PromptCache:
    """Keeps the prefix in the context; nothing of a request is kept after it."""

    packages = ("llama_cpp_python",)

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load a GGUF file."""
        settings = {"n_ctx": 0, "n_batch": 512, "n_ubatch": 512, "flash_attn": True,
                    "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # fmt: skip
        self._llama = llama_cpp.Llama(model, n_threads=threads, n_threads_batch=threads, verbose=False, **settings)
        self._kept = 0
        build = llama_cpp.llama_print_system_info().decode().strip(" |")
        return {**settings, "type_k": "f32", "type_v": "f32", "kept": "prefix", "build": build}

    def warm(self, parts: Parts) -> None:
        """Put the prefix into the context, and nothing else."""
        self._llama.reset()
        self._kept = len(parts[0])
        if parts[0]:
            self._llama.eval(parts[0])

    def answer(self, parts: Parts, answer_tokens: int) -> tuple[float, list[int], Any]:
        """Return the TTFT in seconds, the greedy answer, and the first token's logits."""
        llama, ids = self._llama, list(chain(*parts))
        started = time.perf_counter()
        tokens = llama.generate(ids, temp=0.0)
        answer = [next(tokens)]
        seconds = time.perf_counter() - started
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)).copy()
        while len(answer) < answer_tokens and answer[-1] != llama.token_eos():
            answer.append(next(tokens))
        llama.n_tokens = self._kept  # what is behind that is overwritten by the next request
        return seconds, answer, logits
