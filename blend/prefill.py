"""Selective prefill: the first forward of a fused cache computes only the rows a policy selects.

It runs on a shadow of the model. The first forward that is handed the fused cache has its input cut to those
rows, with their positions and a mask to match. For a policy with check layers, the rows are cut again at these
layers. Every later forward passes through untouched: the shadow then is the model.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkcache.blend.attention import Watch
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.guard import Guarded, GuardModel, rows_within_bound
from chunkcache.blend.loader import LEAST_DEPTH
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Check, Policy
from chunkcache.blend.record import Recorder
from chunkcache.blend.scout import scout
from chunkcache.errors import CalibrationError, EntryLostError, PolicyError, PromptError
from chunkcache.kv import ContextAttention

logger = logging.getLogger("chunkcache")
OnPrefilled = Callable[[FusedCache, dict[int, ContextAttention]], None]


class SelectivePrefill:
    """One selective prefill of `plan` under `policy`: `run` it, or let `generate` do it on its way.

    Args:
        decoder: the model.
        plan: what is reused where.
        policy: what is recomputed.
        on_prefilled: called with the cache when it is complete, before sliding-window layers are trimmed, and with
            what each chunk that was computed whole looked at, by its start, if that is recorded.
        record: whether it is.
        guard: predicts the error of a policy that is guarded.
        depth: layers that are loaded ahead of the one that is computed.

    Attributes:
        model: a shadow of the model, which serves this one prefill and what is decoded from it.
        cache: the `FusedCache` to pass as `past_key_values`; after the prefill, an ordinary cache.
        guarded: what the guard did, after the prefill of a guarded policy.
        recompute_s: seconds in the decoder layers, without what the cache assembled and what selection took.
        head_s: seconds from the end of the last layer to the logits.
        reused_tokens: tokens that stored KV are put in place for.
        exact_tokens: of these, tokens whose stored KV is what a full prefill would compute.
        lost: chunks whose stored KV proved damaged or gone during the prefill, and which it computed instead.

    Raises:
        PolicyError: the policy has a check layer that the model has not.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        policy: Policy,
        on_prefilled: OnPrefilled | None = None,
        record: bool = False,
        guard: GuardModel | None = None,
        depth: int = LEAST_DEPTH,
    ) -> None:
        count = len(decoder.layers)
        deepest = max((*policy.filter_layers(count), *policy.watched_layers(count)), default=0)
        if deepest >= count:
            raise PolicyError(
                f"policy {policy} checks layer {deepest}, but the model has {count} layers, 0 to {count - 1}"
            )
        self._decoder = decoder.shadow()
        self._policy = policy
        self._on_prefilled = on_prefilled
        self._record = record
        self._guard = guard
        self.guarded: Guarded | None = None
        self._recorder: Recorder | None = None
        self._handles: list[RemovableHandle | Watch] = []
        self.model: Any = self._decoder.model
        self.lost = 0
        self.recompute_s = self.head_s = 0.0
        self._count(plan)
        self.cache = FusedCache(decoder.config, plan, decoder.rotaries, depth)
        self._prompt = len(plan)
        self._own_forward = self.model.__dict__.get("forward")
        self._forward = self.model.forward
        self.model.forward = functools.wraps(self._forward)(lambda *args, **kwargs: self._prefill(*args, **kwargs))

    def run(self) -> Tensor:
        """Prefill, and return the logits `[vocab]` of the next token."""
        ids = torch.tensor([self.cache.plan.token_ids])
        return self._decoder.prefill(ids, self.cache)[0]

    def generate(self, *args: Any, **options: Any) -> Any:
        """Prefill and decode: the class's own `generate()`, whatever stands in front of it on the model."""
        return type(self.model).generate(self.model, *args, past_key_values=self.cache, **options)

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the shadow's forward until it is handed the cache; compute what is selected then."""
        if kwargs.get("past_key_values") is not self.cache:
            return self._forward(*args, **kwargs)
        self._give_forward_back()
        input_ids = args[0] if args else kwargs["input_ids"]
        clock = _LayersClock(self._decoder.layers[-1])
        try:
            while True:
                try:
                    output = self._forward(**{**kwargs, **self._cut(input_ids)})
                    break
                except EntryLostError as lost:  # the store has counted it; its chunk is computed here and now
                    self._remove_hooks()
                    self.cache.start_over(self._without_lost())
                    logger.info("%s; %d chunks are computed with the prompt", lost, self.lost)
        finally:
            clock.handle.remove()
            self._remove_hooks()
            self.cache.stop_loading()
        self.head_s = time.perf_counter() - clock.done
        self.recompute_s = clock.done - clock.started - self.cache.assemble_s - self.cache.select_s
        self._finish()
        return output

    def _give_forward_back(self) -> None:
        """From here on, the shadow does what the model would."""
        if self._own_forward is not None:
            self.model.forward = self._own_forward
        else:
            del self.model.forward

    def _cut(self, input_ids: Tensor) -> dict[str, Any]:
        """Return the input of the forward that computes the selected rows only; hook what narrows and records it."""
        plan = self.cache.plan = _extended(self.cache.plan, input_ids)
        policy, decoder = self._policy, self._decoder
        rows = self._rows(plan, self._prompt)
        self.cache.go_on_with(rows)
        if self._record:
            self._recorder = Recorder(decoder, plan, rows)
        narrows = len(plan.inexact) > 0 and policy.filter_layers(len(decoder.layers))
        if narrows and not (self._recorder and self._recorder.spans):  # a record needs its rows in every layer
            self._handles += _Narrowing(decoder, policy, self.cache).hook()
        on_device = self.cache.rows_on(input_ids.device)
        return {
            "input_ids": input_ids.index_select(1, on_device),
            "position_ids": on_device[None],
            "attention_mask": decoder.masks(on_device, len(plan)),
        }

    def _without_lost(self) -> Plan:
        """Return the plan without the segments whose KV cannot be had; those of the others are all loaded now."""
        plan = self.cache.plan
        kept = []
        for segment in plan.segments:
            try:
                kept.append(replace(segment, kv=segment.kv.loaded()))
            except EntryLostError:
                continue
        self.lost += len(plan.segments) - len(kept)
        return self._count(Plan.of(plan.token_ids, kept, plan.chunks))

    def _rows(self, plan: Plan, prompt: int) -> Tensor:
        """Return the sorted positions that the forward computes, `prompt` tokens being the prompt's own."""
        policy, decoder = self._policy, self._decoder
        bound = policy.guarded()
        layers = policy.attention_layers(len(decoder.layers)) if len(plan.inexact) else ()
        if layers and bound is not None:  # how far it is from the bound is to be seen in any case
            if self._guard is None:
                raise CalibrationError(f"policy {policy} needs a calibration of this model: run chunkcache calibrate")
            rows, self.guarded = rows_within_bound(
                decoder, plan, prompt, self.cache, policy.escalation(), bound, self._guard
            )
            return rows
        with self.cache.selecting():
            if layers and policy.wants_attention(plan):
                selected = policy.select_by_attention(plan, scout(decoder, plan, self.cache, layers, policy.pool))
            else:
                selected = policy.select(plan)
        return torch.cat((plan.fresh, selected)).sort().values

    def _count(self, plan: Plan) -> Plan:
        """Take note of how much `plan` reuses, and return it."""
        self.reused_tokens = sum(segment.length for segment in plan.segments)
        self.exact_tokens = sum(segment.length for segment in plan.segments if segment.exact)
        return plan

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recorder is not None:
            self._recorder.remove()

    def _finish(self) -> None:
        """Make the cache an ordinary one."""
        self.cache.prefilled = True
        if self._on_prefilled is not None:
            self._on_prefilled(self.cache, {} if self._recorder is None else self._recorder.contexts())
        self.cache.trim()
        self.cache.plan = Plan(self.cache.plan.token_ids)  # lets go of the stored KV


