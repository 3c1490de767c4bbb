"""Offline batches: many questions over documents that recur, where throughput counts and not the time to first token.

The requests of a group (`grouping`) share prefix and chunks: these are loaded and fused once, and the questions are
answered together over that one copy (`blend.hydragen`). Prompts that merely begin alike are not grouped.

They share however short the prompt: the alternative is a decoding step for each sequence, which reads the weights
anew. Attention over shared KV cost at worst 0.7 ms a layer more than over copies (2 sequences over 1024 tokens, a
loaded CPU): 21 ms for the 30 layers of a model whose step takes some 50.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from chunkcache.blend import Decoder, FusedCache, Plan, Policy, SelectivePrefill, layer_kv
from chunkcache.blend.hydragen import KV, SharedCache, over_shared, padded
from chunkcache.engine.generation import (
    FirstTokenClock,
    Generation,
    check_options,
    is_assisted,
    needs_finished_cache,
    setting,
)
from chunkcache.engine.grouping import checked, grouped, ordered, reordered, shared_tokens
from chunkcache.engine.planner import Planner
from chunkcache.engine.stats import RequestStats, warn_once
from chunkcache.errors import ContextLengthError, InputError, PromptError
from chunkcache.kv import ContextAttention
from chunkcache.prompt.builder import Prompt

if TYPE_CHECKING:
    from chunkcache.llm import CachedLLM

logger = logging.getLogger("chunkcache")

MAX_BATCH = 8
_ONE_BY_ONE = ("streamer", "return_dict_in_generate", "guidance_scale")
_SEES_PADDING = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "prefix_allowed_tokens_fn")


@dataclass(frozen=True)
class Batch:
    """Requests that are answered together.

    Attributes:
        requests: their indices in the call.
        group: number of their group; all of its requests share prefix and chunks.
        shared_tokens: tokens that they share; 0 for a request that is answered alone.
        kv_bytes: bytes of KV that answering them needs at most, apart from what the store holds.
        done: requests answered after this batch.
        total: requests of the call.
        generations: their answers, in the order of `requests`.
    """

    requests: tuple[int, ...]
    group: int
    shared_tokens: int
    kv_bytes: int
    done: int
    total: int
    generations: tuple[Generation, ...]


OnBatch = Callable[[Batch], None]


@dataclass(frozen=True)
class Limits:
    """What a batch may take: sequences, bytes of KV (None for no bound), new tokens of each, tokens of context."""

    max_batch: int
    max_kv_bytes: int | None
    new_tokens: int
    max_tokens: int


class Batcher:
    """Answers the requests of one call of `CachedLLM.generate_batch`.

    Args:
        llm: what answers.
        decoder: its model.
        planner: plans its requests.
        policy: what is recomputed; with nothing left open.
        options: keywords for `generate()`.
        max_batch: sequences that are decoded together at most.
        max_kv_bytes: bound on the KV of a batch in bytes, or None.
        reorder: whether the chunks of a prompt may be sorted, so that more prompts begin alike.

    Raises:
        PromptError: an option cannot be served in a batch, or is out of range.
    """

    def __init__(
        self,
        llm: CachedLLM,
        decoder: Decoder,
        planner: Planner,
        policy: Policy,
        options: dict[str, Any],
        max_batch: int,
        max_kv_bytes: int | None,
        reorder: bool,
    ) -> None:
        self._llm, self._decoder, self._planner, self._policy = llm, decoder, planner, policy
        self._options = dict(options)
        if setting(llm.model, options, "stop_strings"):
            self._options.setdefault("tokenizer", llm.tokenizer)
        self._reorder = reorder
        new_tokens = self._check(max_batch)
        self._limits = Limits(max_batch, max_kv_bytes, new_tokens, llm.max_tokens)
        layers = len(decoder.layers)
        self._looks = bool(policy.attention_layers(layers) or policy.watched_layers(layers))

    def run(self, requests: Iterable[tuple[Any, ...]], on_batch: OnBatch | None) -> list[Generation]:
        """Answer `requests`; return the answers in their order.

        Under a guard, whose bound is for one question, they are answered one by one.

        Raises:
            PromptError, ContextLengthError: of a request, named by its index, before any is answered.
            InputError: one does not fit `max_kv_bytes`, likewise.
        """
        started = time.perf_counter()
        prompts = self._prompts(requests)
        groups = [self._batches(group, prompts) for group in ordered(grouped(prompts), prompts)]
        together = self._policy.guarded() is None
        if together and any(len(group) > 1 or len(group[0]) > 1 for group in groups) and not self._llm.batches:
            name = type(self._llm.model).__name__
            warn_once(f"{name} cannot decode sequences together: the requests of a batch are answered one by one")
            together = False
        if not together:
            groups = [[[index] for batch in group for index in batch] for group in groups]
        logger.info("%d requests in %d groups, %d batches", len(prompts), len(groups), sum(map(len, groups)))
        answers: dict[int, Generation] = {}
        for number, group in enumerate(groups):
            shares = together and sum(map(len, group)) > 1
            for batch, found in (self._together if shares else self._alone)(group, prompts, started):
                answers.update(zip(batch, found, strict=True))
                if on_batch is not None:
                    shared = shared_tokens(prompts[batch[0]]) if shares else 0
                    needed = self._kv_bytes(batch, prompts)
                    done = len(answers)
                    on_batch(Batch(tuple(batch), number, shared, needed, done, len(prompts), tuple(found)))
        return [answers[index] for index in range(len(prompts))]

    # --- before any work

    def _check(self, max_batch: int) -> int:
        """Return how many new tokens an answer may have; raise for what a batch cannot do."""
        check_options(self._options)
        if max_batch < 1:
            raise PromptError(f"max_batch={max_batch} leaves no sequence to decode; pass 1 or more")
        model = self._llm.model
        for name in _ONE_BY_ONE:
            value = setting(model, self._options, name)
            if value is True or value not in (None, False, 1):  # 1 is no guidance
                raise PromptError(f"{name}= is for one sequence at a time; call generate() for each request")
        for name in _SEES_PADDING:
            if setting(model, self._options, name):
                raise PromptError(
                    f"{name}= would see the padding that stands before a question; leave it out (min_new_tokens= is "
                    "served), or call generate() for each request"
                )
        if needs_finished_cache(model, self._options) or is_assisted(model, self._options):
            raise PromptError(
                "beam search and assisted generation take one sequence; call generate() for each request"
            )
        new_tokens = setting(model, self._options, "max_new_tokens")
        if new_tokens is None or new_tokens < 1:
            raise PromptError(f"max_new_tokens={new_tokens}: a batch needs a length of its answers; pass 1 or more")
        return int(new_tokens)

    def _prompts(self, requests: Iterable[tuple[Any, ...]]) -> list[Prompt]:
        asked = checked(requests)
        prompts = []
        for index, request in enumerate(reordered(asked) if self._reorder else asked):
            try:
                prompt = self._llm.prompts.build(*request)
            except InputError as error:
                raise type(error)(f"request {index}: {error}") from error
            tokens = len(prompt.token_ids)
            if tokens + self._limits.new_tokens > self._limits.max_tokens:
                raise ContextLengthError(
                    f"request {index} has {tokens} tokens, which with {self._limits.new_tokens} new ones do not fit "
                    f"the model's context of {self._limits.max_tokens}; pass fewer or shorter chunks, or lower "
                    "max_new_tokens"
                )
            prompts.append(prompt)
        return prompts

    def _batches(self, group: Sequence[int], prompts: Sequence[Prompt]) -> list[list[int]]:
        """Divide a group into batches that keep to the limits, questions of similar length together."""
        members = sorted(group, key=lambda index: len(prompts[index].question))
        batches: list[list[int]] = []
        for index in members:
            if batches and self._fits([*batches[-1], index], prompts):
                batches[-1].append(index)
                continue
            needed, most = self._kv_bytes([index], prompts), self._limits.max_kv_bytes
            if most is not None and needed > most:
                raise InputError(
                    f"request {index} needs {needed} bytes of KV, more than max_kv_bytes={most}; raise it, or pass "
                    "fewer chunks"
                )
            batches.append([index])
        return batches

    def _fits(self, batch: Sequence[int], prompts: Sequence[Prompt]) -> bool:
        limits = self._limits
        most = limits.max_kv_bytes
        long = shared_tokens(prompts[batch[0]]) + sum(len(prompts[index].question) for index in batch)
        return (
            len(batch) <= limits.max_batch
            and (most is None or self._kv_bytes(batch, prompts) <= most)
            and (not self._looks or long < limits.max_tokens)
        )

    def _kv_bytes(self, batch: Sequence[int], prompts: Sequence[Prompt]) -> int:
        """Return the bytes of KV that exist at most while a batch is answered."""
        assert self._decoder.heads is not None  # the self-check has run
        per_token = sum(2 * kv_heads * dim for kv_heads, dim in self._decoder.heads) * self._decoder.dtype.itemsize
        questions = [len(prompts[index].question) for index in batch]
        fused = sum(questions) if self._looks else max(questions)  # what stands behind the shared part meanwhile
        own = len(batch) * (max(questions) + self._limits.new_tokens)
        return per_token * (shared_tokens(prompts[batch[0]]) + fused + own)

    # --- the work

    def _alone(
        self, group: Sequence[Sequence[int]], prompts: Sequence[Prompt], started: float
    ) -> Iterator[tuple[Sequence[int], list[Generation]]]:
        for batch in group:
            began = time.perf_counter()
            answer = self._llm.answer(prompts[batch[0]], self._policy, began, dict(self._options))
            answer.stats.ttft_s += began - started
            yield batch, [replace(answer, ttft_s=answer.stats.ttft_s, output=answer.output.cpu())]

    def _together(
        self, group: Sequence[Sequence[int]], prompts: Sequence[Prompt], started: float
    ) -> Iterator[tuple[Sequence[int], list[Generation]]]:
        """Fuse what the group shares, once or, where the policy looks at the questions, for each batch; decode."""
        fused: _Fused | None = None
        size = sum(map(len, group))
        for batch in group:
            members = [prompts[index] for index in batch]
            if fused is None or self._looks:
                plan, hits = (None, 0) if fused is None else (fused.plan, fused.stats.hits)
                fused = None  # its KV go before those of the next are made
                fused = self._fuse(members, plan, hits, len(batch) if self._looks else size)
            yield batch, self._decode(members, fused, started)

    def _fuse(self, members: Sequence[Prompt], plan: Plan | None, hits: int, served: int) -> _Fused:
        """Fuse the shared part of some prompts.

        A policy that looks at the question gets those of all members, one behind the other: it selects once, for them
        all. Others need no more than one token behind the shared part.

        Args:
            members: the prompts.
            plan: that of other members of their group, whose chunks need not be looked up again.
            hits: chunks that were found, or computed, for them.
            served: how many requests it is done for.
        """
        first, shared = members[0], shared_tokens(members[0])
        asked = tuple(t for each in members for t in each.question) if self._looks else first.question[:1]
        prompt = replace(first, question=asked)
        if plan is None:
            plan, stats = self._planner.plan(prompt, self._policy, time.perf_counter())
        else:
            plan = Plan.of(prompt.token_ids, plan.segments, plan.chunks)
            stats = RequestStats(str(self._policy), chunks=len(first.chunks), hits=hits)
        layers: list[KV] = []

        def keep(cache: FusedCache, contexts: dict[int, ContextAttention]) -> None:
            self._planner.remember(prompt, cache.plan, self._policy, cache, contexts)
            for index in range(len(cache.layers)):
                keys, values = layer_kv(cache, index)
                layers.append((keys[0, :, :shared], values[0, :, :shared]))

        depth = self._llm.tuning.depth(plan)
        prefill = SelectivePrefill(self._decoder, plan, self._policy, keep, self._policy.versioned, depth=depth)
        before = time.perf_counter()
        prefill.run()
        stats.prefill_s = time.perf_counter() - before
        stats.take(plan, prefill)
        return _Fused(plan, layers, stats, stats.recomputed_share * len(plan) / served)

    def _decode(self, members: Sequence[Prompt], fused: _Fused, started: float) -> list[Generation]:
        """Prefill the questions over the fused KV and decode, all together, with the model's own `generate()`."""
        llm, options = self._llm, dict(self._options)
        began = time.perf_counter()
        first = members[0]
        shared = shared_tokens(first)
        tails = [each.question for each in members]
        input_ids, mask, pads = padded(first.token_ids[:shared], tails, self._decoder.device)
        cache = SharedCache(self._decoder.config, fused.layers, pads, max(map(len, tails)) + self._limits.new_tokens)
        stop_strings, tokenizer = setting(llm.model, options, "stop_strings"), options.get("tokenizer")
        ends = _Ends(options.pop("stopping_criteria", None), stop_strings, tokenizer)
        if setting(llm.model, options, "pad_token_id") is None:
            options["pad_token_id"] = llm.tokenizer.pad_token_id or llm.tokenizer.eos_token_id
        options = {"use_cache": True, "cache_implementation": None, "prefill_chunk_size": None, **options}
        model = over_shared(self._decoder, cache)
        output: Tensor = type(model).generate(
            model,
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([ends]),
            **options,
        )
        output = output.cpu()
        eos = setting(llm.model, options, "eos_token_id")
        eos = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
        lengths = ends.lengths(output[:, input_ids.shape[1] :], eos)
        ttft_s = ends.first_token_at - started
        answers = []
        for number, (each, row) in enumerate(zip(members, output, strict=True)):
            token_ids = row[input_ids.shape[1] :].tolist()[: lengths[number]]
            text = str(llm.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
            stats = replace(fused.share(each), ttft_s=ttft_s, batched=len(members))
            if not number:
                stats.prefill_s += ends.first_token_at - began
            answers.append(Generation(text, token_ids, ttft_s, stats, output[number : number + 1].clone()))
        return answers


@dataclass
class _Fused:
    """KV of what a group shares.

    Attributes:
        plan: what was reused for them.
        layers: keys and values of each layer, `[kv_heads, tokens, head_dim]` both.
        stats: what it took.
        rows: tokens computed, through all layers, for each request that it serves.
    """

    plan: Plan
    layers: list[KV]
    stats: RequestStats
    rows: float

    def share(self, prompt: Prompt) -> RequestStats:
        """Return the stats of one of the requests; what was done for all of them counts for the first."""
        tokens = len(prompt.token_ids)
        share = min((self.rows + len(prompt.question)) / tokens, 1.0)
        stats = replace(self.stats, tokens=tokens, recomputed_share=share)
        self.stats = RequestStats(
            stats.policy, chunks=stats.chunks, hits=stats.hits + stats.misses, reused_tokens=stats.reused_tokens,
            exact_tokens=stats.exact_tokens,
        )  # fmt: skip
        return stats


class _Ends(StoppingCriteria):
    """Stops each sequence by the caller's criteria, and notes when; also when the first tokens were known."""

    def __init__(self, criteria: Any, stop_strings: Any, tokenizer: Any) -> None:
        self._criteria = [*(criteria or []), *([StopStringCriteria(tokenizer, stop_strings)] if stop_strings else [])]
        self._ended: dict[int, int] = {}
        self._clock = FirstTokenClock()
        self._steps = 0

    @property
    def first_token_at(self) -> float:
        """When the first token of all sequences was known, by `time.perf_counter`."""
        return self._clock.first_token_at or time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return, for each sequence, whether it is over."""
        self._steps += 1
        over = self._clock(input_ids, scores)
        for criterion in self._criteria:
            over = over | criterion(input_ids, scores, **kwargs)
        for row in over.nonzero()[:, 0].tolist():
            self._ended.setdefault(row, self._steps)
        return over

    def lengths(self, new_ids: Tensor, eos: Sequence[int]) -> list[int]:
        """Return how many of the new ids `[sequences, tokens]` each sequence has, the one that ended it included."""
        lengths = []
        for number, row in enumerate(new_ids.tolist()):
            at_eos = next((at + 1 for at, token in enumerate(row) if token in eos), len(row))
            lengths.append(min(at_eos, self._ended.get(number, len(row))))
        return lengths
