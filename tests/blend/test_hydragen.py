"""Sequences over one copy of shared KV see what they would see alone."""

from __future__ import annotations

import pytest
import torch
import zoo
from support.blend import decoder, own_prefill, random_ids
from torch import Tensor
from transformers import DynamicCache

from chunkcache.blend import hydragen
from chunkcache.blend.hydragen import SharedCache, can_share, over_shared, padded
from chunkcache.errors import InputError

SHARED = 40  # tokens; five sliding windows


def plain(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None
):
    """Attention of one sequence's last rows as it is defined: `[heads, rows, head_dim]`."""
    heads, rows, dim = query.shape
    keys, values = (part.repeat_interleave(heads // part.shape[0], dim=0) for part in (keys, values))
    scores = query @ keys.transpose(1, 2) * dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    index = torch.arange(keys.shape[1])
    hidden = index > index[-rows:, None]
    if window is not None:
        hidden = hidden | (index <= index[-rows:, None] - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, rows, 1)), dim=-1)
    weights = scores.softmax(-1)
    return weights[..., : keys.shape[1]] @ values


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tails", [(5,), (5, 5), (1, 9, 4), (300, 2)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, False), (8, None, False), (None, 2.0, True)])
def test_equals_plain_attention(kv_heads, tails, window, softcap, sinks):
    torch.manual_seed(0)
    heads, dim, longest = 4, 16, max(tails)
    config = zoo.build("mistral-sliding" if window else "llama").config
    shared = (torch.randn(kv_heads, SHARED, dim), torch.randn(kv_heads, SHARED, dim))
    pads = [longest - tail for tail in tails]
    cache = SharedCache(config, [shared] * zoo.LAYERS, pads, longest + 1)
    sink = torch.randn(heads) if sinks else None
    own = torch.randn(
        3, len(tails), heads, longest + 1, dim
    )  # queries, keys, values: the questions and one token more
    query, key, value = own[0], own[1][:, :kv_heads], own[2][:, :kv_heads]
    for first, last in ((0, longest), (longest, longest + 1)):
        mine = cache.update(key[:, :, first:last], value[:, :, first:last], 1)
        found = cache.attend(1, query[:, :, first:last], mine, None, softcap, sink)
        for number, pad in enumerate(pads):
            skip = max(pad - first, 0)
            keys, values = (torch.cat((s, o[number, :, pad:]), dim=1) for s, o in zip(shared, mine, strict=True))
            wanted = plain(query[number, :, first + skip : last], keys, values, window, softcap, sink)
            torch.testing.assert_close(found[number, skip:].transpose(0, 1), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [False, True])
def test_half_precision_is_as_good_as_its_rounding(dtype, sinks):
    torch.manual_seed(0)
    tokens, dim = 3000, 16
    shared = (torch.randn(2, tokens, dim).to(dtype), (100 + torch.randn(2, tokens, dim)).to(dtype))
    own = torch.randn(3, 2, 4, 6, dim).to(dtype)
    query, key, value = own[0], own[1][:, :2], own[2][:, :2]
    cache = SharedCache(zoo.build("llama").config, [shared] * zoo.LAYERS, [0, 2], 6)
    sink = torch.randn(4).to(dtype) if sinks else None
    found = cache.attend(0, query, cache.update(key, value, 0), None, None, sink)
    assert found.dtype == dtype
    assert found.isfinite().all()  # 3000 values of 100 add up to more than float16 holds
    for number, pad in enumerate((0, 2)):
        keys, values = (
            torch.cat((s, o[number, :, pad:]), dim=1).float() for s, o in zip(shared, (key, value), strict=True)
        )
        wanted = plain(
            query[number, :, pad:].float(), keys, values, None, None, None if sink is None else sink.float()
        )
        torch.testing.assert_close(
            found[number, pad:].transpose(0, 1).float(), wanted, atol=0.1, rtol=2 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_decodes_together(dtype):
    assert can_share(decoder("llama", dtype=dtype))


@pytest.mark.parametrize(("name", "attention"), zoo.SERVED)
def test_a_model_over_shared_kv_gives_the_logits_of_each_sequence_alone(name, attention):
    checked = decoder(name, attention)
    shared, tails = random_ids(SHARED), [random_ids(3, 2), random_ids(7, 3), random_ids(1, 4)]
    _, own = own_prefill(checked.model, shared)
    ids, mask, pads = padded(shared, tails, checked.device)
    cache = SharedCache(checked.config, [(x.keys[0], x.values[0]) for x in own.layers], pads, 9)
    model = over_shared(checked, cache)
    step, more = ids[:, SHARED:], [11, 12, 13]
    for extra in ([], [[token] for token in more]):
        if extra:
            step = torch.tensor(extra)
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.int64)), dim=1)
        positions = (mask.cumsum(-1) - 1)[:, -step.shape[1] :]
        with torch.no_grad():
            logits = model(input_ids=step, position_ids=positions, attention_mask=mask, past_key_values=cache).logits
        for number, tail in enumerate(tails):
            behind = (*tail, more[number]) if extra else tail
            wanted, _ = own_prefill(checked.model, (*shared, *behind), cache=DynamicCache())
            torch.testing.assert_close(logits[number, -1], wanted[-1], atol=1e-4, rtol=1e-3)
    assert cache.get_seq_length() == SHARED + 8


def test_the_check_tells_a_model_whose_attention_is_its_own(monkeypatch):
    assert can_share(decoder("llama"))
    attend = SharedCache.attend
    monkeypatch.setattr(SharedCache, "attend", lambda *args: attend(*args).flip(0))
    assert not can_share(decoder("llama"))
    monkeypatch.setattr(hydragen, "over_shared", lambda *args: None)
    assert not can_share(decoder("llama"))


def test_a_cache_without_room_says_so():
    cache = SharedCache(zoo.build("llama").config, [(torch.zeros(2, 4, 8),) * 2] * zoo.LAYERS, [0], 2)
    with pytest.raises(InputError, match="grew to 3 tokens"):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