def _extended(plan: Plan, input_ids: Tensor) -> Plan:
    """Return the plan, with what assisted generation may have put behind the prompt to verify in one forward."""
    ids = tuple(input_ids[0].tolist())
    if input_ids.shape[0] != 1 or ids[: len(plan)] != plan.token_ids:
        raise PromptError(
            f"the model was given input of shape {tuple(input_ids.shape)} where the plan has one sequence of "
            f"{len(plan)} tokens; prefill the cache first and pass it on to this mode of generate()"
        )
    return plan if len(ids) == len(plan) else Plan.of(ids, plan.segments, plan.chunks)


class _LayersClock:
    """Notes when the last layer was done; host time, which on an accelerator runs ahead of the work."""

    def __init__(self, last: nn.Module) -> None:
        self.started = self.done = time.perf_counter()
        self.handle = last.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.done = time.perf_counter()


class _Narrowing:
    """Hooks that cut the rows again at a policy's check layers, and in every layer above."""

    def __init__(self, decoder: Decoder, policy: Policy, cache: FusedCache) -> None:
        self._decoder = decoder
        self._policy = policy
        self._cache = cache
        self._checks = frozenset(policy.filter_layers(len(decoder.layers)))
        self._attention: list[Tensor] = []
        self._kept: Tensor | None = None  # indices into the rows that the model started with
        self._masks: Any = None

    def hook(self) -> list[RemovableHandle | Watch]:
        """Register on every layer from the first check layer on, and where the question is watched."""
        handles: list[RemovableHandle | Watch] = [
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            for index, layer in enumerate(self._decoder.layers)
            if index >= min(self._checks)
        ]
        question = len(self._cache.plan) - self._cache.plan.end
        for index in self._policy.watched_layers(len(self._decoder.layers)):
            handles.append(Watch(self._decoder.attentions[index], question, self._see))
        return handles

    def _see(self, weights: Tensor, first: int) -> None:
        self._attention.append(self._policy.pool(weights.float()))

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._kept is not None:  # the model's own loop still passes what fits the rows it started with
            kwargs = self._cut(index, kwargs, self._kept)
        if index in self._checks:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            kv = partial(self._cache.probe, layer, index, args, kwargs)
            rows = self._cache.rows_on(hidden.device)
            check = Check(self._cache.plan, index, len(self._decoder.layers), rows, self._attention, kv)
            with self._cache.selecting():
                keep = self._policy.filter_rows(check)
            if keep is not None:
                self._kept = keep if self._kept is None else self._kept[keep]
                self._cache.go_on_with(self._cache.rows[keep.cpu()])
                self._masks = self._decoder.masks(self._cache.rows_on(keep.device), len(self._cache.plan))
                kwargs = self._cut(index, kwargs, keep)
                hidden = hidden.index_select(1, keep)
                if "hidden_states" in kwargs:
                    kwargs["hidden_states"] = hidden
                else:
                    args = (hidden, *args[1:])
        return args, kwargs

    def _cut(self, index: int, kwargs: dict[str, Any], keep: Tensor) -> dict[str, Any]:
        cos, sin = kwargs["position_embeddings"]
        keep = keep.to(cos.device)
        return {
            **kwargs,
            "position_embeddings": (cos.index_select(1, keep), sin.index_select(1, keep)),
            "position_ids": self._cache.rows_on(cos.device)[None],
            "attention_mask": self._decoder.mask(index, self._masks),
        }
