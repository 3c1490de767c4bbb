"""The scout: a cheap first pass of the question alone, to see which reused tokens it looks at.

Only the tokens that are computed in any case run through the model, over the stored KV as they are, and only up
to the last layer that is asked for. What it assembles is left in the cache for the prefill that follows. So is what
these tokens had become by then, and the prefill may go on from there (`CarriedRows`) instead of computing them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.blend.attention import Watch
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.carried import Carried
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan


class _Seen(Exception):  # noqa: N818 - a jump out of the model, not an error
    """The last layer that was asked for has been seen."""


def scout(
    decoder: Decoder,
    plan: Plan,
    cache: FusedCache,
    layers: Sequence[int],
    pool: Callable[[Tensor], Tensor],
    carry: bool = False,
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
    """
    question = len(plan) - plan.end
    seen: list[Tensor] = []

    def see(weights: Tensor, first: int) -> None:
        seen.append(pool(weights.float()))
        if len(seen) == len(layers) and not carry:
            raise _Seen

    def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache.carried = Carried(layers[-1] + 1, hidden)
        raise _Seen

    cache.go_on_with(plan.fresh)
    cache.scouting = True
    rows = cache.rows_on(decoder.device)
    ids = torch.tensor([plan.token_ids], device=decoder.device)
    with ExitStack() as stack:
        stack.callback(setattr, cache, "scouting", False)
        for layer in layers:
            stack.callback(Watch(decoder.attentions[layer], question, see).remove)
        if carry and layers[-1] + 1 < len(decoder.layers):
            following = decoder.layers[layers[-1] + 1]
            stack.callback(following.register_forward_pre_hook(stop, with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(suppress(_Seen))
        decoder.model.base_model(
            input_ids=ids.index_select(1, rows),
            position_ids=rows[None],
            attention_mask=decoder.masks(rows, len(plan)),
            past_key_values=cache,
            use_cache=True,
        )
    return torch.stack(seen)
