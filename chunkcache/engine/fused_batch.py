"""Prompts that differ in the question alone: fused once, then decoded together over one copy of their KV."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from chunkcache.blend import Plan, Policy, SelectivePrefill, layer_kv
from chunkcache.blend.attention import LOOK_ROWS
from chunkcache.blend.hydragen import KV, SharedCache, over_shared, padded
from chunkcache.engine.contextual import kept
from chunkcache.engine.engine import Engine
from chunkcache.engine.generation import FIXED, FirstTokenClock, Generation, new_tokens, pad_token_id, setting
from chunkcache.engine.served import Served
from chunkcache.engine.stats import RequestStats
from chunkcache.kv.clock import wait_for
from chunkcache.prompt import Prompt


class FusedDecoding:
    """Answers such prompts.

    Args:
        engine: what answers.
        policy: what is recomputed; with nothing left open.
        options: keywords for `generate()`, with a length; see `with_length`.
        looks: whether the policy looks at the question.
    """

    def __init__(self, engine: Engine, policy: Policy, options: dict[str, Any], looks: bool) -> None:
        self._engine, self._policy, self._options, self._looks = engine, policy, options, looks

    def fuse(self, members: Sequence[Prompt], plan: Plan | None, hits: int, served: int) -> Fused:
        """Fuse the shared part of some prompts.

        A policy that looks at the question gets those of all members, one behind the other: it selects once, for them
        all. Others need no more than one token behind the shared part.

        Args:
            members: the prompts.
            plan: that of other members of their group, whose chunks need not be looked up again.
            hits: chunks that were found, or computed, for them.
            served: how many requests it is done for.
        """
        first = members[0]
        asked = tuple(token for prompt in members for token in prompt.question) if self._looks else first.question[:1]
        prompt, shared = first.with_question(asked), first.end
        policy, model_now = self._policy, self._engine.served.current()
        stats = RequestStats(str(policy), chunks=len(first.spans), hits=hits)
        if plan is None:
            plan = model_now.planner.plan(prompt, policy, stats)
        else:
            plan = Plan.of(prompt.token_ids, plan.chunks, plan.prefix)
        prefill = SelectivePrefill(
            model_now.decoder,
            plan,
            policy,
            select=model_now.tuning.selection(policy),
            depth=model_now.tuning.depth(plan),
            record=policy.versioned,
            keep=partial(kept, policy=policy),
            trim=False,
        )
        prefill.cache.look_rows = LOOK_ROWS * len(members)  # as many of each question as of one alone
        before = time.perf_counter()
        wait_for(prefill.run())
        prefill.cache.catch_up(question=False)  # which goes over the fused KV once more, with the others'
        stats.prefill_s = time.perf_counter() - before
        stats.take(plan, prefill)
        if prefill.computed:
            model_now.planner.contextual.store(prompt, policy, prefill.computed)
        pairs = (layer_kv(prefill.cache, index) for index in range(len(prefill.cache.layers)))
        layers = [(keys[0, :, :shared], values[0, :, :shared]) for keys, values in pairs]
        return Fused(model_now, plan, layers, stats, stats.recomputed_share * len(plan) / served)

    def decode(self, members: Sequence[Prompt], fused: Fused, started: float) -> list[Generation]:
        """Prefill the questions over the fused KV and decode, all together, with the model's own `generate()`."""
        engine, options = self._engine, dict(self._options)
        began = time.perf_counter()
        first = members[0]
        tails = [each.question for each in members]
        input_ids, mask, pads = padded(first.token_ids[: first.end], tails, engine.decoder.device)
        room = new_tokens(options, len(first.token_ids))  # where it depends on the prompt, members are as long
        cache = SharedCache(engine.decoder.config, fused.layers, pads, max(map(len, tails)) + room)
        stop_strings, tokenizer = setting(engine.model, options, "stop_strings"), options.get("tokenizer")
        ends = _Ends(options.pop("stopping_criteria", None), stop_strings, tokenizer)
        if setting(engine.model, options, "pad_token_id") is None:
            options["pad_token_id"] = pad_token_id(engine.tokenizer)
        options = {**options, **FIXED}
        model = over_shared(engine.decoder, cache)
        output: Tensor = type(model).generate(
            model,
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([ends]),
            **options,
        )
        output = output.cpu()
        fused.served.library.catch_up()
        eos = setting(engine.model, options, "eos_token_id")
        eos = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
        lengths = ends.lengths(output[:, input_ids.shape[1] :], eos)
        ttft_s = ends.first_token_at - started
        answers = []
        for number, (each, row) in enumerate(zip(members, output, strict=True)):
            token_ids = row[input_ids.shape[1] :].tolist()[: lengths[number]]
            text = str(engine.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()
            stats = replace(fused.share(each), ttft_s=ttft_s, batched=len(members))
            if not number:
                stats.prefill_s += ends.first_token_at - began
            answers.append(Generation(text, token_ids, ttft_s, stats, output[number : number + 1].clone()))
        return answers


@dataclass
class Fused:
    """KV of what a group shares.

    Attributes:
        served: the model that fused it.
        plan: what was reused for them.
        layers: keys and values of each layer, `[kv_heads, tokens, head_dim]` both.
        stats: what it took.
        rows: tokens computed, through all layers, for each request that it serves.
    """

    served: Served
    plan: Plan
    layers: list[KV]
    stats: RequestStats
    rows: float

    def share(self, prompt: Prompt) -> RequestStats:
        """Return the stats of one of the requests; what was done for all of them counts for the first."""
        tokens = len(prompt.token_ids)
        share = min((self.rows + len(prompt.question)) / tokens, 1.0)
        stats = replace(self.stats, tokens=tokens, recomputed_share=share, report=None)  # that is of another prompt
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
