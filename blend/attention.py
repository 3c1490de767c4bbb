"""Attention for scattered query rows over a whole context, in the place of transformers' SDPA.

During a selective prefill a query row is a token anywhere in the prompt. What it may see is one interval of
positions, so its row of the mask is two integers instead of one flag per key. On CPU the sorted rows go
through SDPA in blocks that skip the keys no row of the block can see, with grouped heads left ungrouped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from chunkcache.blend.triton import serve
from chunkcache.errors import UnsupportedModelError

NAME = "chunkcache_rows"
BLOCK_ROWS = 64  # small enough to skip keys that no row of a block sees, large enough to keep the cores busy


def visible_intervals(rows: Tensor, window: int | None, columns: Tensor | None = None) -> Tensor:
    """Return `[1, 1, rows, 2]` int64: first and last position that each row of `rows` `[rows]` may see.

    With `columns` `[columns]`, the sorted positions that are there to be seen, `rows` among them, they are the first
    and last index into these.
    """
    first = torch.zeros_like(rows) if window is None else (rows - window + 1).clamp_(min=0)
    if columns is not None:
        first, rows = torch.searchsorted(columns, first), torch.searchsorted(columns, rows)
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
) -> tuple[Tensor, Tensor | None]:
    """Attend from scattered rows; an attention function as transformers' `AttentionInterface` wants it.

    Args:
        query: `[1, heads, rows, head_dim]`, rows sorted by position.
        key: `[1, kv_heads, length, head_dim]`; `value` alike.
        attention_mask: int64 `[1, 1, rows, 2]` from `visible_intervals`. Anything else is another call's own
            mask (of a decoding step, say) and goes to transformers' SDPA untouched.

    Returns:
        `[1, rows, heads, head_dim]` and None: weights are materialised only for a `Watch`, and only its rows'.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        output, _ = _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return output, None
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if extras:
        raise UnsupportedModelError(
            f"SDPA cannot serve attention with {', '.join(extras)}; load the model with attn_implementation='eager'"
        )
    watch: Watch | None = vars(module).get("chunkcache_watch")
    unseen = query.shape[2] - (watch.last if watch else 0)
    parts = []
    if unseen:
        rows, intervals = query[:, :, :unseen], attention_mask[:, :, :unseen]
        if serve(query.device):
            from chunkcache.blend.triton.attention import attend

            parts.append(attend(rows, key, value, intervals, scaling))
        elif query.device.type == "cpu":
            parts.append(_in_blocks(rows, key, value, intervals, scaling))
        else:
            mask = dense_mask(intervals, key.shape[2])
            parts.append(_sdpa(module, rows, key, value, mask, dropout, scaling, **kwargs)[0])
    if watch is not None:
        for start in range(unseen, query.shape[2], watch.block):
            block = slice(start, start + watch.block)
            part, weights = _weighted(query[:, :, block], key, value, attention_mask[:, :, block], scaling)
            watch.see(weights[0], start - unseen)
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None) -> Tensor:
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
    return output


def _weighted(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Attend with the weights materialised: for few rows only."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim)
    scores = torch.matmul(grouped * (scaling or head_dim**-0.5), key.transpose(-1, -2))
    scores = scores.view(batch, heads, rows, length)
    hidden = ~dense_mask(attention_mask, length)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    output = torch.matmul(weights.view(batch, kv_heads, -1, length), value)
    return output.view(batch, heads, rows, -1).transpose(1, 2), weights


class Watch:
    """Looks at the attention weights of the last rows at one attention module, while it is registered.

    Args:
        module: an attention module of a shadow, free to be written to.
        last: how many of the last rows to look at.
        see: called with their weights `[heads, n, length]` and the index of the first of the n among these rows.
        block: most rows whose weights are materialised at once; all by default. The model's own eager attention
            gives them all in any case.
    """

    def __init__(
        self, module: nn.Module, last: int, see: Callable[[Tensor, int], None], block: int | None = None
    ) -> None:
        self.last = last
        self.see = see
        self.block = block or last
        self._module: Any = module
        self._handle = module.register_forward_hook(self._after)
        self._module.__dict__["chunkcache_watch"] = self

    def remove(self) -> None:
        """Stop looking."""
        self._handle.remove()
        self._module.__dict__.pop("chunkcache_watch", None)

    def _after(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
        if output[1] is not None:  # eager attention; `rows_attention` has shown its weights already
            self.see(output[1][0, :, -self.last :], 0)


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # takes seconds, with all it imports

    output: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return output


@cache
def register(name: str, attend: Callable[..., tuple[Tensor, Tensor | None]], sdpa_masks: bool = False) -> None:
    """Make an attention function known to transformers under `name`.

    Called when there is a model, since transformers' modelling code takes seconds to import.

    Args:
        name: what is set as `attn_implementation`.
        attend: the function.
        sdpa_masks: whether transformers makes it the masks that it makes for SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attend)
    if sdpa_masks:
        AttentionMaskInterface.register(name, sdpa_mask)
