"""Attention of selected rows on an accelerator: the CPU's result, without masks and copies that it does not need."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import zoo
from pretend import PretendDevice
from support.llm import QUESTION, TEXTS, own_model, wrapped
from torch import nn
from transformers.cache_utils import DynamicCache

from chunkcache.blend import Decoder
from chunkcache.blend.attention import Watch, contiguous_from, rows_attention, upper, visible_intervals
from chunkcache.blend.hydragen import SharedCache
from chunkcache.blend.ragged import RaggedDecoder

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 60
MASK_OPS = ("le", "ge", "bitwise_and", "bitwise_not", "masked_fill_", "tril", "arange", "where", "ones", "zeros")
CONTIGUOUS = {"question": (50, 60), "whole": (0, 60), "in the middle": (20, 40), "one row": (59, 60)}


class Attention(nn.Module):
    """What attention functions read off their module."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def tensors(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    shapes = ((HEADS, rows), (KV_HEADS, LENGTH), (KV_HEADS, LENGTH))
    return [torch.randn(1, heads, tokens, DIM, generator=generator).to(dtype) for heads, tokens in shapes]


def on_device(parts, rows, window, first=None, module=None):
    """Attend on a pretend device; return the output, and the launches of a second layer."""
    with PretendDevice() as device:
        parts = [part.to("cuda:0") for part in parts]
        rows = torch.tensor(rows).to("cuda:0")
        intervals = visible_intervals(rows if first is None else contiguous_from(rows, first), window)
        rows_attention(module or Attention(), *parts, intervals, scaling=0.4)
        with device.watch() as seen:
            output, _ = rows_attention(module or Attention(), *parts, intervals, scaling=0.4)
        assert not device.total.violations
        assert not seen.syncs
        return output.cpu(), seen.ops


def close(output, expected):
    tolerance = 1e-5 if expected.dtype == torch.float32 else 0.03
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", CONTIGUOUS)
def test_contiguous_rows_take_a_causal_kernel_and_nothing_else(where, dtype):
    first, end = CONTIGUOUS[where]
    rows = list(range(first, end))
    parts = tensors(len(rows), dtype)
    expected, _ = rows_attention(Attention(), *parts, visible_intervals(torch.tensor(rows), None), scaling=0.4)
    output, ops = on_device(parts, rows, None, first)
    close(output, expected)
    assert not set(ops) & set(MASK_OPS)
    if dtype == torch.bfloat16:
        assert ops == Counter({"_scaled_dot_product_flash_attention": 1})
    else:
        assert ops == Counter({"sdpa" if where == "whole" else "_efficient_attention_forward": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 8])
def test_scattered_rows_take_one_mask_for_all_layers(window, dtype):
    rows = [1, 5, 6, 20, 31, 58, 59]
    parts = tensors(len(rows), dtype)
    expected, _ = rows_attention(Attention(), *parts, visible_intervals(torch.tensor(rows), window), scaling=0.4)
    output, ops = on_device(parts, rows, window)
    close(output, expected)
    assert ops == Counter({"_scaled_dot_product_efficient_attention": 1})


def test_a_window_hides_keys_from_contiguous_rows_by_a_mask():
    rows = list(range(40, 60))
    parts = tensors(len(rows))
    for window in (8, 59, 60):  # the last hides nothing
        expected, _ = rows_attention(Attention(), *parts, visible_intervals(torch.tensor(rows), window), scaling=0.4)
        output, ops = on_device(parts, rows, window, 40)
        close(output, expected)
        assert ("_scaled_dot_product_efficient_attention" in ops) == (window < 60)


@pytest.mark.parametrize("window", [None, 8])
def test_the_first_rows_of_a_mask_are_as_contiguous_as_all_of_them(window):
    rows = torch.arange(20, 60)
    parts = tensors(15)
    expected, _ = rows_attention(Attention(), *parts, visible_intervals(rows[:15], window), scaling=0.4)
    with PretendDevice() as device:
        intervals = visible_intervals(contiguous_from(rows.to("cuda:0"), 20), window)
        parts = [part.to("cuda:0") for part in parts]
        with device.watch() as seen:
            output, _ = rows_attention(Attention(), *parts, upper(intervals, 15), scaling=0.4)
        assert set(MASK_OPS).isdisjoint(seen.ops) == (window is None)
        close(output.cpu(), expected)


@pytest.mark.parametrize("first", [None, 0])
def test_a_look_at_the_last_rows_leaves_the_others_their_kernel(first):
    rows, seen = list(range(60)), []
    module = Attention()
    watch = Watch(module, 10, lambda weights, _: seen.append(weights))
    parts = tensors(60)
    expected, _ = rows_attention(module, *parts, visible_intervals(torch.tensor(rows), None), scaling=0.4)
    output, ops = on_device(parts, rows, None, first, module=module)
    watch.remove()
    close(output, expected)
    close(seen[-1].elem, seen[0])
    assert not set(ops) & set(MASK_OPS) - {"masked_fill_"}  # of the weights that are looked at


