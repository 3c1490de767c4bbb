"""Repair after the first token: what is recomputed once it is out, before the answer is decoded on from it.

The first token is what a user waits for, and few recomputed rows bring it near to full prefill's, or none. What
follows suffers from small errors of all chunks, which few rows do not repair. So a second pass recomputes more of
them, and the question, while the first token is on its way to the reader. The prefill, which computes the question
in any case, has seen meanwhile which tokens that looks at in the middle layers. Of a long question only the last
rows are recomputed, as many as are looked at, unless everything is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from chunkcache.blend.attention import LOOK_ROWS, Watch
from chunkcache.blend.cache import FusedCache, layer_kv
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy, highest
from chunkcache.blend.scout import visible


class Later:
    """What one prefill leaves for later. Its cache holds it, and not the other way round: KV go when nobody has them.

    Args:
        decoder: the model.
        plan: what is reused where; some of it is not exact.
        policy: says how much, and where the question is looked at.
        trim: whether sliding-window layers forget at the end what lies before their window.

    Attributes:
        rows: positions `[rows]` that were recomputed, on the CPU; None until it has run.
    """

    def __init__(self, decoder: Decoder, plan: Plan, policy: Policy, trim: bool) -> None:
        self._decoder, self._policy, self._trim = decoder, policy, trim
        self._ids, self._end, self._inexact = plan.token_ids, plan.end, plan.inexact
        self._fresh = plan.fresh if policy.afterwards() == 1 else plan.fresh[-LOOK_ROWS:]
        self._seen: list[Tensor] = []
        self.rows: Tensor | None = None

    def watch(self, shadow: Decoder, cache: FusedCache) -> list[Watch]:
        """Look at the question in the prefill's own forward; see `Watch`."""
        if self._policy.guarded() is not None and cache.seen is not None:  # of whose forward few rows are left
            self._seen = [cache.seen.mean(0)]
            return []
        question, most = len(self._ids) - self._end, cache.look_rows
        layers = visible(shadow, self._policy, self._policy.layers_watched_for_later(len(shadow.layers)))
        return [Watch(shadow.attentions[layer], question, self._see, most=most) for layer in layers]

    def run(self, cache: FusedCache, question: bool = True) -> None:
        """Recompute over the cache of the prefill, in place; without `question` leave what is behind the chunks."""
        shadow = self._decoder.shadow()
        written_by = torch.inference_mode if layer_kv(cache, 0)[0].is_inference() else torch.no_grad
        with written_by(), cache.clock.stage("later"):
            fresh = self._fresh if question else self._fresh[self._fresh < self._end]
            self.rows = torch.cat((fresh, self._selected())).sort().values
            ids = torch.tensor([self._ids])[:, self.rows]
            with cache.overwriting(self.rows):
                rows = cache.rows_on(shadow.device)
                shadow.model.base_model(
                    input_ids=ids.to(shadow.device, non_blocking=True),
                    position_ids=rows[None],
                    attention_mask=shadow.masks(rows, len(self._ids)),
                    past_key_values=cache,
                    use_cache=True,
                )
            if self._trim:
                cache.trim()

    def __deepcopy__(self, memo: Any) -> Later:
        """Return a copy for a copied cache, which is of the same model."""
        return copy.copy(self)

    def _see(self, weights: Tensor, first: int) -> None:
        self._seen.append(self._policy.pool(weights.float()))

    def _selected(self) -> Tensor:
        """Return the positions `[n]` of the reused tokens with the most attention, as many as the policy says."""
        scores = torch.stack([each.to(self._decoder.device) for each in self._seen]).mean(0)
        return highest(self._inexact.to(scores.device), scores, self._policy.afterwards())
