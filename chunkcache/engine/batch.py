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
from typing import Any

from chunkcache.blend import Policy
from chunkcache.engine.engine import Engine, PreparedRequest
from chunkcache.engine.fused_batch import Fused, FusedDecoding
from chunkcache.engine.generation import (
    Generation,
    check_keywords,
    check_options,
    is_assisted,
    needs_finished_cache,
    new_tokens,
    setting,
)
from chunkcache.engine.grouping import checked, grouped, ordered, reordered
from chunkcache.errors import ContextLengthError, InputError
from chunkcache.library.registry import warn_once
from chunkcache.prompt import Prompt, PromptBuilder

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
    """Bounds of a batch.

    Attributes:
        max_batch: sequences that are decoded together at most.
        max_kv_bytes: bytes of KV that a batch may need, apart from what the store holds; None for no bound.
    """

    max_batch: int = MAX_BATCH
    max_kv_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise InputError(f"max_batch={self.max_batch} leaves no sequence to decode; pass 1 or more")


class Batcher:
    """Answers the requests of one call of `CachedLLM.generate_batch`.

    Args:
        engine: what answers.
        prompts: builds the prompts.
        policy: what is recomputed; with nothing left open.
        options: keywords for `generate()`.
        limits: what a batch may take.
        reorder: whether the chunks of a prompt may be sorted, so that more prompts begin alike.

    Raises:
        InputError: an option cannot be served in a batch, or is out of range.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: PromptBuilder,
        policy: Policy,
        options: dict[str, Any],
        limits: Limits,
        reorder: bool,
    ) -> None:
        self._engine, self._prompt_builder, self._policy, self._limits = engine, prompts, policy, limits
        self._options = dict(options)
        self._adapter = self._options.pop("adapter", None)
        if setting(engine.model, options, "stop_strings"):
            self._options.setdefault("tokenizer", engine.tokenizer)
        self._reorder = reorder
        self._check()
        layers = len(engine.decoder.layers)
        self._looks = bool(policy.attention_layers(layers) or policy.watched_layers(layers))
        self._fused = FusedDecoding(engine, policy, self._options, self._looks)

    def run(self, requests: Iterable[tuple[Any, ...]], on_batch: OnBatch | None) -> list[Generation]:
        """Answer `requests`; return the answers in their order.

        Under a guard, whose bound is for one question, they are answered one by one.

        Raises:
            InputError, ContextLengthError: of a request, named by its index, before any is answered.
            InputError: one does not fit `max_kv_bytes`, likewise.
        """
        started = time.perf_counter()
        prompts = self._prompts(requests)
        groups = [self._batches(group, prompts) for group in ordered(grouped(prompts), prompts)]
        together = self._policy.guarded() is None
        if together and any(len(group) > 1 or len(group[0]) > 1 for group in groups) and not self._engine.can_batch:
            name = type(self._engine.model).__name__
            warn_once(f"{name} cannot decode sequences together: the requests of a batch are answered one by one")
            together = False
        if not together:
            groups = [[[index] for batch in group for index in batch] for group in groups]
        logger.info("%d requests in %d groups, %d batches", len(prompts), len(groups), sum(map(len, groups)))
        answers: dict[int, Generation] = {}
        with self._engine.served.session(self._adapter):
            for number, group in enumerate(groups):
                shares = together and sum(map(len, group)) > 1
                for batch, found in (self._together if shares else self._alone)(group, prompts, started):
                    answers.update(zip(batch, found, strict=True))
                    if on_batch is not None:
                        shared = prompts[batch[0]].end if shares else 0
                        needed = self._kv_bytes(batch, prompts)
                        done = len(answers)
                        on_batch(Batch(tuple(batch), number, shared, needed, done, len(prompts), tuple(found)))
        return [answers[index] for index in range(len(prompts))]

    # --- before any work

    def _check(self) -> None:
        """Raise for what a batch cannot do."""
        model = self._engine.model
        check_options(self._options)
        check_keywords(model, self._options)
        for name in _ONE_BY_ONE:
            value = setting(model, self._options, name)
            if value is True or value not in (None, False, 1):  # 1 is no guidance
                raise InputError(f"{name}= is for one sequence at a time; call generate() for each request")
        for name in _SEES_PADDING:
            if setting(model, self._options, name):
                raise InputError(
                    f"{name}= would see the padding that stands before a question; leave it out (min_new_tokens= is "
                    "served), or call generate() for each request"
                )
        if needs_finished_cache(model, self._options) or is_assisted(model, self._options):
            raise InputError(
                "beam search and assisted generation take one sequence; call generate() for each request"
            )

    def _prompts(self, requests: Iterable[tuple[Any, ...]]) -> list[Prompt]:
        asked = checked(requests)
        prompts = []
        for index, request in enumerate(reordered(asked) if self._reorder else asked):
            try:
                prompt = self._prompt_builder.build(*request)
                tokens = len(prompt.token_ids)
                room = new_tokens(self._options, tokens)
            except InputError as error:
                raise type(error)(f"request {index}: {error}") from error
            if tokens + room > self._engine.decoder.max_tokens:
                raise ContextLengthError(
                    f"request {index} has {tokens} tokens, which with {room} new ones do not fit "
                    f"the model's context of {self._engine.decoder.max_tokens}; pass fewer or shorter chunks, or "
                    "pass a lower max_new_tokens"
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
        long = prompts[batch[0]].end + sum(len(prompts[index].question) for index in batch)
        # An answer that ends at `max_length` has as many tokens as the prompt leaves.
        alike = self._options.get("max_length") is None or len({len(prompts[index].question) for index in batch}) == 1
        return (
            alike
            and len(batch) <= limits.max_batch
            and (most is None or self._kv_bytes(batch, prompts) <= most)
            and (not self._looks or long < self._engine.decoder.max_tokens)
        )

    def _kv_bytes(self, batch: Sequence[int], prompts: Sequence[Prompt]) -> int:
        """Return the bytes of KV that exist at most while a batch is answered."""
        questions = [len(prompts[index].question) for index in batch]
        fused = sum(questions) if self._looks else max(questions)  # what stands behind the shared part meanwhile
        room = max(new_tokens(self._options, len(prompts[index].token_ids)) for index in batch)
        own = len(batch) * (max(questions) + room)
        return self._engine.decoder.kv_bytes_per_token * (prompts[batch[0]].end + fused + own)

    # --- the work

    def _alone(
        self, group: Sequence[Sequence[int]], prompts: Sequence[Prompt], started: float
    ) -> Iterator[tuple[Sequence[int], list[Generation]]]:
        for batch in group:
            began = time.perf_counter()
            request = PreparedRequest(prompts[batch[0]], self._policy, dict(self._options), began)
            answer = self._engine.generate(request)
            answer.stats.ttft_s += began - started
            yield batch, [replace(answer, ttft_s=answer.stats.ttft_s, output=answer.output.cpu())]

    def _together(
        self, group: Sequence[Sequence[int]], prompts: Sequence[Prompt], started: float
    ) -> Iterator[tuple[Sequence[int], list[Generation]]]:
        """Fuse what the group shares, once or, where the policy looks at the questions, for each batch; decode."""
        fused: Fused | None = None
        size = sum(map(len, group))
        for batch in group:
            members = [prompts[index] for index in batch]
            stale = fused is None or fused.served is not self._engine.served.current()
            if fused is None or stale or self._looks:
                plan, hits = (None, 0) if fused is None or stale else (fused.plan, fused.stats.hits)
                fused = None  # its KV go before those of the next are made
                fused = self._fused.fuse(members, plan, hits, len(batch) if self._looks else size)
            yield batch, self._fused.decode(members, fused, started)