def test_a_decoding_step_names_its_kernel_too():
    parts = tensors(1, torch.bfloat16)
    expected, _ = rows_attention(Attention(), *parts, None, scaling=0.4)
    with PretendDevice() as device:
        parts = [part.to("cuda:0") for part in parts]
        with device.watch() as seen:
            output, _ = rows_attention(Attention(), *parts, None, scaling=0.4)
        assert seen.ops == Counter({"_scaled_dot_product_flash_attention": 1})
        close(output.cpu(), expected)


def test_sequences_of_several_lengths_name_their_kernel_too():
    model = own_model("llama", dtype=torch.bfloat16)
    ids = [torch.arange(3, 3 + length)[None] for length in (5, 9)]
    wanted = [model(each).logits[0, -1] for each in ids]
    with PretendDevice() as device:
        decoder = Decoder(model.to("cuda:0"))
        caches = [DynamicCache(config=decoder.config) for _ in ids]
        for each, cache in zip(ids, caches, strict=True):
            decoder.prefill(each[:, :-1], cache)
        ragged = RaggedDecoder(decoder)
        with device.watch() as seen:
            logits = ragged.step([int(each[0, -1]) for each in ids], caches)
        assert seen.ops["_scaled_dot_product_flash_attention"] == len(ids) * len(decoder.layers)
        assert not device.total.violations
        torch.testing.assert_close(logits.cpu(), torch.stack(wanted), atol=0.5, rtol=0)


def test_what_is_known_of_rows_is_forgotten_where_they_move():
    rows = [3, 9, 30]
    parts = tensors(3)
    expected, _ = rows_attention(Attention(), *parts, visible_intervals(torch.tensor(rows), None), scaling=0.4)
    with PretendDevice(count=2):
        intervals = visible_intervals(torch.tensor(rows).to("cuda:0"), None).to("cuda:1")
        output, _ = rows_attention(Attention(), *(part.to("cuda:1") for part in parts), intervals, scaling=0.4)
        close(output.cpu(), expected)


@pytest.mark.parametrize(
    ("family", "policy", "dtype"),
    [
        ("llama", "prefix", torch.bfloat16),
        ("llama", "link:k=4", torch.bfloat16),
        ("llama", "query:ratio=0.1", torch.float32),
        ("gemma3", "query:ratio=0.1", torch.bfloat16),
    ],
)
def test_a_request_makes_no_mask_in_any_layer(family, policy, dtype):
    options = {"policy": policy}
    with wrapped(own_model(family, dtype=dtype), **options) as llm:
        expected = llm.prefill(QUESTION, TEXTS).logits
    made = {}
    for layers in (2, 4):  # masks are of a request, not of a layer
        with PretendDevice() as device:
            own = own_model(family, dtype=dtype, num_hidden_layers=layers, **_types(family, layers)).to("cuda:0")
            with wrapped(own, **options) as llm:
                llm.precompute(TEXTS)
                with device.watch() as seen:
                    logits = llm.prefill(QUESTION, TEXTS).logits
            assert not device.total.violations
            made[layers] = {name: seen.ops[name] for name in ("le", "ge", "bitwise_and", "bitwise_not")}
            assert "sdpa with a mask" not in seen.ops
            if layers == 4:
                torch.testing.assert_close(logits.cpu(), expected, atol=0.01 if dtype == torch.float32 else 1, rtol=0)
    assert made[2] == made[4]


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_sequences_that_decode_together_make_their_masks_once_a_step(family):
    config = Decoder(zoo.build(family)).config
    with PretendDevice() as device:
        shared = [tuple(torch.randn(2, 2, 12, 16).to("cuda:0").unbind(0)) for _ in range(zoo.LAYERS)]
        cache = SharedCache(config, shared, [0, 2], 8)
        launches = []
        for rows in (3, 1, 1):
            for layer in range(zoo.LAYERS):
                key, value, query = (torch.randn(2, heads, rows, 16).to("cuda:0") for heads in (2, 2, 4))
                with device.watch() as seen:
                    cache.attend(layer, query, cache.update(key, value, layer))
                launches.append(seen.launches)
                assert not seen.syncs
                assert layer == 0 or set(MASK_OPS).isdisjoint(set(seen.ops) - {"masked_fill_"})
    for step in range(0, len(launches), zoo.LAYERS):
        assert len(set(launches[step + 1 : step + zoo.LAYERS])) == 1


def _types(family, layers):
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return {"layer_types": kinds} if family == "gemma3" else {}
