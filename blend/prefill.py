"""Selective prefill: the first forward of a fused cache computes only the rows a policy selects.

It runs on a shadow of the model. The first forward that is handed the fused cache has its input cut to those rows,
with their positions and a mask to match. For a policy with filter layers, the rows are cut again at these layers.
Where nothing is reused, the first forward is the model's own. Every later forward passes through untouched: the
shadow then is the model.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicSlidingWindowLayer

from chunkcache.blend.attention import Watch
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.carried import LAST, CarriedRows
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.filtering import RowFilter
from chunkcache.blend.last import LastLayer
from chunkcache.blend.later import Later
from chunkcache.blend.loader import LEAST_DEPTH
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.blend.scout import scout, scout_layers
from chunkcache.errors import CalibrationError, EntryLostError, PolicyError, PromptError
from chunkcache.kv import ChunkKV, Span
from chunkcache.kv.clock import Mark, StageClock

if TYPE_CHECKING:
    from chunkcache.blend.guard import Guarded
    from chunkcache.blend.record import Recorder

logger = logging.getLogger("chunkcache")
SelectRows = Callable[[Decoder, Plan, int, FusedCache, Policy], Tensor]


class SelectivePrefill:
    """One selective prefill of `plan` under `policy`: `run` it, or let `generate` do it on its way.

    Args:
        decoder: the model.
        plan: what is reused where.
        policy: what is recomputed.
        select: selects the rows; for a guarded policy a `GuardedSelection`.
        depth: layers that are loaded ahead of the one that is computed.
        record: whether to record what each chunk that is computed whole looks at.
        keep: says of which chunks a copy of the KV is wanted as they came out of the prefill; see `computed`.
        trim: whether sliding-window layers forget at the end what lies before their window.

    Attributes:
        model: a shadow of the model, which serves this one prefill and what is decoded from it.
        cache: the `FusedCache` to pass as `past_key_values`; after the prefill, an ordinary cache.
        guarded: what a `GuardedSelection` did; None without one.
        computed: KV of the chunks that were to be kept, by their position in the prompt.
        reused_tokens: tokens that stored KV are put in place for.
        exact_tokens: of these, tokens whose stored KV is what a full prefill would compute.
        reused_at: where the spans start that stored KV are put in place for.
        lost: chunks whose stored KV proved damaged or gone during the prefill, and which it computed instead.

    Raises:
        PolicyError: the policy has a filter layer that the model has not.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        policy: Policy,
        *,
        select: SelectRows | None = None,
        depth: int = LEAST_DEPTH,
        record: bool = False,
        keep: Callable[[Span], bool] | None = None,
        trim: bool = True,
    ) -> None:
        count = len(decoder.layers)
        deepest = max((*policy.filter_layers(count), *policy.watched_layers(count)), default=0)
        if deepest >= count:
            raise PolicyError(
                f"policy {policy} filters at layer {deepest}, but the model has {count} layers, 0 to {count - 1}"
            )
        self._base = decoder
        self._decoder = decoder.shadow()
        self._policy = policy
        self._select: Any = select or select_rows
        self._record, self._keep, self._trim = record, keep, trim
        self._drop_last = False
        self._recorder: Recorder | None = None
        self._handles: list[RemovableHandle | Watch] = []
        self.model: Any = self._decoder.model
        self.computed: dict[int, ChunkKV] = {}
        self.lost = 0
        self._marks: tuple[Mark, Mark, Mark] | None = None
        self._count(plan)
        self.cache = FusedCache(
            decoder.config, plan, decoder.rotaries, depth, policy.shift(), StageClock(decoder.device)
        )
        self._prompt_tokens = len(plan)
        self._own_forward = self.model.__dict__.get("forward")
        self._forward = self.model.forward
        self.model.forward = functools.wraps(self._forward)(lambda *args, **kwargs: self._prefill(*args, **kwargs))

    @property
    def guarded(self) -> Guarded | None:
        """The outcome of the guard."""
        return getattr(self._select, "outcome", None)

    @property
    def recompute_s(self) -> float:
        """Seconds in the decoder layers, without what the cache assembled and what selection took."""
        if self._marks is None:
            return 0.0
        cache = self.cache
        return cache.clock.between(self._marks[0], self._marks[1]) - cache.assemble_s - cache.select_s

    @property
    def head_s(self) -> float:
        """Seconds from the end of the last layer to the logits."""
        return 0.0 if self._marks is None else self.cache.clock.between(self._marks[1], self._marks[2])

    def run(self, drop_last: bool = False) -> Tensor:
        """Prefill, and return the logits `[vocab]` of the next token.

        Args:
            drop_last: leave the last token's KV out, for a `generate()` that starts with that token.
        """
        self._drop_last = drop_last
        return self._decoder.prefill(self.input_ids, self.cache)[0]

    @cached_property
    def input_ids(self) -> Tensor:
        """The prompt's ids `[1, tokens]` on the model's device, copied there once."""
        ids = torch.tensor([self.cache.plan.token_ids])
        return ids.to(self._decoder.device, non_blocking=True)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Prefill and decode: the class's own `generate()`, whatever stands in front of it on the model."""
        return type(self.model).generate(self.model, *args, past_key_values=self.cache, **options)

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the shadow's forward until it is handed the cache; compute what is selected then."""
        if kwargs.get("past_key_values") is not self.cache:
            return self._forward(*args, **kwargs)
        self._restore_forward()
        input_ids = args[0] if args else kwargs["input_ids"]
        clock = _LayersClock(self._decoder.layers[-1], self.cache.clock)
        try:
            while True:
                try:
                    output = self._forward(**{**kwargs, **self._cut(input_ids, kwargs.get("logits_to_keep"))})
                    break
                except EntryLostError as lost:  # the store has counted it; its chunk is computed here and now
                    self._remove_hooks()
                    self.cache.start_over(self._without_lost())
                    logger.info("%s; %d chunks are computed with the prompt", lost, self.lost)
        finally:
            clock.handle.remove()
            self._remove_hooks()
            self.cache.stop_loading()
        self._marks = clock.started, clock.done, self.cache.clock.mark()
        self._finish()
        return output

    def _restore_forward(self) -> None:
        """From here on, the shadow does what the model would."""
        if self._own_forward is not None:
            self.model.forward = self._own_forward
        else:
            del self.model.forward

    def _cut(self, input_ids: Tensor, wanted: Any) -> dict[str, Any]:
        """Return the input of the forward that computes the selected rows only; hook what filters and records it.

        If `wanted` is a number, that of rows at the end whose logits are wanted, the last layer computes only these;
        on an accelerator all, which takes fewer launches.
        """
        plan = self.cache.plan = _extended(self.cache.plan, input_ids)
        self.cache.input_ids = input_ids
        policy, decoder = self._policy, self._decoder
        if self._is_plain(plan):
            self.cache.computed_rows = [plan.fresh] * len(self.cache.layers)
            self.cache.prefilled = True
            decoder.attend_as_model()
            return {"input_ids": input_ids, "attention_mask": None}
        rows = self._select(decoder, plan, self._prompt_tokens, self.cache, policy)
        self.cache.go_on_with(rows)
        if self._recomputed(rows) < math.ceil(policy.afterwards() * len(plan.inexact)):
            self.cache.later = Later(self._base, plan, policy, self._trim and not self._drop_last)
            self._handles += self.cache.later.watch(decoder, self.cache)
        recording = False
        if self._record:
            from chunkcache.blend.record import Recorder

            self._recorder = Recorder(decoder, plan, rows)
            recording = bool(self._recorder.spans)  # a record needs its rows in every layer
        carried, self.cache.carried = self.cache.carried, None
        if carried is not None and not recording and len(rows) > len(plan.fresh):
            self._handles += CarriedRows(decoder, self.cache, carried, rows).hook()
        if len(plan.inexact) > 0 and not recording and policy.filter_layers(len(decoder.layers)):
            self._handles += RowFilter(decoder, policy, self.cache).hook()
        watched = policy.shift() is not None or "chunkcache_watch" in vars(decoder.attentions[-1])
        if isinstance(wanted, int) and wanted > 0 and input_ids.device.type == "cpu" and not (recording or watched):
            self._handles += LastLayer(decoder, self.cache, wanted).hook()
        on_device = self.cache.rows_on(input_ids.device)
        return {
            "input_ids": self.cache.ids_on(input_ids.device),
            "position_ids": on_device[None],
            "attention_mask": decoder.masks(on_device, len(plan)),
        }

    def _recomputed(self, rows: Tensor) -> int:
        """Return how many reused tokens the forward that computes `rows` recomputes, or the guard before it has."""
        selected = () if self.guarded is None else self.guarded.selected
        return max(len(rows) - len(self.cache.plan.fresh), *map(len, selected), 0)

    def _is_plain(self, plan: Plan) -> bool:
        """Return whether the model's own forward over an ordinary cache will do.

        That is where nothing is reused, and nothing is wanted that a sliding window would have forgotten.
        """
        forgets = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.cache.layers)
        whole = self._keep is not None or self._drop_last or not self._trim
        return not (plan.reused or self.lost or self._record or (forgets and whole))

    def _without_lost(self) -> Plan:
        """Return the plan without the KV that cannot be had; those of other spans are all loaded now."""
        plan = self.cache.plan
        chunks = [_loaded(span) for span in plan.chunks]
        prefix = None if plan.prefix is None else _loaded(plan.prefix)
        shorter = Plan.of(plan.token_ids, chunks, None if prefix is None or prefix.kv is None else prefix)
        self.lost += len(plan.reused) - len(shorter.reused)
        return self._count(shorter)

    def _count(self, plan: Plan) -> Plan:
        """Count how much `plan` reuses, and return it."""
        self.reused_tokens = sum(map(len, plan.reused))
        self.reused_at = frozenset(span.start for span in plan.reused)
        self.exact_tokens = sum(len(span) for span in plan.reused if span.exact)
        return plan

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recorder is not None:
            self._recorder.remove()

    def _finish(self) -> None:
        """Make the cache an ordinary one, and keep copies of the chunks that are wanted."""
        cache = self.cache
        cache.prefilled = True
        self._decoder.attend_as_model()
        if self._keep is not None:
            contexts = {} if self._recorder is None else self._recorder.contexts()
            kept = [span for span in cache.plan.chunks if self._keep(span)]
            self.computed = {span.start: cache.copy_of(span, contexts.get(span.start)) for span in kept}
        if self._drop_last:
            cache.catch_up()
            cache.drop_last()
        if self._trim and (cache.later is None or self._drop_last):  # which needs what lies before a window, too
            cache.trim()
        cache.plan = Plan(cache.plan.token_ids)  # lets go of the stored KV


