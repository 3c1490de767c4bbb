"""A decoding step's attention, timed by itself: over one copy of shared KV, and over a copy for each sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from chunkcache.blend.hydragen import SharedCache
from chunkcache.kv.device import synchronize

OWN_TOKENS = 48  # behind the shared ones


@torch.no_grad()
def time_attention(model: PreTrainedModel, sequences: int, tokens: int, repeats: int = 7) -> dict[str, Any]:
    """Time a decoding step's attention over one copy of `tokens` shared KV, and with SDPA over a copy per sequence.

    Random KV of the model's shape, in four layers by turns, so that no cache of the processor holds them all, and
    none with a sliding window. Query heads that share a KV head go to SDPA as such, or packed as its rows: what is
    faster counts. Medians in seconds per layer.
    """
    config = model.config.get_text_config(decoder=True)
    heads, layers = config.num_attention_heads, 4
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=model.dtype, device=model.device)

    query, own = some(sequences, heads, 1, dim), some(2, sequences, kv_heads, OWN_TOKENS, dim)
    shared = [(some(kv_heads, tokens, dim), some(kv_heads, tokens, dim)) for _ in range(layers)]
    cache = SharedCache(
        PreTrainedConfig.from_dict({"num_hidden_layers": layers}), shared, [0] * sequences, OWN_TOKENS
    )
    whole = [
        [torch.cat((part.expand(sequences, -1, -1, -1), mine), dim=2) for part, mine in zip(kv, own, strict=True)]
        for kv in shared
    ]
    packed = query.view(sequences, kv_heads, -1, dim)
    attend = torch.nn.functional.scaled_dot_product_attention
    ways: dict[str, Callable[[int], Tensor]] = {
        "shared": lambda index: cache.attend(index, query, (own[0], own[1])),
        "grouped": lambda index: attend(query, whole[index][0], whole[index][1], enable_gqa=heads != kv_heads),
        "packed": lambda index: attend(packed, whole[index][0], whole[index][1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            synchronize(model.device)
            started = time.perf_counter()
            for index in range(layers):
                way(index)
            synchronize(model.device)
            if turn:  # the first is to warm up
                seconds[name].append((time.perf_counter() - started) / layers)
    found = {name: statistics.median(each) for name, each in seconds.items()}
    copies = min(found["grouped"], found["packed"])
    return {
        "kind": "attention", "sequences": sequences, "tokens": tokens, "shared_s": found["shared"],
        "repeated_s": copies,
    }  # fmt: skip
