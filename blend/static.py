"""Hands a prefilled prompt over to a cache of fixed size, with which transformers can compile decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import Cache, StaticCache, StaticSlidingWindowLayer

from chunkcache.blend.cache import layer_kv

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def static_copy(config: PreTrainedConfig, cache: Cache, length: int) -> StaticCache:
    """Return a copy of the keys and values of `cache` in a `StaticCache`.

    Args:
        config: the model's text config.
        cache: of one sequence, after its prefill: sliding-window layers hold the last `window - 1` tokens at most.
        length: tokens that the copy has room for, those of `cache` included.
    """
    static = StaticCache(config=config, max_cache_len=length)
    tokens = int(cache.get_seq_length())
    for index, target in enumerate(static.layers):
        keys, values = layer_kv(cache, index)
        layer: Any = target
        layer.lazy_initialization(keys, values)
        held = keys.shape[2]
        # A window that is full moves on by one token at each step: the first of its places is about to be left.
        start = layer.max_cache_len - held if tokens >= layer.max_cache_len else 0
        layer.keys[:, :, start : start + held] = keys
        layer.values[:, :, start : start + held] = values
        layer.cumulative_length.fill_(tokens)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int = tokens
    return static
