"""Attention from scattered rows: equal to plain dense attention, whatever the rows, windows and heads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from chunkcache.blend.attention import (
    BLOCK_ROWS,
    LOOK_ROWS,
    Watch,
    _blocks,
    additive_mask,
    dense_mask,
    rows_attention,
    visible_intervals,
)
from chunkcache.errors import UnsupportedModelError


class Attention(nn.Module):
    """What transformers' attention functions read off their module."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def tensors(rows, length, heads=4, kv_heads=2, head_dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + length)

    def random(count, tokens):
        return torch.randn(1, count, tokens, head_dim, generator=generator).to(dtype)

    return random(heads, rows), random(kv_heads, length), random(kv_heads, length)


def by_hand(query, key, value, rows, window, scaling):
    """Dense attention in float64, one row and head at a time."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    output = torch.empty(query.shape[0], len(rows), query.shape[1], value.shape[3], dtype=torch.float64)
    for head in range(query.shape[1]):
        for i, row in enumerate(rows):
            first = 0 if window is None else max(0, row - window + 1)
            seen = slice(first, row + 1)
            scores = key[0, head // groups, seen] @ query[0, head, i] * scaling
            output[0, i, head] = scores.softmax(0) @ value[0, head // groups, seen]
    return output


def attend(query, key, value, rows, window=None, scaling=0.4, module=None, **kwargs):
    module = module or Attention(query.shape[1] // key.shape[1])
    intervals = visible_intervals(torch.tensor(rows), window)
    return rows_attention(module, query, key, value, intervals, scaling=scaling, **kwargs)


@given(
    rows=st.sets(st.integers(0, 199), min_size=1, max_size=40),
    window=st.none() | st.integers(1, 250),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_any_rows_windows_and_heads_give_plain_dense_attention(rows, window, kv_heads):
    rows = sorted(rows)
    query, key, value = tensors(len(rows), 200, kv_heads=kv_heads)
    output, weights = attend(query, key, value, rows, window)
    assert weights is None
    expected = by_hand(query, key, value, rows, window, 0.4).float()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 3])
@pytest.mark.parametrize("window", [None, 8])
def test_any_number_of_blocks_gives_plain_dense_attention(count, window):
    rows = list(range(0, 2 * count, 2))
    query, key, value = tensors(count, 2 * count)
    output, _ = attend(query, key, value, rows, window)
    expected = by_hand(query, key, value, rows, window, 0.4).float()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "cost"), [(None, 300), (20, 500)])
def test_rows_that_see_other_keys_are_blocks_of_their_own(window, cost, monkeypatch):
    monkeypatch.setattr("chunkcache.blend.attention.BLOCK_COST", cost)
    rows = [3, 4, 5, *range(100, 130), 300, *range(900, 910)]
    query, key, value = tensors(len(rows), 910)
    seen = []
    attend_to = functional.scaled_dot_product_attention

    def sdpa(query, key, value, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return attend_to(query, key, value, **kwargs)

    monkeypatch.setattr("chunkcache.blend.attention.F.scaled_dot_product_attention", sdpa)
    output, _ = attend(query, key, value, rows, window)
    torch.testing.assert_close(output, by_hand(query, key, value, rows, window, 0.4).float(), atol=1e-5, rtol=0)
    keys = [6, 130, 301, 910] if window is None else [6, 49, 20, 29]
    assert seen == list(zip((3, 30, 1, 10), keys, strict=True))


def test_contiguous_rows_are_few_blocks_of_equal_size():
    for window in (None, 512):
        intervals = visible_intervals(torch.arange(700, 1000), window)
        blocks = [block for block, _, _ in _blocks(intervals, 300)]
        assert blocks == [slice(at, at + 60) for at in range(0, 300, 60)]
        assert [block for block, _, _ in _blocks(intervals, 70)] == [slice(0, 35), slice(35, 70)]


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("cost", [0, 40, 150, 10**6])
def test_no_other_blocks_cost_less(window, cost, monkeypatch):
    monkeypatch.setattr("chunkcache.blend.attention.BLOCK_COST", cost)
    monkeypatch.setattr("chunkcache.blend.attention.BLOCK_ROWS", 7)
    rows = [2, 3, 9, 30, 31, 33, 60, 64, 65, 66]
    first = [0 if window is None else max(0, row - window + 1) for row in rows]

    def price(cuts):
        pairs = itertools.pairwise((0, *cuts, len(rows)))
        return sum(
            (stop - start) * (rows[stop - 1] + 1 - first[start]) + cost if stop - start <= 7 else math.inf
            for start, stop in pairs
        )

    every = (cuts for n in range(len(rows)) for cuts in itertools.combinations(range(1, len(rows)), n))
    blocks = _blocks(visible_intervals(torch.tensor(rows), window), len(rows))
    assert price([block.start for block, _, _ in blocks[1:]]) == min(map(price, every))
    assert [(first[b.start], rows[b.stop - 1] + 1) for b, _, _ in blocks] == [(low, high) for _, low, high in blocks]


def test_bfloat16_stays_bfloat16_and_near():
    rows = list(range(10, 90))
    query, key, value = tensors(80, 100, dtype=torch.bfloat16)
    output, _ = attend(query, key, value, rows)
    assert output.dtype == torch.bfloat16
    expected = by_hand(query, key, value, rows, None, 0.4)
    torch.testing.assert_close(output.double(), expected, atol=0.03, rtol=0)


def test_a_value_head_may_be_smaller_than_a_key_head():
    query, key, value = tensors(3, 9)
    output, _ = attend(query, key, value[..., :5], [2, 4, 8])
    assert output.shape == (1, 3, 4, 5)


def test_no_scaling_means_the_default_scaling():
    query, key, value = tensors(3, 9)
    output, _ = attend(query, key, value, [2, 4, 8], scaling=None)
    expected, _ = attend(query, key, value, [2, 4, 8], scaling=8**-0.5)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32])
def test_a_mask_of_another_call_goes_to_transformers_sdpa_untouched(dtype):
    query, key, value = tensors(6, 6)
    mask = None if dtype is None else torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(2).to(dtype)
    expected, _ = sdpa_attention_forward(Attention(2), query, key, value, mask, scaling=0.4)
    output, _ = rows_attention(Attention(2), query, key, value, mask, scaling=0.4)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    "extras", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"softcap": 1.0, "position_bias": torch.zeros(1)}]
)
def test_what_sdpa_cannot_do_is_refused_and_named(extras):
    with pytest.raises(UnsupportedModelError, match=rf"{', '.join(extras)}; load .*attn_implementation='eager'"):
        attend(*tensors(2, 4), rows=[1, 3], **extras)


def test_extras_that_are_off_are_no_obstacle():
    expected, _ = attend(*tensors(2, 4), rows=[1, 3])
    output, _ = attend(*tensors(2, 4), rows=[1, 3], softcap=None, s_aux=None)
    assert torch.equal(output, expected)


def test_an_interval_is_the_first_and_last_visible_position():
    rows = torch.tensor([0, 3, 9])
    assert visible_intervals(rows, None).tolist() == [[[[0, 0], [0, 3], [0, 9]]]]
    assert visible_intervals(rows, 4).tolist() == [[[[0, 0], [0, 3], [6, 9]]]]
    assert visible_intervals(rows, None).dtype == torch.int64


@pytest.mark.parametrize("window", [None, 1, 4, 7])
def test_where_some_positions_are_missing_an_interval_counts_those_that_are_there(window):
    rows, columns = torch.tensor([1, 6, 9]), torch.tensor([0, 1, 4, 6, 8, 9])
    expected = dense_mask(visible_intervals(rows, window), 10)[..., columns]
    assert torch.equal(dense_mask(visible_intervals(rows, window, columns), len(columns)), expected)


def test_a_dense_mask_shows_what_the_intervals_say():
    mask = dense_mask(visible_intervals(torch.tensor([0, 3]), 2), 5)
    assert mask.int().tolist() == [[[[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_is_zero_where_the_dense_one_is_true(dtype):
    intervals = visible_intervals(torch.tensor([1, 4, 6]), 3)
    mask = additive_mask(intervals, 7, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, dense_mask(intervals, 7))
    assert (mask[mask != 0] == torch.finfo(dtype).min).all()


def weights_by_hand(query, key, rows, window, scaling):
    """Attention weights `[1, heads, rows, length]` in float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    hidden = ~dense_mask(visible_intervals(torch.tensor(rows), window), key.shape[2])
    scores = query.double() @ key.transpose(2, 3) * scaling
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


