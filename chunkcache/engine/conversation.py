"""Several questions in one conversation: each turn goes on from the KV that the turns before it left.

Each turn is the whole conversation as the chat template renders it then. As far as that begins like what was said
before, it is never computed again, and never repaired: to a later turn it is exact. Chunks that a later turn brings
along are reused at the place where they now stand, like those of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from chunkcache.blend import FusedCache, Policy, layer_kv
from chunkcache.engine.engine import Engine, PrefillOutput, PreparedRequest
from chunkcache.engine.generation import Generation, end_ids, needs_finished_cache, take_policy
from chunkcache.engine.streaming import TextStream
from chunkcache.errors import InputError
from chunkcache.kv import ChunkKV
from chunkcache.prompt import Prompt
from chunkcache.prompt.messages import MessageBuilder, Turn
from chunkcache.prompt.prompt import common
from chunkcache.prompt.template import merged


class Conversation:
    """One conversation; made by `CachedLLM.conversation`. Not to be used by several threads at once.

    Args:
        engine: what answers.
        messages: builds the prompts.
        system: system prompt; None for the chat template's own.
        template_options: keywords for the chat template at each turn; those of a turn come before them.

    Attributes:
        token_ids: all that has been said so far, answers included.
        turns: how many questions were answered.
    """

    def __init__(
        self,
        engine: Engine,
        messages: MessageBuilder,
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        messages.prompts.with_options(template_options)  # refuses what the template does not read
        self._template_options = dict(template_options or {})
        self._engine, self._messages, self._system = engine, messages, system
        self._said: list[Turn] = [Turn("system", system)] if system else []
        self._head: ChunkKV | None = None
        self._head_of = ""  # fingerprint of the model that computed it
        self._can_cut = self._exact = True
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
        request, asked = self._prepare(question, chunks, policy, max_new_tokens, options)
        return self._answer(request, asked)

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
        request, asked = self._prepare(question, chunks, policy, max_new_tokens, options)
        return self._engine.stream(request, partial(self._answer, asked=asked))

    def prefill(
        self, question: str, chunks: Sequence[Any] = (), *, policy: str | Policy | None = None, **options: Any
    ) -> PrefillOutput:
        """Prefill the next question like `CachedLLM.prefill`; the conversation stays where it is."""
        return self._engine.prefill(self._prepare(question, chunks, policy, None, options)[0])

    def _prepare(
        self,
        question: str,
        chunks: Sequence[Any],
        policy: str | Policy | None,
        max_new_tokens: int | None,
        options: dict[str, Any],
    ) -> tuple[PreparedRequest, Turn]:
        if needs_finished_cache(self._engine.model, options):
            raise InputError("num_beams: a conversation goes on from one sequence; leave beam search out")
        options = dict(options)
        chosen = self._engine.resolve_policy(take_policy(options, policy))
        template_options = merged(self._template_options, options.pop("template_options", None))
        self._messages.prompts.check(question, chunks)
        asked = Turn("user", question.strip(), tuple(chunks), framed=True)

        def build() -> Prompt:
            prompt = self._messages.of_turns([*self._said, asked], template_options)
            head = self._head_for(prompt, chosen)
            return prompt if head is None else prompt.behind(head)

        return self._engine.prepare(build, chosen, max_new_tokens, options), asked

    def _head_for(self, prompt: Prompt, policy: Policy) -> ChunkKV | None:
        """Return the KV of what the prompt has in common with what was said, or None if they cannot be used."""
        head = self._head
        served = self._engine.served.current()
        if head is None or self._head_of != served.library.fingerprint or (policy.lossless and not self._exact):
            return None
        shared = common(head.token_ids, prompt.token_ids[:-1])
        for span in prompt.spans:
            if span.start < shared < span.stop:
                shared = span.start
        if shared == len(head):
            return head
        if not shared or not self._can_cut:
            return None
        layers = [layer[:, :, :shared] for layer in head.layers if isinstance(layer, Tensor)]
        return ChunkKV.of(head.token_ids[:shared], 0, layers)

    def _answer(self, request: PreparedRequest, asked: Turn) -> Generation:
        """Answer, and go on from here: keep what was said and its KV. The last token of an answer has none yet."""
        before = self._engine.served.current()
        generation, cache = self._engine.answer(request)
        if isinstance(cache, FusedCache):
            cache.catch_up()  # an answer of one token has not asked for it
        prompts = self._messages.prompts
        spoken = prompts.without_end(generation.token_ids, end_ids(self._engine.model, request.options))
        text = prompts.text_of(spoken)
        answer = Turn("assistant", generation.text if text is None else text, token_ids=spoken if text else ())
        self._said += [asked, answer]
        self.token_ids = (*request.prompt.token_ids, *generation.token_ids)
        self._head = ChunkKV.of(*_kv_of(cache, self.token_ids))
        self._head_of = before.library.fingerprint if self._engine.served.current() is before else ""
        self._can_cut = not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
        whole = request.policy.lossless or not request.policy.reuses or request.policy.stores_in_context
        self._exact = whole and (self._exact or request.prompt.head is None)
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
