"""Another build of chunkcache itself: a checkout of any commit, with the default policy that it had.

Only what a user calls is called, so that old builds answer, too: `wrap`, `precompute`, `prefill`.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STORE = "memory://?max_bytes=4GiB"


class Build:
    """The build whose root is the worker's second argument."""

    packages = ("torch", "transformers")
    operations = ("prepare", "prefill", "judge")

    def load(self, model: str, threads: int) -> dict[str, Any]:
        """Load a model from a folder, in the dtype it was saved in, and wrap it."""
        torch.set_num_threads(threads)
        sys.path.insert(0, sys.argv[2])
        chunkcache: Any = importlib.import_module("chunkcache")
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        self._llm = chunkcache.wrap(loaded, AutoTokenizer.from_pretrained(model), store=STORE)
        ends = loaded.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        return {"policy": str(self._llm.resolve_policy(self._llm.policy)), "from": chunkcache.__file__}

    def prepare(self, chunks: list[str]) -> dict[str, Any]:
        """Compute chunks ahead, as this build does by default."""
        self._llm.precompute(chunks)
        return {"ok": True}

    def prefill(self, question: str, chunks: list[str]) -> dict[str, Any]:
        """Prefill a prompt, and tell how long the first token took, and of what prompt it is."""
        self._asked = question, chunks
        started = time.perf_counter()
        self._start = self._llm.prefill(question, chunks)
        int(self._start.logits.argmax())  # the first token id, on the host
        seconds = time.perf_counter() - started
        stats = self._start.stats
        return {
            "ttft_s": seconds,
            "stages": stats.stages(seconds),
            "recomputed_share": stats.recomputed_share,
            "token_ids": self._start.input_ids[0].tolist(),
        }

    @torch.no_grad()
    def judge(self, answer: list[int], answer_tokens: int) -> dict[str, Any]:
        """Return the logits along an answer of the prompt prefilled last, and the answer that it gives itself."""
        rows = self._start.logits[None]
        if len(answer) > 1:
            rows = torch.cat((rows, self._forward(answer[:-1])))
        if rows.argmax(-1).tolist() == answer:
            own = answer
        else:  # what slid out of a window is gone, so it is prefilled once more
            self._start = self._llm.prefill(*self._asked)
            own = [int(self._start.logits.argmax())]
            while len(own) < answer_tokens and own[-1] not in self._ends:
                own.append(int(self._forward(own[-1:])[-1].argmax()))
        return {"logits": rows.float().numpy(), "answer": own}

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        given = torch.tensor([list(ids)])
        logits: torch.Tensor = self._llm.model(
            input_ids=given, past_key_values=self._start.past_key_values, use_cache=True
        ).logits[0]
        return logits
