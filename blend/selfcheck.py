"""The proof, at wrap time, that a model is served right: two exactness properties on short random prompts.

1. Selective prefill gives the logits and the KV of the model's own prefill: with every token selected over
   wrong stored KV, where the model's `generate()` runs it, and with any tokens selected over right ones.
2. A chunk computed at one place and re-rotated to another equals the same chunk computed there.

A layer without RoPE shows in the second: its keys do not depend on the position, and are left alone.

In half precision a model's own rounding grows from layer to layer, in some models to more than any fixed tolerance.
So it is measured, and each error is judged against it. Logits and KV: how far the model's own prefill in two halves
is from that in one. Rotated keys: how far the layer's values are apart at the two places, which no rotation touches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from chunkcache.blend.cache import layer_kv
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.blend.prefill import SelectivePrefill
from chunkcache.blend.prefix import Prefix
from chunkcache.blend.reuse import Reuse
from chunkcache.blend.rotary import Rotary
from chunkcache.errors import SelfCheckError, UnsupportedModelError
from chunkcache.kv import ChunkKV, Span

TOKENS = 24
DELTA = 37
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2  # bfloat16 keeps 8 bits of mantissa; a noisier model is judged by its own noise
ROTATION_TOLERANCE = 2e-2  # at most: keys of the first layer have no noise but that of one rotation
OVER_NOISE = 3  # an error may be this many times the model's own: keys that are normalised have 2.4 times the values'
MOST = 0.5  # a limit above would tell nothing
UNROTATED = 0.75  # share of the error of keys that are left unrotated; more would not tell the two apart
GROWTH = 4  # what the position does to values is there in one layer, while rounding grows over many


@dataclass(frozen=True)
class Judged:
    """An error and what it was judged by; of several layers, the one that is nearest to its limit.

    Attributes:
        error: relative, `|a - b| / |b|` over the whole tensor.
        noise: the model's own error there, by rounding.
        limit: what the error must stay under.
    """

    error: float
    noise: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is under its limit (false for NaN)."""
        return self.error < self.limit


@dataclass(frozen=True)
class SelfCheck:
    """What the self-check measured.

    Attributes:
        logits: of the next token, selective prefill against the model's own.
        cache: keys and values, likewise.
        rotation: re-rotated keys, and values, against those computed in place.
        layers_without_rope: number of layers whose keys do not depend on the position.
        tolerance: what an error may be in the model's dtype, however small the model's own noise is.
    """

    logits: Judged
    cache: Judged
    rotation: Judged
    layers_without_rope: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether each error is under its limit."""
        return all(judged.passed for judged in (self.logits, self.cache, self.rotation))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a plain dict for JSON, such as `logits_error`, `logits_noise` and `logits_limit`."""
        parts = {"logits": self.logits, "cache": self.cache, "rotation": self.rotation}
        figures = {
            f"{part}_{name}": value for part, judged in parts.items() for name, value in asdict(judged).items()
        }
        return {
            **figures,
            "layers_without_rope": self.layers_without_rope,
            "tolerance": self.tolerance,
            "passed": self.passed,
        }


def self_check(decoder: Decoder) -> SelfCheck:
    """Check both properties, and tell `decoder` which layers have no RoPE, and their heads.

    Raises:
        SelfCheckError: an error is over its limit.
    """
    result = measure(decoder)
    named = (("logits", result.logits), ("KV", result.cache), ("re-rotation", result.rotation))
    failed = [
        f"{judged.error:.2g} ({name}) where its own noise of {judged.noise:.2g} allows {judged.limit:.2g}"
        for name, judged in named
        if not judged.passed
    ]
    if failed:
        raise SelfCheckError(
            f"{type(decoder.model).__name__} failed its self-check: it has a relative error of "
            f"{', and of '.join(failed)}; its KV cannot be reused right"
        )
    return result


@torch.no_grad()
def measure(decoder: Decoder) -> SelfCheck:
    """Like `self_check`, but return the figures also where they are over their limits."""
    generator = torch.Generator().manual_seed(0)
    embedding: Any = decoder.model.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (1, TOKENS), generator=generator)
    tolerance = tolerance_of(decoder)
    logits, own = own_prefill(decoder, ids)
    rotation = _check_rotation(decoder, ids, own, tolerance)
    on_logits, cache = _check_selective(decoder, ids, logits, own, tolerance)
    return SelfCheck(on_logits, cache, rotation, decoder.rotaries.count(None), tolerance)


def tolerance_of(decoder: Decoder) -> float:
    """Return what a relative error may be in the dtype of a model, however small the model's own noise is."""
    return TOLERANCE.get(decoder.dtype, HALF_TOLERANCE)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return `|value - reference| / |reference|` over the whole tensors."""
    value, reference = value.float(), reference.float()
    return float((value - reference).norm() / reference.norm())


def judge(error: float, noise: float, tolerance: float) -> Judged:
    """Judge an error by the model's own noise."""
    return Judged(error, noise, min(max(tolerance, OVER_NOISE * noise), MOST))


def own_prefill(
    decoder: Decoder, ids: Tensor, offset: int = 0, cache: DynamicCache | None = None
) -> tuple[Tensor, DynamicCache]:
    """Return the last logits `[vocab]` and the KV of the model's own prefill of `ids`, behind what is cached."""
    cache = DynamicCache() if cache is None else cache  # not by config: a sliding window would forget some of it
    positions = torch.arange(offset, offset + ids.shape[1])[None]
    device = decoder.device
    out = decoder.model(
        input_ids=ids.to(device), position_ids=positions.to(device), past_key_values=cache, use_cache=True
    )
    return out.logits[0, -1], cache


