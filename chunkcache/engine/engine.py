"""From a prompt to its first token and to an answer: plan, selective prefill, decoding by the model's `generate()`.

The model is never modified; after every call it is as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import StoppingCriteriaList

from chunkcache.blend import Decoder, Plan, Policy, SelectivePrefill, parse_policy
from chunkcache.deprecated import warn_renamed
from chunkcache.engine.generation import (
    FIXED,
    FirstTokenClock,
    Generation,
    check_keywords,
    check_options,
    needs_finished_cache,
    new_tokens,
    pad_token_id,
    setting,
    take_policy,
    with_length,
)
from chunkcache.engine.padding import hold_back, padded
from chunkcache.engine.planner import Planner
from chunkcache.engine.served import Served, ServedModel
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.streaming import TextStream
from chunkcache.engine.tuning import Tuning
from chunkcache.errors import InputError
from chunkcache.kv import ChunkKV
from chunkcache.kv.clock import wait_for
from chunkcache.library import ChunkLibrary
from chunkcache.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PrefillOutput:
    """A prompt whose prefill is done.

    Attributes:
        logits: of the next token, `[vocab]`.
        past_key_values: keys and values of the whole prompt, an ordinary transformers cache.
        input_ids: the prompt, `[1, tokens]`.
        stats: what the request did.
    """

    logits: Tensor
    past_key_values: Cache
    input_ids: Tensor
    stats: RequestStats

    @property
    def cache(self) -> Cache:
        """Deprecated: `past_key_values`."""
        warn_renamed("PrefillOutput.cache", "PrefillOutput.past_key_values")
        return self.past_key_values


@dataclass(frozen=True)
class PreparedRequest:
    """A prompt that is to be served: under which policy, with which keywords of `generate()`, and when it came.

    Attributes:
        prompt: the prompt.
        policy: what is recomputed, with nothing left open.
        options: keywords for `generate()`.
        started: when the request came, by `time.perf_counter`.
        adapter: the adapter that is active meanwhile; None for the one that is.
        tokenize_s: seconds that making it took.
        watched: whether to keep what the question looked at, for `PromptReport.attention`.
    """

    prompt: Prompt
    policy: Policy
    options: dict[str, Any]
    started: float
    adapter: str | None = None
    tokenize_s: float = 0.0
    watched: bool = False


class Engine:
    """Serves prompts on one model.

    Args:
        served: the model.
        tokenizer: its tokenizer.
        policy: the policy of requests that name none.
        pad: seconds to a multiple of which the first token is held back; None for not at all.

    Attributes:
        served: as given.
        policy: as given; may be changed.
        pad: as given.
    """

    def __init__(
        self, served: ServedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, pad: float | None = None
    ) -> None:
        self.served, self.tokenizer, self.policy, self.pad = served, tokenizer, policy, pad
        self.model: Any = served.model

    @property
    def decoder(self) -> Decoder:
        """The model as it was last served; a request looks at it anew."""
        return self.served.latest.decoder

    @property
    def library(self) -> ChunkLibrary:
        """Where chunk KV of the model, as it was last served, come from."""
        return self.served.latest.library

    @property
    def tuning(self) -> Tuning:
        """What was measured for the model as it was last served."""
        return self.served.latest.tuning

    @property
    def planner(self) -> Planner:
        """What plans requests to the model as it was last served."""
        return self.served.latest.planner

    @cached_property
    def can_batch(self) -> bool:
        """Whether this model can decode sequences together over one copy of shared KV; tried out once."""
        from chunkcache.blend.hydragen import can_share

        return can_share(self.decoder)

    def resolve_policy(self, policy: str | Policy | None) -> Policy:
        """Return the policy of a call, the engine's if it names none, with nothing left open.

        Raises:
            PolicyError: the policy is unknown.
            CalibrationError: it needs a calibration that there is none of.
        """
        return self.tuning.resolve(self.policy if policy is None else parse_policy(policy))

    def prepare(
        self,
        build: Callable[[], Prompt],
        policy: str | Policy | None = None,
        max_new_tokens: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> PreparedRequest:
        """Check what is asked for and build the prompt; the request's time counts from here.

        The adapter is one of the options, and so may be `reuse="exact"` instead of a policy.

        Raises:
            InputError: an option is unknown, or makes no sense for one sequence.
            PromptError, PolicyError, CalibrationError: prompt or policy cannot be used.
        """
        started = time.perf_counter()
        options = dict(options or {})
        adapter = options.pop("adapter", None)
        policy = take_policy(options, policy)
        check_options(options)
        check_keywords(self.model, options)
        resolved = self.resolve_policy(policy)
        options = with_length(self.model, options, max_new_tokens)
        prompt = build()
        return PreparedRequest(prompt, resolved, options, started, adapter, time.perf_counter() - started)

    def prefill(self, request: PreparedRequest, drop_last: bool = False) -> PrefillOutput:
        """Prefill a prompt.

        Args:
            request: the prompt and its policy.
            drop_last: leave the last token's KV out of the cache, for a `generate()` that starts with that token.
        """
        return self.prefilled(request, drop_last)[0]

    def prefilled(self, request: PreparedRequest, drop_last: bool = False) -> tuple[PrefillOutput, Served]:
        """Prefill as `prefill` does; return what belongs to the model that it was done with, too."""
        with self.served.session(request.adapter) as served:
            plan, stats = self._plan(served, request)
            output = self._prefill(served, request, plan, stats, drop_last)
        hold_back(request.started, self.pad)
        return output, served

    def generate(self, request: PreparedRequest) -> Generation:
        """Prefill a prompt and decode with the model's own `generate()`."""
        return self.answer(request)[0]

    def stream(
        self, request: PreparedRequest, answer: Callable[[PreparedRequest], Generation] | None = None
    ) -> TextStream:
        """Answer in another thread, piece by piece.

        Args:
            request: the prompt, its policy and options.
            answer: what runs there, for a caller that goes on with the answer; None for `generate`.

        Raises:
            InputError: a keyword, or a generation config, asks for beam search.
        """
        if needs_finished_cache(self.model, request.options):
            raise InputError("num_beams: beam search knows its answer at the end alone; call generate(), or pass 1")
        answer = answer or self.generate

        def run(streamer: Any, stop: Any) -> Generation:
            criteria = [*(request.options.get("stopping_criteria") or []), stop]
            options = {**request.options, "streamer": streamer, "stopping_criteria": criteria}
            return answer(replace(request, options=options))

        return TextStream(self.tokenizer, run)

    def answer(self, request: PreparedRequest) -> tuple[Generation, Cache]:
        """Answer as `generate` does; return the cache of prompt and answer, too."""
        with self.served.session(request.adapter) as served:
            return self._answer(served, request)

    def generate_options(self, options: dict[str, Any], clock: FirstTokenClock) -> dict[str, Any]:
        """Return the keywords for `generate()` with what every answer needs."""
        options = {**options, **FIXED}
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), clock])
        if setting(self.model, options, "pad_token_id") is None:
            options["pad_token_id"] = pad_token_id(self.tokenizer)
        if setting(self.model, options, "stop_strings"):
            options.setdefault("tokenizer", self.tokenizer)
        return options

    # --- the steps

    def _answer(self, served: Served, request: PreparedRequest) -> tuple[Generation, Cache]:
        room = new_tokens(request.options, len(request.prompt.token_ids))
        plan, stats = self._plan(served, request, room)
        clock = FirstTokenClock(served.library.catch_up)
        options = padded(self.generate_options(request.options, clock), clock, request.started, self.pad)
        before = time.perf_counter()
        finished = needs_finished_cache(self.model, options)
        if finished:
            output, cache = self._decode_finished(served, request, plan, stats, options)
        else:
            prefill = self._selective(served, request, plan)
            input_ids = prefill.input_ids
            output = prefill.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
            cache = prefill.cache
            stats.take(plan, prefill, request.watched)
            self._store(served, request, prefill.computed)
            served.library.catch_up()
        first_token_at = clock.first_token_at or time.perf_counter()
        stats.prefill_s, stats.ttft_s = first_token_at - before, first_token_at - request.started
        if not finished:
            served.tuning.observe(stats)
        sequence = output if isinstance(output, Tensor) else output.sequences
        token_ids = sequence[0, len(plan) :].tolist()
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        return Generation(text.strip(), token_ids, stats.ttft_s, stats, output), cache

    def _plan(self, served: Served, request: PreparedRequest, room: int = 1) -> tuple[Plan, RequestStats]:
        stats = RequestStats(str(request.policy), tokenize_s=request.tokenize_s)
        stats.queue_s = max(0.0, time.perf_counter() - request.started - request.tokenize_s)
        return served.planner.plan(request.prompt, request.policy, stats, room), stats

    def _prefill(
        self, served: Served, request: PreparedRequest, plan: Plan, stats: RequestStats, drop_last: bool = False
    ) -> PrefillOutput:
        before = time.perf_counter()
        prefill = self._selective(served, request, plan)
        logits = prefill.run(drop_last)
        wait_for(logits)
        now = time.perf_counter()
        stats.prefill_s, stats.ttft_s = now - before, now - request.started
        stats.take(plan, prefill, request.watched)
        served.tuning.observe(stats)
        self._store(served, request, prefill.computed)
        served.library.catch_up()
        return PrefillOutput(logits, prefill.cache, prefill.input_ids, stats)

    def _decode_finished(
        self, served: Served, request: PreparedRequest, plan: Plan, stats: RequestStats, options: dict[str, Any]
    ) -> tuple[Any, Cache]:
        """Prefill all but the last token, and decode several copies of the prompt side by side."""
        prefilled = self._prefill(served, request, plan, stats, drop_last=True)
        cache: Any = prefilled.past_key_values
        cache.batch_repeat_interleave(setting(self.model, options, "num_beams") or 1)
        return self.model.generate(**model_inputs(prefilled), **options), cache

    def _selective(self, served: Served, request: PreparedRequest, plan: Plan) -> SelectivePrefill:
        policy = request.policy
        keep = None
        if (policy.stores_in_context or policy.versioned) and request.prompt.head is None:
            from chunkcache.engine.contextual import kept

            keep = partial(kept, policy=policy)
        return SelectivePrefill(
            served.decoder,
            plan,
            policy,
            select=served.tuning.selection(policy),
            depth=served.tuning.depth(plan),
            record=policy.versioned,
            keep=keep,
        )

    @staticmethod
    def _store(served: Served, request: PreparedRequest, computed: dict[int, ChunkKV]) -> None:
        if computed:
            served.planner.contextual.store(request.prompt, request.policy, computed)


def model_inputs(prefilled: PrefillOutput) -> dict[str, Any]:
    """Return the keywords for a plain `generate()` that goes on from a prefill whose last token was dropped."""
    input_ids = prefilled.input_ids
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, "past_key_values": prefilled.past_key_values}