class Module(torch.nn.Module):
    """An attention module as a watch wants one."""

    num_key_value_groups = 2

    def forward(self, *call):
        return attend(*call, module=self)


def watched(last, block, *call):
    """The output, the weights `[heads, last, length]` that a watch saw, and the blocks it saw them in."""
    seen, module = [], Module()
    watch = Watch(module, last, lambda weights, first: seen.append((first, weights)), block)
    output, _ = module(*call)
    watch.remove()
    assert vars(module).keys() == vars(Module()).keys()
    module(*call)  # unseen
    return output, torch.cat([weights for _, weights in seen], dim=1), [first for first, _ in seen]


@pytest.mark.parametrize(
    ("last", "block", "firsts"), [(1, None, [0]), (5, 2, [0, 2, 4]), (90, None, [0]), (90, 64, [0, 64])]
)
@pytest.mark.parametrize("window", [None, 8])
def test_a_watch_sees_the_weights_of_the_last_rows(last, block, firsts, window):
    rows = list(range(10, 100))
    query, key, value = tensors(90, 100)
    output, weights, seen_at = watched(last, block, query, key, value, rows, window)
    expected = by_hand(query, key, value, rows, window, 0.4).float()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    expected = weights_by_hand(query, key, rows, window, 0.4)[0, :, -last:].float()
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    assert seen_at == firsts


def test_a_watch_of_a_long_question_sees_its_last_rows():
    rows = list(range(300))
    query, key, value = tensors(300, 300)
    output, weights, seen_at = watched(299, None, query, key, value, rows)
    torch.testing.assert_close(output, by_hand(query, key, value, rows, None, 0.4).float(), atol=1e-5, rtol=0)
    expected = weights_by_hand(query, key, rows, None, 0.4)[0, :, -LOOK_ROWS:].float()
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    assert seen_at == [0]


def test_a_watch_on_eager_attention_sees_no_more_rows():
    seen, module = [], Module()
    module.forward = lambda: (None, torch.zeros(1, 4, 300, 310))
    Watch(module, 200, lambda weights, first: seen.append(weights.shape))
    module()
    assert seen == [(4, LOOK_ROWS, 310)]


def test_a_watch_sees_the_weights_of_bfloat16_before_they_are_rounded():
    rows = list(range(20))
    query, key, value = tensors(20, 20, dtype=torch.bfloat16)
    output, weights, _ = watched(4, None, query, key, value, rows)
    assert (output.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    expected = by_hand(query, key, value, rows, None, 0.4)
    torch.testing.assert_close(output.double(), expected, atol=0.03, rtol=0)
