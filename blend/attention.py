"""Attention for scattered query rows over a whole context, in the place of transformers' SDPA.

During a selective prefill a query row is a token anywhere in the prompt. What it may see is one interval of
positions, so its row of the mask is two integers instead of one flag per key. On CPU the sorted rows go
through SDPA in blocks that skip the keys no row of the block can see, with grouped heads left ungrouped.

On an accelerator contiguous rows need no mask at all: they are the lower right of plain causal attention. Scattered
rows get one mask for all layers that see alike (`Sight`). Keys and values are repeated for no group of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from chunkcache.blend.triton import serve
from chunkcache.errors import UnsupportedModelError

NAME = "chunkcache_rows"
BLOCK_ROWS = 64  # small enough to skip keys that no row of a block sees, large enough to keep the cores busy
LOOK_ROWS = 128  # rows of a question at most whose weights are looked at: the last ones
BLOCK_COST = 4096  # pairs of a row and a key that take as long as one more block
ALIGNED = 16  # elements: rows of a float mask that start at multiples of it are read by the kernels as they are
LOWER_RIGHT = ("cuda", "xpu")  # devices with a causal kernel for fewer rows than keys


def visible_intervals(rows: Tensor, window: int | None, columns: Tensor | None = None) -> Tensor:
    """Return `[1, 1, rows, 2]` int64: first and last position that each row of `rows` `[rows]` may see.

    With `columns` `[columns]`, the sorted positions that are there to be seen, `rows` among them, they are the first
    and last index into these.
    """
    given = rows
    first = torch.zeros_like(rows) if window is None else (rows - window + 1).clamp_(min=0)
    if columns is not None:
        first, rows = torch.searchsorted(columns, first), torch.searchsorted(columns, rows)
    intervals = torch.stack((first, rows), dim=-1)[None, None]
    if intervals.device.type != "cpu":
        vars(intervals)["chunkcache_sight"] = Sight(None if columns is not None else first_of(given), window)
    return intervals


def contiguous_from(rows: Tensor, first: int) -> Tensor:
    """Note on `rows` `[rows]`, on any device, that they are `first`, `first + 1` and so on; return it."""
    vars(rows)["chunkcache_first"] = first
    return rows


def first_of(rows: Tensor) -> int | None:
    """Return the first of `rows` where they are known to be contiguous, else None."""
    first: int | None = vars(rows).get("chunkcache_first")
    return first


def upper(intervals: Tensor, rows: int) -> Tensor:
    """Return `intervals` of the first `rows` rows, with what is known of them."""
    part = intervals[:, :, :rows]
    vars(part)["chunkcache_blocks"] = _known_blocks(intervals)
    if (sight := vars(intervals).get("chunkcache_sight")) is not None:
        vars(part)["chunkcache_sight"] = sight
    return part


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
        attention_mask: int64 `[1, 1, rows, 2]` from `visible_intervals`. Anything else is another call's own mask.

    Returns:
        `[1, rows, heads, head_dim]` and None: weights are materialised only for a `Watch`, and only its rows'.
    """
    extras = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if attention_mask is None or attention_mask.dtype != torch.int64:
        if attention_mask is None and query.shape[2] == 1 and not extras:  # a decoding step: one more key each time
            output = flash(query, key, value, scaling)
            if output is not None:
                return output, None
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if extras:
        raise UnsupportedModelError(
            f"SDPA cannot serve attention with {', '.join(extras)}; load the model with attn_implementation='eager'"
        )
    watch: Watch | None = vars(module).get("chunkcache_watch")
    unseen = max(0, query.shape[2] - watch.last) if watch else query.shape[2]
    parts = []
    if unseen:
        rows = query[:, :, :unseen]
        if query.device.type == "cpu" and not serve(query.device):
            parts.append(_in_blocks(rows, key, value, attention_mask, scaling))
        else:
            parts.append(_on_accelerator(rows, key, value, attention_mask, scaling))
    if watch is not None:
        for start in range(unseen, query.shape[2], watch.block):
            block = slice(start, start + watch.block)
            hidden = _hidden(attention_mask, block, key.shape[2])
            part, weights = _weighted(query[:, :, block], key, value, hidden, scaling)
            watch.see(weights[0], start - unseen)
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scaling: float | None) -> Tensor:
    """Attend from the first rows of `intervals`; return `[1, rows, heads, head_dim]`."""
    batch, heads, rows, _ = query.shape
    output = query.new_empty(batch, rows, heads, value.shape[-1])
    grouped = heads != key.shape[1]
    for block, low, high in _blocks(intervals, rows):
        output[:, block] = F.scaled_dot_product_attention(
            query[:, :, block],
            key[:, :, low:high],
            value[:, :, low:high],
            attn_mask=dense_mask(intervals[:, :, block] - low, high - low),
            scale=scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
    return output


def _blocks(intervals: Tensor, rows: int) -> list[tuple[slice, int, int]]:
    """Return blocks of the first `rows` rows, each with the first key that it sees and the one behind the last.

    Of all ways to cut the rows it is the one with the fewest pairs of a row and a key, where a block costs
    `BLOCK_COST` more: rows that are far from the others, or have a window of their own, are a block of their own.
    It is found once for all layers that see alike.
    """
    known = _known_blocks(intervals)
    if rows not in known:
        known[rows] = blocks = []
        low, high = (bound.numpy() for bound in intervals[0, 0, :rows].unbind(-1))
        least = np.zeros(rows + 1, dtype=np.int64)  # what the rows before each cost at least
        starts = [0]  # and where the last block of these begins
        for stop in range(1, rows + 1):
            begin = max(0, stop - BLOCK_ROWS)
            sizes = np.arange(stop - begin, 0, -1)
            costs = least[begin:stop] + sizes * (high[stop - 1] + 1 - low[begin:stop])
            best = int(costs.argmin())
            starts.append(begin + best)
            least[stop] = costs[best] + BLOCK_COST
        stop = rows
        while stop:
            start = starts[stop]
            blocks.append((slice(start, stop), int(low[start]), int(high[stop - 1]) + 1))
            stop = start
        blocks.reverse()
    return known[rows]


def _known_blocks(intervals: Tensor) -> dict[int, list[tuple[slice, int, int]]]:
    """Return the blocks that were found of `intervals`, or of what they are the `upper` part of, by their rows."""
    known: dict[int, list[tuple[slice, int, int]]] = vars(intervals).setdefault("chunkcache_blocks", {})
    return known


def _on_accelerator(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scaling: float | None) -> Tensor:
    """Attend from the first rows of `intervals`; return `[1, rows, heads, head_dim]`.

    No kernel is left to a choice that knows the mask only as a tensor: it may build a plan for each new shape.
    """
    rows = query.shape[2]
    sight = _sight_of(intervals)
    end = sight.end(rows)
    if end is not None:
        key, value = key[:, :, :end], value[:, :, :end]
        if (output := flash(query, key, value, scaling)) is not None:
            return output
        if rows == end or query.device.type in LOWER_RIGHT:
            return _ungrouped(query, key, value, partial(_causal, scaling=scaling))
    elif serve(query.device):
        from chunkcache.blend.triton.attention import attend

        return attend(query, key, value, intervals[:, :, :rows], scaling)
    mask = sight.bias(intervals, key.shape[2], query.dtype)[:, :, :rows]
    return _ungrouped(query, key, value, partial(_masked, mask=mask, scaling=scaling))


def flash(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor | None:
    """Attend from the last rows by the flash kernel of CUDA, grouped heads as they are; None where it cannot.

    Called by its name: SDPA may prefer cuDNN, which builds a plan for each new number of rows or keys, and takes this
    kernel for as many rows as keys only.

    Args:
        query: `[sequences, heads, rows, head_dim]`.
        key: `[sequences, kv_heads, length, head_dim]`; `value` alike.
        scaling: of the scores; None for `head_dim ** -0.5`.

    Returns:
        `[sequences, rows, heads, head_dim]`.
    """
    if query.device.type != "cuda" or query.shape[3] % 8:
        return None
    backends: Any = torch.backends.cuda
    asked = backends.SDPAParams(query, key, value, None, 0.0, False, query.shape[1] != key.shape[1])
    if not backends.can_use_flash_attention(asked):
        return None
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention
    output: Tensor = attend(query, key, value, 0.0, True, False, scale=scaling)[0]  # causal, to the lower right
    return output.transpose(1, 2)


def _ungrouped(
    query: Tensor, key: Tensor, value: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attend by a kernel that takes as many key heads as query heads, without copying any; `[1, rows, heads, dim]`.

    What shares a KV head becomes a sequence of its own, `[kv_heads, group, rows, dim]`, and sees that head by a
    stride of 0.
    """
    _, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    query = query.reshape(-1, group, *query.shape[2:])
    key, value = (part[0][:, None].expand(-1, group, -1, -1) for part in (key, value))
    return attend(query, key, value).permute(2, 0, 1, 3).reshape(1, rows, heads, -1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    rows, end = query.shape[2], key.shape[2]
    if rows == end:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return F.scaled_dot_product_attention(query, key, value, causal_lower_right(rows, end), scale=scaling)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    if query.device.type == "cuda":
        mask = mask.expand(*query.shape[:2], -1, -1)
        backends: Any = torch.backends.cuda
        if backends.can_use_efficient_attention(backends.SDPAParams(query, key, value, mask, 0.0, False, False)):
            efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
            output: Tensor = efficient(query, key, value, mask, False, 0.0, False, scale=scaling)[0]
            return output
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling)


class Sight:
    """What the host knows of some rows on an accelerator, with the masks that all layers take which see alike.

    Args:
        first: position of the first of contiguous rows; None for scattered ones, and where nothing is known.
        window: of these layers' attention, in tokens; None without one.
    """

    def __init__(self, first: int | None, window: int | None) -> None:
        self._first, self._window = first, window
        self._bias: Tensor | None = None
        self._hidden: tuple[slice, Tensor] | None = None

    def end(self, rows: int) -> int | None:
        """Return where the keys end that `rows` rows see, each all up to its own; None where they see others."""
        if self._first is None:
            return None
        end = self._first + rows
        return end if self._window is None or end <= self._window else None

    def bias(self, intervals: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """Return the mask `[1, 1, rows, length]` of `intervals` to be added to scores, 0 or minus infinity."""
        rows, bias = intervals.shape[2], self._bias
        if bias is None or bias.shape[2] < rows or bias.shape[3] < length or bias.dtype != dtype:
            stride = -(-length // ALIGNED) * ALIGNED
            bias = torch.zeros(1, 1, rows, stride, dtype=dtype, device=intervals.device)
            self._bias = bias = bias.masked_fill_(~dense_mask(intervals, stride), -torch.inf)
        return bias[:, :, :rows, :length]

    def hidden(self, intervals: Tensor, rows: slice, length: int) -> Tensor:
        """Return the mask `[1, 1, n, length]` of some rows, true where they must not look; the last one is kept."""
        if self._hidden is None or self._hidden[0] != rows or self._hidden[1].shape[3] != length:
            self._hidden = rows, ~dense_mask(intervals[:, :, rows], length)
        return self._hidden[1]


def _sight_of(intervals: Tensor) -> Sight:
    """Return what is known of `intervals`: nothing where they were moved to the device of another layer."""
    sight: Sight = vars(intervals).get("chunkcache_sight") or Sight(None, None)
    return sight


def _hidden(intervals: Tensor, rows: slice, length: int) -> Tensor:
    """Return the mask `[1, 1, n, length]` of the rows, true where they must not look."""
    if intervals.device.type == "cpu":
        return ~dense_mask(intervals[:, :, rows], length)
    return _sight_of(intervals).hidden(intervals, rows, length)


def _weighted(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Attend with the weights materialised, in float32: for few rows only."""
    batch, heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim)
    scores = torch.matmul(grouped * (scaling or head_dim**-0.5), key.transpose(-1, -2))
    scores = scores.view(batch, heads, rows, length)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    output = torch.matmul(weights.to(value.dtype).view(batch, kv_heads, -1, length), value)
    return output.view(batch, heads, rows, -1).transpose(1, 2), weights


class Watch:
    """Looks at the attention weights of the last rows at one attention module, while it is registered.

    Args:
        module: an attention module of a shadow, free to be written to.
        last: how many of the last rows to look at.
        see: called with their weights `[heads, n, length]` and the index of the first of the n among these rows.
        block: most rows whose weights are materialised at once; None for all of `last`, but no more than `most` rows
            are looked at then, the last ones. The model's own eager attention gives all rows' in any case.
        most: see `block`. So a long question needs no more memory than a short one.
    """

    def __init__(
        self,
        module: nn.Module,
        last: int,
        see: Callable[[Tensor, int], None],
        block: int | None = None,
        most: int = LOOK_ROWS,
    ) -> None:
        self.last = last if block else min(last, most)
        self.see = see
        self.block = block or self.last
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

    Called when there is a model, since transformers' modelling code takes seconds to import. With `sdpa_masks`
    transformers makes it the masks that it makes for SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attend)
    if sdpa_masks:
        AttentionMaskInterface.register(name, sdpa_mask)
