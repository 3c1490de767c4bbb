"""Several questions in one conversation: each turn goes on from the KV that the turns before it left.

What was said before is never computed again, and never repaired: to a later turn it is exact. Chunks that a
later turn brings along are reused at the place where they now stand, like those of the first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from chunkcache.blend import Policy, layer_kv
from chunkcache.engine.generation import Generation, TextStream, check_options, needs_finished_cache, with_length
from chunkcache.errors import PromptError
from chunkcache.kv import ChunkKV
from chunkcache.prompt.builder import Prompt

if TYPE_CHECKING:
    from chunkcache.llm import CachedLLM, PrefillOutput


class Conversation:
    """One conversation; made by `CachedLLM.conversation`. Not to be used by several threads at once.

    Args:
        llm: what answers.
        system: system prompt; None for the chat template's own.

    Attributes:
        token_ids: all that has been said so far, answers included.
        turns: how many questions were answered.
    """

    def __init__(self, llm: CachedLLM, system: str | None = None) -> None:
        self._llm = llm
        self._system = system
        self._head: ChunkKV | None = None
        self.token_ids: tuple[int, ...] = ()
        self.turns = 0

    def generate(
        self,
        question: str,
        chunks: Sequence[str] = (),
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer the next question over what was said and `chunks`; see `CachedLLM.generate`.

        A call that raises leaves the conversation as it was.

        Raises:
            PromptError: as `CachedLLM.generate`, and for beam search, which leaves no single cache to go on from.
        """
        started = time.perf_counter()
        self._check(options)
        prompt, chosen = self._prompt(question, chunks), self._llm.resolve_policy(policy)
        options = with_length(options, max_new_tokens)
        return self._llm.answer(prompt, chosen, started, options, self._take)

    def stream(
        self,
        question: str,
        chunks: Sequence[str] = (),
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer like `generate`, piece by piece; the turn counts once the iteration is over."""
        started = time.perf_counter()
        self._check(options)
        prompt, chosen = self._prompt(question, chunks), self._llm.resolve_policy(policy)
        options = with_length(options, max_new_tokens)
        return self._llm.answer_in_pieces(prompt, chosen, started, options, self._take)

    def prefill(self, question: str, chunks: Sequence[str] = (), policy: str | Policy | None = None) -> PrefillOutput:
        """Prefill the next question like `CachedLLM.prefill`; the conversation stays where it is."""
        started = time.perf_counter()
        return self._llm.prefill_prompt(self._prompt(question, chunks), self._llm.resolve_policy(policy), started)

    def _check(self, options: dict[str, Any]) -> None:
        check_options(options)
        if needs_finished_cache(self._llm.model, options):
            raise PromptError("num_beams: a conversation goes on from one sequence; leave beam search out")

    def _prompt(self, question: str, chunks: Sequence[str]) -> Prompt:
        prompts = self._llm.prompts
        prompt = prompts.build(question, chunks, self._system)
        if self._head is None:
            return prompt
        said = (*self.token_ids, *prompts.between_turns(self._system, self.token_ids))
        return replace(prompt, prefix=said, head=self._head, behind=prompt.prefix)

    def _take(self, prompt: Prompt, generation: Generation, cache: Cache) -> None:
        """Go on from here: keep what was said and its KV. The last token of an answer has none yet."""
        self.token_ids = (*prompt.token_ids, *generation.token_ids)
        count = min(cache.get_seq_length(), len(self.token_ids))
        layers = [_whole(torch.cat(layer_kv(cache, index)), count) for index in range(len(cache.layers))]
        self._head = ChunkKV.of(self.token_ids[:count], 0, layers)
        self.turns += 1


def _whole(kv: Tensor, tokens: int) -> Tensor:
    """Return `[2, kv_heads, tokens, head_dim]`; what a sliding window has forgotten, and nothing sees, is zero."""
    missing = tokens - kv.shape[2]
    return torch.nn.functional.pad(kv, (0, 0, missing, 0)) if missing > 0 else kv[:, :, :tokens]
