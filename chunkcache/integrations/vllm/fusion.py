"""Selective prefill of one request by vLLM's own model, over the request's own blocks.

What a policy decides is the library's; what is run for it is here: stored KV are put into the blocks, a scout runs
the question where the policy wants to look, and one forward computes what is selected. The last token is left to
vLLM, whose logits are the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.blend import Decoder, Plan, Policy
from chunkcache.blend.attention import LOOK_ROWS
from chunkcache.blend.carried import LAST
from chunkcache.blend.guard import GuardedSelection, GuardStep, Signals
from chunkcache.blend.scout import scout_layers
from chunkcache.blend.stored import stored_layers
from chunkcache.integrations.vllm.paged import PagedModel, runs_of


class _Seen(Exception):  # noqa: N818 - a jump out of the model, not an error
    """The scout has seen what it was to see."""


class NotAcceptedError(Exception):
    """The guard has accepted no pass: all of the prompt is to be computed."""


@dataclass(frozen=True)
class Fused:
    """What was done for one request.

    Attributes:
        placed: tokens that stored KV were put in place for.
        recomputed: of these, tokens that were computed anew.
        fresh: tokens that no stored KV were there for.
    """

    placed: int
    recomputed: int
    fresh: int


def refusal(policy: Policy, layers: int, ranks: int) -> str | None:
    """Return why a policy cannot be run here, by this many tensor-parallel ranks, or None."""
    if not policy.reuses:
        return "it reuses nothing"
    if policy.filter_layers(layers) or policy.watched_layers(layers):
        return "it narrows its rows from layer to layer"
    if policy.shift() is not None:
        return "it corrects rows that it does not compute"
    if policy.blind():
        return "its scout is blind to the chunks"
    if policy.versioned or policy.stores_in_context:
        return "it stores chunks as they come out of their prompt"
    if policy.guarded() is not None and ranks > 1:
        return "it is guarded, and one rank alone has the logits"
    return None


class Fusion:
    """Fuses the prompts of one worker.

    Args:
        paged: runs the model.
        decoder: says how keys are rotated, and which layers see the whole prompt.
        dtype: of keys and values.
        reduce: sums a tensor over all tensor-parallel ranks; all of them have to choose the same rows.
    """

    def __init__(
        self, paged: PagedModel, decoder: Decoder, dtype: torch.dtype, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        self._paged, self._decoder, self._dtype, self._reduce = paged, decoder, dtype, reduce

    @torch.inference_mode()
    def run(
        self, plan: Plan, policy: Policy, block_ids: Sequence[int], guard: GuardedSelection | None = None
    ) -> Fused:
        """Write the fused KV of all tokens of `plan` but the last into a request's blocks.

        Args:
            plan: what is reused.
            policy: what of it is computed anew.
            block_ids: the blocks, as the block manager counts them.
            guard: of a guarded policy.

        Raises:
            EntryLostError: stored KV went away.
            NotAcceptedError: the guard wants all of the prompt computed.
        """
        table, last = self._paged.table(block_ids), len(plan) - 1
        if guard is not None and len(plan.inexact):
            return self._guarded(plan, policy, table, guard)
        looking = scout_layers(self._decoder, policy) if len(plan.inexact) else ()
        looking = looking if looking and policy.wants_attention(plan) else ()
        keys = self._place(plan, table, looking)
        carried: dict[str, Any] = {}
        if looking:
            carry = policy.carries() and len(plan.fresh) > 2 * LAST
            seen, _ = self._scout(plan, table, policy, keys, carried if carry else None)
            selected = policy.select_by_attention(plan, seen)
        else:
            selected = policy.select(plan)
        rows = torch.cat((plan.fresh, selected)).sort().values
        rows = rows[rows < last]
        ids = torch.tensor(plan.token_ids)
        if carried and len(selected):
            self._go_on(ids, plan, rows, table, carried)
        elif len(rows):
            self._paged.forward(ids[rows], runs_of(rows, table))
        return Fused(sum(map(len, plan.reused)), len(selected), len(plan.fresh))

    def _guarded(self, plan: Plan, policy: Policy, table: Tensor, guard: GuardedSelection) -> Fused:
        keys = self._place(plan, table, scout_layers(self._decoder, policy))
        outcome = guard.decide(self._steps(plan, policy.escalation(), table, keys))
        if outcome.full:
            raise NotAcceptedError
        return Fused(sum(map(len, plan.reused)), len(outcome.selected[-1]), len(plan.fresh))

    def _steps(
        self, plan: Plan, policies: Sequence[Policy], table: Tensor, keys: dict[int, Tensor]
    ) -> Generator[GuardStep, None, None]:
        """Yield the passes of a guarded fusion, each over what the one before left; see `blend.guard.guard_steps`."""
        ids = torch.tensor(plan.token_ids)
        seen, hidden = self._scout(plan, table, policies[0], keys, None, to_the_end=True)
        before = self._paged.log_probs(hidden)
        for policy in policies:
            selected = policy.select_by_attention(plan, seen)
            rows = torch.cat((plan.fresh, selected)).sort().values
            after = self._paged.log_probs(self._paged.forward(ids[rows], runs_of(rows, table)))
            yield GuardStep(selected, after, Signals.between(before, after))
            before = after

    def _place(self, plan: Plan, table: Tensor, looking: Sequence[int]) -> dict[int, Tensor]:
        """Write stored KV to their places; return the keys `[kv_heads, tokens, head_dim]` of some layers."""
        keys: dict[int, Tensor] = {}
        if not plan.reused:
            return keys
        layers = stored_layers(plan, self._decoder.rotaries, self._paged.heads, self._dtype, self._paged.device)
        parts = _joined(plan)
        for index, both in enumerate(layers):
            for start, stop in parts:
                self._paged.write(index, table, start, both[:, :, start:stop])
            if index in looking:
                keys[index] = both[0]
        return keys

    def _scout(
        self,
        plan: Plan,
        table: Tensor,
        policy: Policy,
        keys: dict[int, Tensor],
        carried: dict[str, Any] | None,
        to_the_end: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run the question over what is placed, up to the last layer of `keys` or `to_the_end`.

        Returns:
            its attention `[layers, tokens]` in the layers of `keys`; and the hidden states `[rows, hidden]` at the
            end, of no rows where it does not come there.
        """
        count = min(len(plan) - plan.end, LOOK_ROWS)
        fresh = plan.fresh.to(self._paged.device)
        later = torch.arange(len(plan), device=fresh.device) > torch.arange(
            len(plan) - count, len(plan), device=fresh.device
        ).unsqueeze(1)
        seen: list[Tensor] = []

        def see(index: int, query: Tensor, key: Tensor, _: Tensor) -> None:
            held = keys.pop(index)
            held[:, fresh] = key.transpose(0, 1)
            weights = _weights(query[-count:], held, later, self._paged.attentions[index].impl.scale)
            seen.append(self._reduce(policy.pool(weights)))
            if len(seen) == len(looking) and carried is None and not to_the_end:
                raise _Seen

        looking = sorted(keys)
        following = looking[-1] + 1
        handle = None
        if carried is not None and following < len(self._paged.layers):

            def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                carried.update(layer=following, args=args, kwargs=kwargs)
                raise _Seen

            handle = self._paged.layers[following].register_forward_pre_hook(stop, with_kwargs=True)
        hidden = torch.empty(0)
        try:
            with suppress(_Seen):
                hidden = self._paged.forward(
                    torch.tensor(plan.token_ids)[plan.fresh],
                    runs_of(plan.fresh, table),
                    see={index: partial(see, index) for index in looking},
                )
        finally:
            if handle is not None:
                handle.remove()
        return torch.stack(seen), hidden

    def _go_on(self, ids: Tensor, plan: Plan, rows: Tensor, table: Tensor, carried: dict[str, Any]) -> None:
        """Compute `rows`, those of the question's beginning only from where the scout stopped; see `CarriedRows`."""
        kept = torch.isin(rows, plan.fresh[:-LAST])
        lower, device = rows[~kept], self._paged.device
        at_lower, at_kept = (part.nonzero()[:, 0].to(device) for part in (~kept, kept))

        def joined(mine: Any, theirs: Any) -> Any:
            if not isinstance(mine, Tensor):
                return mine
            both = mine.new_empty(len(rows), *mine.shape[1:])
            both.index_copy_(0, at_lower, mine)
            return both.index_copy_(0, at_kept, theirs[: len(at_kept)])

        def join(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            merged = tuple(map(joined, args, carried["args"]))
            return merged, {name: joined(value, carried["kwargs"][name]) for name, value in kwargs.items()}

        handle = self._paged.layers[carried["layer"]].register_forward_pre_hook(join, with_kwargs=True)
        try:
            below = carried["layer"], ids[lower], runs_of(lower, table)
            self._paged.forward(ids[rows], runs_of(rows, table), below=below)
        finally:
            handle.remove()


def _joined(plan: Plan) -> list[tuple[int, int]]:
    """Return start and stop of what is reused, spans that touch as one."""
    parts: list[tuple[int, int]] = []
    for span in plan.reused:
        if parts and parts[-1][1] == span.start:
            parts[-1] = parts[-1][0], span.stop
        else:
            parts.append((span.start, span.stop))
    return parts


def _weights(query: Tensor, keys: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Return attention weights `[heads, rows, tokens]` in float32.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[kv_heads, tokens, head_dim]`.
        hidden: `[rows, tokens]`, true where a row must not look.
        scale: of the scores.
    """
    rows, heads, head_dim = query.shape
    grouped = (query.transpose(0, 1) * scale).reshape(len(keys), -1, head_dim)
    scores = torch.matmul(grouped, keys.transpose(1, 2)).view(heads, rows, -1)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
