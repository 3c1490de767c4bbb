"""Several questions in one conversation: each turn goes on from the KV that the turns before it left.

What was said before is never computed again, and never repaired: to a later turn it is exact. Chunks that a
later turn brings along are reused at the place where they now stand, like those of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from chunkcache.blend import Policy, layer_kv
from chunkcache.engine.engine import Engine, PrefillOutput, PreparedRequest
from chunkcache.engine.generation import Generation, needs_finished_cache
from chunkcache.engine.streaming import TextStream
from chunkcache.errors import InputError
from chunkcache.kv import ChunkKV
from chunkcache.prompt import Prompt, PromptBuilder


class Conversation:
    """One conversation; made by `CachedLLM.conversation`. Not to be used by several threads at once.

    Args:
        engine: what answers.
        prompts: builds the prompts.
        system: system prompt; None for the chat template's own.

    Attributes:
        token_ids: all that has been said so far, answers included.
        turns: how many questions were answered.
    """

    def __init__(self, engine: Engine, prompts: PromptBuilder, system: str | None = None) -> None:
        self._engine, self._prompts, self._system = engine, prompts, system
        self._head: ChunkKV | None = None
        self.token_ids: tuple[int, ...] = ()
        self.turns = 0

    def generate(
        self,
        question: str,
        chunks: Sequence[Any] = (),
        *,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer the next question over what was said and `chunks`; see `CachedLLM.generate`.

        A call that raises leaves the conversation as it was.

        Raises:
            InputError: as `CachedLLM.generate`, and for beam search, which leaves no single cache to go on from.
        """
        return self._answer(self._prepare(question, chunks, policy, max_new_tokens, options))

    def stream(
        self,
        question: str,
        chunks: Sequence[Any] = (),
        *,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer like `generate`, piece by piece; the turn counts once the iteration is over."""
        return self._engine.stream(self._prepare(question, chunks, policy, max_new_tokens, options), self._answer)

    def prefill(
        self, question: str, chunks: Sequence[Any] = (), *, policy: str | Policy | None = None
    ) -> PrefillOutput:
        """Prefill the next question like `CachedLLM.prefill`; the conversation stays where it is."""
        return self._engine.prefill(self._engine.prepare(lambda: self._prompt(question, chunks), policy))

    def _prepare(
        self,
        question: str,
        chunks: Sequence[Any],
        policy: str | Policy | None,
        max_new_tokens: int | None,
        options: dict[str, Any],
    ) -> PreparedRequest:
        if needs_finished_cache(self._engine.model, options):
            raise InputError("num_beams: a conversation goes on from one sequence; leave beam search out")
        return self._engine.prepare(lambda: self._prompt(question, chunks), policy, max_new_tokens, options)

    def _prompt(self, question: str, chunks: Sequence[Any]) -> Prompt:
        prompt = self._prompts.build(question, chunks, self._system)
        if self._head is None:
            return prompt
        said = (*self.token_ids, *self._prompts.between_turns(self._system, self.token_ids))
        return prompt.after(said, self._head)

    def _answer(self, request: PreparedRequest) -> Generation:
        """Answer, and go on from here: keep what was said and its KV. The last token of an answer has none yet."""
        generation, cache = self._engine.answer(request)
        self.token_ids = (*request.prompt.token_ids, *generation.token_ids)
        self._head = ChunkKV.of(*_kv_of(cache, self.token_ids))
        self.turns += 1
        return generation


def _kv_of(cache: Cache, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], int, list[Tensor]]:
    """Return the tokens that `cache` has KV of, their position, and the KV."""
    count = min(cache.get_seq_length(), len(token_ids))
    return token_ids[:count], 0, [_whole(torch.cat(layer_kv(cache, n)), count) for n in range(len(cache.layers))]


def _whole(kv: Tensor, tokens: int) -> Tensor:
    """Return `[2, kv_heads, tokens, head_dim]`; what a sliding window has forgotten, and nothing sees, is zero."""
    missing = tokens - kv.shape[2]
    return torch.nn.functional.pad(kv, (0, 0, missing, 0)) if missing > 0 else kv[:, :, :tokens]
