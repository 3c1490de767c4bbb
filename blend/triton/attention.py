"""Attention of scattered rows in Triton: online softmax (FlashAttention, arXiv 2205.14135, algorithm 1).

Each row has an interval of positions that it sees. The query heads that share a KV head are packed with the rows, so
that a tile of keys is read once for all of them. Rows are sorted: a tile of rows ends at its last row's position, and
begins where the window of its first row does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkcache.blend.triton import INTERPRETED

LEAST_DIM = 16  # of a matrix product in Triton


@triton.jit
def _product(left, right, widen: tl.constexpr):
    """Multiply two matrices, summed in float32; float32 in full, not as TF32."""
    if widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _attend(  # noqa: PLR0913 - a kernel takes each stride by itself
    query, key, value, intervals, output,
    query_head, query_row, key_head, key_token, value_head, value_token, output_row, output_head,
    rows, scaling,
    heads_each: tl.constexpr, head_dim: tl.constexpr, value_dim: tl.constexpr,
    packed: tl.constexpr, columns: tl.constexpr, padded_dim: tl.constexpr, padded_value: tl.constexpr,
    widen: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    place = tl.program_id(0) * packed + tl.arange(0, packed)
    inside = place < rows * heads_each
    row = tl.minimum(place // heads_each, rows - 1)
    head = kv_head * heads_each + place % heads_each
    first, last = tl.load(intervals + 2 * row), tl.load(intervals + 2 * row + 1)

    dim, value_at = tl.arange(0, padded_dim), tl.arange(0, padded_value)
    query_at = head[:, None].to(tl.int64) * query_head + row[:, None].to(tl.int64) * query_row + dim[None, :]
    asked = tl.load(query + query_at, mask=(dim < head_dim)[None, :], other=0.0)

    highest = tl.full([packed], -float("inf"), tl.float32)
    total = tl.zeros([packed], tl.float32)
    mean = tl.zeros([packed, padded_value], tl.float32)
    begin = tl.min(first) // columns * columns
    end = tl.max(last) + 1
    for start in range(begin, end, columns):
        column = start + tl.arange(0, columns)
        there = column < end
        key_at = kv_head.to(tl.int64) * key_head + column[None, :].to(tl.int64) * key_token + dim[:, None]
        keys = tl.load(key + key_at, mask=there[None, :] & (dim < head_dim)[:, None], other=0.0)
        scores = _product(asked, keys, widen) * scaling
        seen = (column[None, :] >= first[:, None]) & (column[None, :] <= last[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp(scores - level[:, None])
        shrunk = tl.exp(highest - level)
        total = total * shrunk + tl.sum(weights, 1)
        at = kv_head.to(tl.int64) * value_head + column[:, None].to(tl.int64) * value_token + value_at[None, :]
        values = tl.load(value + at, mask=there[:, None] & (value_at < value_dim)[None, :], other=0.0)
        mean = mean * shrunk[:, None] + _product(weights.to(values.dtype), values, widen)
        highest = higher

    mean = mean / total[:, None]
    at = row[:, None].to(tl.int64) * output_row + head[:, None].to(tl.int64) * output_head + value_at[None, :]
    tl.store(output + at, mean.to(output.dtype.element_ty), mask=inside[:, None] & (value_at < value_dim)[None, :])


def attend(query: Tensor, key: Tensor, value: Tensor, intervals: Tensor, scaling: float | None = None) -> Tensor:
    """Attend from scattered rows, each to one interval of positions.

    Args:
        query: `[1, heads, rows, head_dim]`, rows sorted by position.
        key: `[1, kv_heads, length, head_dim]`, on the device of `query`.
        value: `[1, kv_heads, length, value_dim]`.
        intervals: int64 `[1, 1, rows, 2]`, first and last position that each row sees; none sees nothing.
        scaling: of the scores; None for `head_dim ** -0.5`.

    Returns:
        `[1, rows, heads, value_dim]` of the dtype of `query`.
    """
    _, heads, rows, head_dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    output = torch.empty(1, rows, heads, value_dim, dtype=query.dtype, device=query.device)
    heads_each = heads // kv_heads
    padded = _padded(head_dim)
    packed, columns = tile_of(query.dtype, padded)
    _attend[(triton.cdiv(rows * heads_each, packed), kv_heads)](
        query, key, value, intervals.contiguous(), output,
        query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2),
        output.stride(1), output.stride(2),
        rows, head_dim**-0.5 if scaling is None else scaling,
        heads_each, head_dim, value_dim,
        packed, columns, padded, _padded(value_dim), INTERPRETED,  # the interpreter multiplies no bfloat16
    )  # fmt: skip
    return output


def tile_of(dtype: torch.dtype, padded_dim: int) -> tuple[int, int]:
    """Return how many rows times heads, and how many keys, a tile has: as many as 99 KB of shared memory hold."""
    if dtype != torch.float32:
        return 64, 64
    return (32, 32) if padded_dim <= 128 else (16, 16)


def _padded(size: int) -> int:
    return int(max(LEAST_DIM, triton.next_power_of_2(size)))