def _check_rotation(decoder: Decoder, ids: Tensor, here: DynamicCache, tolerance: float) -> Judged:
    keys, values = layer_kv(here, 0)
    if keys.shape != values.shape:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} has keys of {keys.shape[-1]} and values of {values.shape[-1]} "
            "dimensions (latent attention, MLA); chunkcache stores keys and values of one size"
        )
    layers = [layer_kv(here, index)[0] for index in range(len(here.layers))]
    decoder.heads = [(keys.shape[1], keys.shape[3]) for keys in layers]
    _, there = own_prefill(decoder, ids, DELTA)
    found: list[Judged] = []
    below = 0.0
    for index, rotary in enumerate(decoder.rotaries):
        (keys, values), (wanted, values_there) = layer_kv(here, index), layer_kv(there, index)
        keys, wanted = keys[0], wanted[0]
        noise = relative_error(values, values_there)
        found.append(Judged(noise, below, min(max(tolerance, GROWTH * below), MOST)))
        below = max(below, noise)
        error, otherwise = _rotated(rotary, keys, wanted), relative_error(keys, wanted)
        if otherwise < error:
            decoder.rotaries[index] = None
            error, otherwise = otherwise, error
        judged = judge(error, noise, min(tolerance, ROTATION_TOLERANCE))
        found.append(replace(judged, limit=min(judged.limit, UNROTATED * otherwise)))
    return _worst(found)


def _rotated(rotary: Rotary | None, keys: Tensor, wanted: Tensor) -> float:
    """Return the error of keys `[kv_heads, tokens, head_dim]` moved to another place; infinite without RoPE.

    It is that of the dimensions that are rotated, or of the others if that is larger: where few are, all together
    would hide what is wrong with them.
    """
    if rotary is None:
        return math.inf
    moved = torch.empty_like(keys)
    rotary.shift(keys, DELTA, moved)
    parts = [slice(rotary.rotary_dim), slice(rotary.rotary_dim, keys.shape[-1])]
    errors = [relative_error(moved[..., part], wanted[..., part]) for part in parts if moved[..., part].numel()]
    return float(torch.tensor(errors).max())  # NaN if one is


def _check_selective(
    decoder: Decoder, ids: Tensor, logits: Tensor, own: DynamicCache, tolerance: float
) -> tuple[Judged, Judged]:
    right = [torch.cat(layer_kv(own, index)) for index in range(len(own.layers))]
    wrong = [layer.neg() for layer in right]
    logits_errors: list[float] = []
    cache_errors: list[list[float]] = []
    trials: list[tuple[Policy, list[Tensor]]] = [(Prefix(), wrong), (Reuse(), right)]
    if len(decoder.layers) > 1:
        trials.append((CacheBlend(ratio=0.5), right))
    for policy, stored in trials:
        token_ids = ids[0].tolist()
        span = Span(4, TOKENS - 4, tuple(token_ids), 4, ChunkKV.of(token_ids, 0, stored))
        try:
            prefill = SelectivePrefill(decoder, Plan.of(token_ids, [span]), policy, trim=False)
            fused_logits = _generated(prefill, ids) if policy.stores_in_context else prefill.run()
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise SelfCheckError(
                f"{type(decoder.model).__name__} fails when only some rows are computed "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}); its KV cannot be reused"
            ) from error
        logits_errors.append(relative_error(fused_logits, logits))
        cache_errors.append(_cache_errors(prefill.cache, own))

    half = TOKENS // 2
    _, halves = own_prefill(decoder, ids[:, :half])
    again, _ = own_prefill(decoder, ids[:, half:], half, halves)
    noise, noises = relative_error(again, logits), _cache_errors(halves, own)
    on_logits = [judge(error, noise, tolerance) for error in logits_errors]
    on_cache = [
        judge(error, of_layer, tolerance)
        for errors in cache_errors
        for error, of_layer in zip(errors, noises, strict=True)
    ]
    return _worst(on_logits), _worst(on_cache)


def _cache_errors(cache: DynamicCache, own: DynamicCache) -> list[float]:
    """Return the errors of keys and values of each layer in turn."""
    pairs = ((layer_kv(cache, index), layer_kv(own, index)) for index in range(len(own.layers)))
    return [
        relative_error(value, wanted) for mine, theirs in pairs for value, wanted in zip(mine, theirs, strict=True)
    ]


def _generated(prefill: SelectivePrefill, ids: Tensor) -> Tensor:
    """Return the logits of the first token that the model's `generate()` decodes after a selective prefill."""
    ids = ids.to(prefill.model.device)
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    prefill.model.generation_config = config  # the shadow's: the model's own may ask for beams, or for another cache
    output = prefill.generate(ids, attention_mask=torch.ones_like(ids))
    logits: Tensor = output.logits[0][0]
    return logits


def _worst(found: Sequence[Judged]) -> Judged:
    """Return the one with the largest share of its limit, and one that is not a number before all others."""
    shares = torch.tensor([judged.error for judged in found]) / torch.tensor([judged.limit for judged in found])
    return found[int(shares.nan_to_num(nan=torch.inf, posinf=torch.inf).argmax())]