def select_rows(decoder: Decoder, plan: Plan, prompt_tokens: int, cache: FusedCache, policy: Policy) -> Tensor:
    """Return the sorted positions `[rows]` that a prefill computes: what is not reused, and what `policy` selects.

    Args:
        decoder: a decoder over the shadow that serves the request.
        plan: what is reused.
        prompt_tokens: tokens of the plan that are the prompt's; candidates of assisted generation may stand behind.
        cache: the request's cache, untouched so far.
        policy: selects.

    Raises:
        CalibrationError: the policy is guarded, and no guard was given to the prefill.
    """
    layers = scout_layers(decoder, policy) if len(plan.inexact) else ()
    if layers and policy.guarded() is not None:
        raise CalibrationError(f"policy {policy} needs a calibration of this model: run chunkcache calibrate")
    with cache.selecting():
        if layers and policy.wants_attention(plan):
            carry = policy.carries() and len(plan.fresh) > 2 * LAST  # of a short question there is nothing to save
            cache.seen = scout(decoder, plan, cache, layers, policy.pool, carry=carry, blind=policy.blind())
            selected = policy.select_by_attention(plan, cache.seen)
        else:
            selected = policy.select(plan)
    return torch.cat((plan.fresh, selected)).sort().values


def _loaded(span: Span) -> Span:
    """Return the span with all layers in memory, or without KV where one is lost."""
    try:
        return span if span.kv is None else replace(span, kv=span.kv.loaded())
    except EntryLostError:
        return replace(span, kv=None, exact=False)


def _extended(plan: Plan, input_ids: Tensor) -> Plan:
    """Return the plan, with what assisted generation may have put behind the prompt to verify in one forward.

    On an accelerator, ids of just the plan's length are taken for its own: to read them would wait for the device.
    """
    if input_ids.shape == (1, len(plan)) and input_ids.device.type != "cpu":
        return plan
    ids = tuple(input_ids[0].tolist())
    if input_ids.shape[0] != 1 or ids[: len(plan)] != plan.token_ids:
        raise PromptError(
            f"the model was given input of shape {tuple(input_ids.shape)} where the plan has one sequence of "
            f"{len(plan)} tokens; prefill the cache first and pass it on to this mode of generate()"
        )
    return plan if len(ids) == len(plan) else Plan.of(ids, plan.chunks, plan.prefix)


class _LayersClock:
    """Notes when the last layer was done."""

    def __init__(self, last: nn.Module, clock: StageClock) -> None:
        self._clock = clock
        self.started = self.done = clock.mark()
        self.handle = last.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.done = self._clock.mark()
