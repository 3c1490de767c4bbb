"""Attention for scattered query rows over a whole context, in the place of transformers' SDPA.

During a selective prefill a query row is a token anywhere in the prompt. What it may see is one interval of
positions, so its row of the mask is two integers instead of one flag per key. On CPU the sorted rows go
through SDPA in blocks that skip the keys no row of the block can see, with grouped heads left ungrouped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chunkcache.errors import UnsupportedModelError

NAME = "chunkcache_rows"
BLOCK_ROWS = 64  # measured on 2 cores: 32 to 128 rows are alike, one block of 500 rows is 1.6 times slower


def visible_intervals(rows: Tensor, window: int | None) -> Tensor:
    """Return `[1, 1, rows, 2]` int64: first and last position that each row of `rows` `[rows]` may see."""
    first = torch.zeros_like(rows) if window is None else (rows - window + 1).clamp_(min=0)
    return torch.stack((first, rows), dim=-1)[None, None]


def dense_mask(intervals: Tensor, length: int) -> Tensor:
    """Return the boolean `[1, 1, rows, length]` mask that `intervals` `[1, 1, rows, 2]` stand for."""
    positions = torch.arange(length, device=intervals.device)
    return (positions <= intervals[..., 1:]) & (positions >= intervals[..., :1])


def additive_mask(intervals: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return `dense_mask` as a float mask `[1, 1, rows, length]` to be added to attention scores."""
    mask = torch.zeros(1, 1, intervals.shape[2], length, dtype=dtype, device=intervals.device)
    return mask.masked_fill_(~dense_mask(intervals, length), torch.finfo(dtype).min)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from scattered rows; an attention function as transformers' `AttentionInterface` wants it.

    Args:
        query: `[1, heads, rows, head_dim]`, rows sorted by position.
        key: `[1, kv_heads, length, head_dim]`; `value` alike.
        attention_mask: int64 `[1, 1, rows, 2]` from `visible_intervals`. Anything else is another call's own
            mask (a decode in another thread, say) and goes to transformers' SDPA untouched.

    Returns:
        `[1, rows, heads, head_dim]`, and None for the weights, which are never materialised.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return output, None
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extras:
        raise UnsupportedModelError(
            f"SDPA cannot serve attention with {', '.join(extras)}; load the model with attn_implementation='eager'"
        )
    if query.device.type != "cpu":
        mask = dense_mask(attention_mask, key.shape[2])
        output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
        return output, None
    batch, heads, rows, _ = query.shape
    output = query.new_empty(batch, rows, heads, value.shape[-1])
    grouped = heads != key.shape[1]
    for start in range(0, rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        intervals = attention_mask[:, :, block]
        low, high = int(intervals[0, 0, 0, 0]), int(intervals[0, 0, -1, 1]) + 1
        output[:, block] = F.scaled_dot_product_attention(
            query[:, :, block],
            key[:, :, low:high],
            value[:, :, low:high],
            attn_mask=dense_mask(intervals - low, high - low),
            scale=scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
    return output, None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def rows_attention_on(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` attend through `rows_attention` while the context lasts, if it uses SDPA; else change nothing."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before == "sdpa":
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
