"""The scout: a cheap first pass of the question alone, to see which reused tokens it looks at.

Only the tokens that are computed in any case run through the model, over the stored KV as they are, and only up
to the last layer that is asked for. What it assembles is left in the cache for the prefill that follows. So is what
these tokens had become by then, and the prefill may go on from there (`CarriedRows`) instead of computing them twice.

A blind scout sees no chunk on its way: the question is computed as if it stood behind the system prompt alone, though
at its own positions, and its queries meet the chunks' keys only in the layers that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.blend.attention import Watch
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.carried import Carried
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.blend.rows import hidden_of


class _Seen(Exception):  # noqa: N818 - a jump out of the model, not an error
    """The last layer that was asked for has been seen."""


def scout_layers(decoder: Decoder, policy: Policy) -> Sequence[int]:
    """Return the layers, in rising order, in which a scout of `policy` looks; empty for a policy without any."""
    return visible(decoder, policy, policy.attention_layers(len(decoder.layers)))


def visible(decoder: Decoder, policy: Policy, layers: Sequence[int]) -> Sequence[int]:
    """Return those of `layers` that a policy can look at: for one that skips windows, see `Decoder.seeing_all`."""
    return decoder.seeing_all(layers) if policy.skips_windows else layers


def scout(
    decoder: Decoder,
    plan: Plan,
    cache: FusedCache,
    layers: Sequence[int],
    pool: Callable[[Tensor], Tensor],
    *,
    carry: bool = False,
    blind: bool = False,
) -> Tensor:
    """Return the attention `[len(layers), tokens]` that each token of the plan gets from the question.

    Args:
        decoder: the model, borrowed by the caller.
        plan: what is reused where. The question is what stands behind the last segment.
        cache: the fused cache of this prefill, untouched so far.
        layers: where to look, in rising order.
        pool: reduces the weights of one layer `[heads, question rows, tokens]` to `[tokens]`.
        carry: finish the last of `layers`, and leave in `cache.carried` what came out; where it is the model's last,
            nothing is left.
        blind: whether the question sees no chunk below these layers. The weights on each chunk that is not exact then
            sum to 1 for each head and question row: softmax over that chunk alone.
    """
    question = len(plan) - plan.end
    view = _Blindfold.of(plan, decoder.device) if blind else None
    seen: list[Tensor] = []

    def see(weights: Tensor, first: int) -> None:
        weights = weights.float()
        seen.append(pool(weights if view is None else view.within_chunks(weights)))
        if len(seen) == len(layers) and not carry:
            raise _Seen

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache.carried = Carried(layers[-1] + 1, hidden_of(args, kwargs))
        raise _Seen

    cache.go_on_with(plan.fresh if view is None else view.rows)
    cache.scouting = True
    rows = cache.rows_on(decoder.device)
    with ExitStack() as stack:
        stack.callback(setattr, cache, "scouting", False)
        for layer in layers:
            stack.callback(Watch(decoder.attentions[layer], question, see, most=cache.look_rows).remove)
        if carry and layers[-1] + 1 < len(decoder.layers):
            following = decoder.layers[layers[-1] + 1]
            stack.callback(following.register_forward_pre_hook(stop, with_kwargs=True).remove)
        if view is not None:
            stack.enter_context(view.worn(decoder, cache, layers))
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_Seen))
        decoder.model.base_model(
            input_ids=cache.ids_on(decoder.device),
            position_ids=rows[None],
            attention_mask=decoder.masks(rows, len(plan), None if view is None else view.outside),
            past_key_values=cache,
            use_cache=True,
        )
    return torch.stack([each.to(seen[0].device, non_blocking=True) for each in seen])


@dataclass(frozen=True)
class _Blindfold:
    """What a blind scout computes and sees; positions are sorted.

    Attributes:
        rows: positions `[rows]` outside all chunks that no stored KV were found for, on the CPU.
        outside: positions `[n]` outside all chunks.
        known: these, and those of reused chunks.
        owner: the plan's `owner` `[tokens]`.
        owners: how many different ones there are.
    """

    rows: Tensor
    outside: Tensor
    known: Tensor
    owner: Tensor
    owners: int

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> _Blindfold:
        """Return the blindfold of a plan, to be worn on `device`."""
        outside = torch.ones(len(plan), dtype=torch.bool)
        known = torch.ones(len(plan), dtype=torch.bool)
        for span in plan.chunks:
            outside[span.start : span.stop] = False
            known[span.start : span.stop] = span.kv is not None
        outside[plan.end :] = known[plan.end :] = True  # the question, where a chunk reaches into it
        rows = plan.fresh[outside[plan.fresh]]
        positions = (outside.nonzero()[:, 0], known.nonzero()[:, 0], plan.owner)
        there = [each.to(device, non_blocking=True) for each in positions]
        return cls(rows, there[0], there[1], there[2], int(plan.owner.max()) + 1)

    @contextmanager
    def worn(self, decoder: Decoder, cache: FusedCache, layers: Sequence[int]) -> Iterator[None]:
        """Show the model nothing of the chunks, but in `layers`."""
        masks = decoder.masks(cache.rows_on(decoder.device), len(cache.plan), self.known)

        def look(mask: Any, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            cache.shown = self.known
            return args, {**kwargs, "attention_mask": mask}

        def look_away(*_: Any) -> None:
            cache.shown = self.outside

        look_away()
        with ExitStack() as stack:
            stack.callback(setattr, cache, "shown", None)
            for index in layers:
                layer, before = decoder.layers[index], partial(look, decoder.mask(index, masks))
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(look_away).remove)
            yield

    def within_chunks(self, weights: Tensor) -> Tensor:
        """Return weights `[heads, rows, known]` as `[heads, rows, tokens]` that sum to 1 within each chunk."""
        heads, rows, _ = weights.shape
        known, owner = (part.to(weights.device, non_blocking=True) for part in (self.known, self.owner))
        spread = weights.new_zeros(heads, rows, len(owner)).index_copy_(2, known, weights)
        sums = weights.new_zeros(heads, rows, self.owners).index_add_(2, owner, spread)
        return spread / sums.clamp(min=torch.finfo(weights.dtype).tiny).index_select(2, owner)
