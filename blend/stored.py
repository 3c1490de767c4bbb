"""Stored KV of a plan, layer by layer in place, for whoever runs the model: no model is needed for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from chunkcache.blend.assembly import Assembler
from chunkcache.blend.loader import LEAST_DEPTH, Loader
from chunkcache.blend.plan import Plan
from chunkcache.blend.rotary import Rotary


def stored_layers(
    plan: Plan,
    rotaries: Sequence[Rotary | None],
    heads: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield `[2, kv_heads, tokens, head_dim]` of each layer: stored KV in place, the rest undefined.

    The next layers are loaded meanwhile.

    Args:
        plan: what is reused where.
        rotaries: how each layer's keys are rotated; None for a layer without RoPE.
        heads: (kv_heads, head_dim) of each layer.
        dtype: of what is yielded.
        device: where it is wanted.

    Raises:
        EntryLostError: a layer is damaged or gone.
    """
    assembler = Assembler(plan)
    loader = Loader([span.kv.layers for span in plan.reused if span.kv is not None], device, LEAST_DEPTH)
    try:
        for index, (rotary, (kv_heads, head_dim)) in enumerate(zip(rotaries, heads, strict=True)):
            like = torch.empty(1, kv_heads, 0, head_dim, dtype=dtype, device=device)
            yield assembler.assemble(loader.take(index), rotary, like)
    finally:
        loader.close()
