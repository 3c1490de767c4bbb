"""A Hugging Face decoder model that reuses the KV of retrieved chunks: the face that users see.

Data flows one way: texts -> prompt -> plan (what is stored, what is not) -> selective prefill -> decoding by
the model's own `generate()`. The model is never modified; after every call it is as it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from chunkcache.blend import Decoder, FusedCache, Plan, Policy, SelectivePrefill, parse_policy, self_check
from chunkcache.blend.guard import GuardStep, guard_steps
from chunkcache.blend.hydragen import can_share
from chunkcache.engine.attach import Attachment
from chunkcache.engine.batch import MAX_BATCH, Batcher, OnBatch
from chunkcache.engine.calibration import Calibration
from chunkcache.engine.conversation import Conversation
from chunkcache.engine.generation import (
    FirstTokenClock,
    Generation,
    TextStream,
    check_options,
    needs_finished_cache,
    setting,
    with_length,
)
from chunkcache.engine.planner import Planner
from chunkcache.engine.precompute import KeepsChunks
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.tuning import Tuning
from chunkcache.kv import ContextAttention
from chunkcache.library.fingerprint import check_tokenizer, fingerprint
from chunkcache.library.library import ChunkLibrary
from chunkcache.prompt.builder import INSTRUCTION, Prompt, PromptBuilder, PromptChunk
from chunkcache.prompt.known_texts import KnownTexts
from chunkcache.prompt.messages import Message, MessageBuilder
from chunkcache.store import Store, open_store

DEFAULT_STORE = "memory://?max_bytes=2GiB"
DEFAULT_POLICY = "query"


@dataclass(frozen=True)
class PrefillOutput:
    """A prompt whose prefill is done.

    Attributes:
        logits: of the next token, `[vocab]`.
        cache: keys and values of the whole prompt, an ordinary transformers cache.
        input_ids: the prompt, `[1, tokens]`.
        stats: what the request did.
    """

    logits: Tensor
    cache: Cache
    input_ids: Tensor
    stats: RequestStats


OnAnswer = Callable[[Prompt, Generation, Cache], None]


class CachedLLM(KeepsChunks):
    """A model, its tokenizer and a store of chunk KV; made by `wrap`.

    Attributes:
        model: the wrapped model, unchanged.
        tokenizer: its tokenizer.
        store: the store that holds chunk KV.
        policy: the policy used when a call names none.
        prompts: builds prompts from texts.
        self_check: the figures of the check that ran when the model was wrapped.
        fingerprint: identity of model and tokenizer.
        tuning: what was measured for this model: its calibration, and the loading controller.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: str | Store | None = None,
        policy: str | Policy = DEFAULT_POLICY,
        tenant: str = "",
        instruction: str = INSTRUCTION,
        lead_in: str | None = None,
        calibration: Calibration | str | Path | None = None,
    ) -> None:
        self.policy = parse_policy(policy)
        store = store if store is not None else os.environ.get("CHUNKCACHE_STORE", DEFAULT_STORE)
        self.store = open_store(store) if isinstance(store, str) else store
        self._decoder = Decoder(model)
        check_tokenizer(model, tokenizer)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.prompts = PromptBuilder(tokenizer, instruction, lead_in)
        self._known = KnownTexts()
        self._messages = MessageBuilder(self.prompts, self._known, tokenizer.chat_template)
        self.self_check = self_check(self._decoder)
        self.fingerprint = fingerprint(model, tokenizer)
        self.tuning = Tuning(self.fingerprint, calibration, len(self._decoder.layers))
        self.tuning.resolve(self.policy)
        self._library = ChunkLibrary(self._decoder, self.store, self.fingerprint, tenant)
        self._planner = Planner(self._decoder, self._library, self.prompts)
        self._attachment = Attachment(self._decoder, self._library, self.tuning, self.policy)

    @property
    def max_tokens(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self._decoder.max_tokens

    @cached_property
    def batches(self) -> bool:
        """Whether this model can decode sequences together over one copy of shared KV; tried out once."""
        return can_share(self._decoder)

    # --- the request

    def generate(
        self,
        question: str,
        chunks: Sequence[str | PromptChunk] = (),
        system: str | None = None,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer `question` over `chunks`.

        Args:
            question: the text to answer.
            chunks: retrieved texts, in the order they shall stand in the prompt; repeats are allowed.
            system: system prompt; None for the chat template's own.
            policy: overrides the wrapper's policy for this call.
            max_new_tokens: length of the answer at most; 64, unless a generation config says otherwise.
            options: any keyword of transformers' `generate()` that makes sense for one sequence.

        Raises:
            PromptError: question or chunk is empty, or an option asks for more than one sequence.
            ContextLengthError: prompt and answer do not fit the model's context.
            PolicyError: the policy is unknown.
        """
        started = time.perf_counter()
        check_options(options)
        chosen = self.resolve_policy(policy)
        prompt = self.prompts.build(question, chunks, system)
        return self.answer(prompt, chosen, started, with_length(options, max_new_tokens))

    def stream(
        self,
        question: str,
        chunks: Sequence[str | PromptChunk] = (),
        system: str | None = None,
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer like `generate`, and yield the text piece by piece as it is decoded.

        Leaving the loop early ends the generation. The stream's `.result` is the `Generation` at its end.
        """
        started = time.perf_counter()
        check_options(options)
        chosen = self.resolve_policy(policy)
        prompt = self.prompts.build(question, chunks, system)
        return self.answer_in_pieces(prompt, chosen, started, with_length(options, max_new_tokens))

    def generate_batch(
        self,
        requests: Iterable[tuple[Any, ...]],
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        max_batch: int = MAX_BATCH,
        max_kv_bytes: int | None = None,
        reorder: bool = False,
        on_batch: OnBatch | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Answer many requests offline, those over the same chunks together; see `chunkcache.engine.batch`.

        Args:
            requests: of (question, chunks, system) each, the last two optional; as for `generate`.
            policy: as in `generate`. One that looks at the question looks at those of all requests of a batch. Under
                a guard, whose bound is for one question, requests are answered one by one.
            max_new_tokens: as in `generate`.
            max_batch: sequences that are decoded together at most.
            max_kv_bytes: bytes of KV that a batch may need, apart from what the store holds; None for no bound.
            reorder: sort the chunks of each prompt so that more prompts begin alike. It changes answers.
            on_batch: called with every `Batch` that is done, and its answers: so they are kept if a later one fails.
            options: any keyword of transformers' `generate()` that makes sense for a batch. A logits processor sees
                ids that are padded with the prompt's first token, between what is shared and the question.

        Returns:
            the answers, in the order of the requests. Their `output` is on the CPU, and padded likewise.

        Raises:
            PromptError, ContextLengthError, InputError: as `generate`, with the index of the request, and where one
                does not fit `max_kv_bytes`; for an option that padding misleads; before any is answered.
            PolicyError: the policy is unknown.
        """
        chosen, options = self.resolve_policy(policy), with_length(options, max_new_tokens)
        batcher = Batcher(self, self._decoder, self._planner, chosen, options, max_batch, max_kv_bytes, reorder)
        return batcher.run(requests, on_batch)

    def prefill(
        self,
        question: str,
        chunks: Sequence[str | PromptChunk] = (),
        system: str | None = None,
        policy: str | Policy | None = None,
    ) -> PrefillOutput:
        """Prefill the prompt and return the next token's logits with the cache of the whole prompt."""
        started = time.perf_counter()
        chosen = self.resolve_policy(policy)
        return self.prefill_prompt(self.prompts.build(question, chunks, system), chosen, started)

    def inputs(
        self,
        question: str,
        chunks: Sequence[str | PromptChunk] = (),
        system: str | None = None,
        policy: str | Policy | None = None,
    ) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and `past_key_values` for a plain `model.generate(**inputs)`.

        All tokens of the prompt but the last are prefilled here; `generate()` starts with the last one, which
        costs one decoding step more than `llm.generate`.
        """
        started = time.perf_counter()
        chosen = self.resolve_policy(policy)
        prompt = self.prompts.build(question, chunks, system)
        plan, stats = self._planner.plan(prompt, chosen, started)
        return self._finished_inputs(prompt, plan, chosen, stats)

    def chat(
        self,
        messages: Sequence[Message],
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Answer the last of some messages, reusing the chunks that are found in their texts.

        Args:
            messages: mappings with `role` and `content`, as for `apply_chat_template`. The content is text, in which
                chunks are found that were precomputed, or made known, by this wrapper; or a list of texts and
                `PromptChunk`s, which read like the question and the chunks of `generate`.
            policy: as in `generate`, and so are the others.

        Raises:
            PromptError: a message is not of this form, or the chat template refuses them.
            ContextLengthError, PolicyError: as in `generate`.
        """
        started = time.perf_counter()
        check_options(options)
        chosen = self.resolve_policy(policy)
        return self.answer(self._messages.build(messages), chosen, started, with_length(options, max_new_tokens))

    def chat_stream(
        self,
        messages: Sequence[Message],
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer like `chat`, piece by piece; see `stream`."""
        started = time.perf_counter()
        check_options(options)
        prompt, chosen = self._messages.build(messages), self.resolve_policy(policy)
        return self.answer_in_pieces(prompt, chosen, started, with_length(options, max_new_tokens))

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Return the prompt that `chat` would answer."""
        return self._messages.build(messages)

    def conversation(self, system: str | None = None) -> Conversation:
        """Return a new conversation, in which each question goes on from the KV of those before it."""
        return Conversation(self, system)

    # --- the true drop-in

    def attach(self) -> CachedLLM:
        """Let the model's own `generate()` find and reuse precomputed chunks in any prompt, until `detach`.

        Also as a context: `with llm: model.generate(input_ids)`. What was found is in `last_stats`.
        """
        self._attachment.attach()
        return self

    def detach(self) -> None:
        """Give the model its own `generate()` back."""
        self._attachment.detach()

    @property
    def last_stats(self) -> RequestStats | None:
        """What the last `generate()` of the attached model did; None before the first."""
        return self._attachment.last_stats

    def __enter__(self) -> CachedLLM:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    # --- the same for a prompt that is built already

    def resolve_policy(self, policy: str | Policy | None) -> Policy:
        """Return the policy of a call, the wrapper's if it names none, with nothing left open."""
        return self.tuning.resolve(self.policy if policy is None else parse_policy(policy))

    def prefill_prompt(self, prompt: Prompt, policy: Policy, started: float) -> PrefillOutput:
        """Prefill `prompt`; `started` is when the request came, by `time.perf_counter`."""
        plan, stats = self._planner.plan(prompt, policy, started)
        logits, cache = self._prefill(prompt, plan, policy, stats)
        stats.ttft_s = time.perf_counter() - started
        return PrefillOutput(logits, cache, self._input_ids(plan), stats)

    def guard_steps(self, question: str, chunks: Sequence[str], policy: Policy) -> list[GuardStep]:
        """Return every step that a fidelity guard over `policy` could stop at, for its calibration."""
        plan, _ = self._planner.plan(self.prompts.build(question, chunks), policy, time.perf_counter())
        decoder = self._decoder.shadow()
        cache = FusedCache(decoder.config, plan, decoder.rotaries)
        return list(guard_steps(decoder, plan, len(plan), cache, policy.escalation()))

    def answer_in_pieces(
        self,
        prompt: Prompt,
        policy: Policy,
        started: float,
        options: dict[str, Any],
        on_done: OnAnswer | None = None,
    ) -> TextStream:
        """Answer `prompt` in another thread; see `answer`."""
        criteria = options.pop("stopping_criteria", None) or []

        def run(streamer: Any, stop: StoppingCriteria) -> Generation:
            more = {**options, "streamer": streamer, "stopping_criteria": [*criteria, stop]}
            return self.answer(prompt, policy, started, more, on_done)

        return TextStream(self.tokenizer, run)

    def answer(
        self,
        prompt: Prompt,
        policy: Policy,
        started: float,
        options: dict[str, Any],
        on_done: OnAnswer | None = None,
    ) -> Generation:
        """Prefill `prompt` and decode with the model's own `generate()`.

        Args:
            prompt: the prompt.
            policy: what is recomputed.
            started: when the request came, by `time.perf_counter`.
            options: keywords for `generate()`.
            on_done: called with the prompt, the answer and the cache of both.
        """
        plan, stats = self._planner.plan(prompt, policy, started, setting(self.model, options, "max_new_tokens") or 1)
        options = {"use_cache": True, "cache_implementation": None, "prefill_chunk_size": None, **options}
        clock = FirstTokenClock()
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), clock])
        if setting(self.model, options, "pad_token_id") is None:
            options["pad_token_id"] = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        if setting(self.model, options, "stop_strings"):
            options.setdefault("tokenizer", self.tokenizer)
        before = time.perf_counter()
        finished = needs_finished_cache(self.model, options)
        if finished:
            inputs = self._finished_inputs(prompt, plan, policy, stats)
            cache = inputs["past_key_values"]
            cache.batch_repeat_interleave(setting(self.model, options, "num_beams") or 1)
            output = self.model.generate(**inputs, **options)
        else:
            input_ids = self._input_ids(plan)
            prefill = self._selective(prompt, plan, policy)
            output = prefill.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
            cache = prefill.cache
            stats.take(plan, prefill)
        first_token_at = clock.first_token_at or time.perf_counter()
        stats.prefill_s = first_token_at - before
        stats.ttft_s = first_token_at - started
        if not finished:
            self.tuning.observe(stats)
        sequence = output if isinstance(output, Tensor) else output.sequences
        token_ids = sequence[0, len(plan) :].tolist()
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        generation = Generation(text.strip(), token_ids, stats.ttft_s, stats, output)
        if on_done is not None:
            on_done(prompt, generation, cache)
        return generation

    # --- inside

    def _prefill(
        self, prompt: Prompt, plan: Plan, policy: Policy, stats: RequestStats, but_last: bool = False
    ) -> tuple[Tensor, FusedCache]:
        before = time.perf_counter()
        prefill = self._selective(prompt, plan, policy, but_last)
        logits = prefill.run()
        stats.prefill_s = time.perf_counter() - before
        stats.take(plan, prefill)
        self.tuning.observe(stats)
        return logits, prefill.cache

    def _finished_inputs(self, prompt: Prompt, plan: Plan, policy: Policy, stats: RequestStats) -> dict[str, Any]:
        _, cache = self._prefill(prompt, plan, policy, stats, but_last=True)
        input_ids = self._input_ids(plan)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "past_key_values": cache}

    def _selective(self, prompt: Prompt, plan: Plan, policy: Policy, but_last: bool = False) -> SelectivePrefill:
        """Return this request's prefill.

        When it is complete, chunks are stored in their context if the policy wants it, and with `but_last` the last
        token's KV are dropped, for a `generate()` that starts with that token.
        """

        def finish(cache: FusedCache, contexts: dict[int, ContextAttention]) -> None:
            if prompt.head is None:  # behind the answers of a conversation nothing is likely to stand again
                self._planner.remember(prompt, cache.plan, policy, cache, contexts)
            if but_last:
                cache.drop_last()

        guard, depth = self.tuning.guard(policy), self.tuning.depth(plan)
        return SelectivePrefill(self._decoder, plan, policy, finish, policy.versioned, guard, depth)

    def _input_ids(self, plan: Plan) -> Tensor:
        return torch.tensor([plan.token_ids], device=self._decoder.device)


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: str | Store | None = None,
    policy: str | Policy = DEFAULT_POLICY,
    tenant: str = "",
    instruction: str = INSTRUCTION,
    lead_in: str | None = None,
    calibration: Calibration | str | Path | None = None,
) -> CachedLLM:
    """Wrap a decoder model so that the KV of retrieved chunks are reused.

    Args:
        model: any decoder-only Hugging Face model with RoPE, loaded and in eval mode. It is not modified.
        tokenizer: the model's tokenizer; its chat template is used when it has one.
        store: a store, or what `open_store` opens, such as `tiered:memory://?max_bytes=2GiB|disk:///var/cache/kv`.
            None takes the environment variable CHUNKCACHE_STORE, and without it 2 GiB of memory.
        policy: which reused tokens are recomputed, such as `link:k=8`; see `chunkcache.blend.POLICIES`.
        tenant: goes into every key (vLLM's `cache_salt`): requests of another tenant never see these chunk KV.
        instruction: stands before the chunks in every prompt.
        lead_in: text that stands before a chunk while it is computed ahead, and in no prompt; None for a packaged
            one. Passages of the kind that a request has before the chunk are best.
        calibration: what `chunkcache calibrate` found, or its file; None looks for it in the cache folder.

    Raises:
        UnsupportedModelError: the model cannot be served right, or fails its self-check.
        TokenizerMismatchError: the tokenizer is not the model's.
        PolicyError, StoreURLError: policy or store are not known.
        CalibrationError: the policy needs a calibration, and there is none or it is damaged.
    """
    return CachedLLM(model, tokenizer, store, policy, tenant, instruction, lead_in, calibration)
