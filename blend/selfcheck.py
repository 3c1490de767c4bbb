"""The proof, at wrap time, that a model is served right: two exactness properties on short random prompts.

1. Selective prefill gives the logits and the KV of the model's own prefill: with every token selected over
   wrong stored KV, where the model's `generate()` runs it, and with any tokens selected over right ones.
2. A chunk computed at one place and re-rotated to another equals the same chunk computed there.

A layer without RoPE shows in the second: its keys do not depend on the position, and are left alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from chunkcache.errors import SelfCheckError, UnsupportedModelError
from chunkcache.kv import ChunkKV, Span

TOKENS = 24
DELTA = 37
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2  # bfloat16 keeps 8 bits of mantissa, and rounding adds up over the layers


@dataclass(frozen=True)
class SelfCheck:
    """What the self-check measured; errors are relative, `|a - b| / |b|` over the whole tensor.

    Attributes:
        logits_error: of the next-token logits, selective prefill against the model's own.
        cache_error: of keys and values, likewise; the worst layer.
        rotation_error: of re-rotated keys, and of values, against those computed in place; the worst layer.
        layers_without_rope: number of layers whose keys do not depend on the position.
        tolerance: what each error must stay under in the model's dtype.
    """

    logits_error: float
    cache_error: float
    rotation_error: float
    layers_without_rope: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether each error is under the tolerance (false for NaN)."""
        return all(e < self.tolerance for e in (self.logits_error, self.cache_error, self.rotation_error))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a plain dict for JSON."""
        return {**asdict(self), "passed": self.passed}


@torch.no_grad()
def self_check(decoder: Decoder) -> SelfCheck:
    """Check both properties, and tell `decoder` which layers have no RoPE, and their heads.

    Raises:
        SelfCheckError: an error is over the tolerance of the model's dtype.
    """
    generator = torch.Generator().manual_seed(0)
    embedding: Any = decoder.model.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (1, TOKENS), generator=generator)
    logits, own = _own_prefill(decoder, ids)
    rotation_error = _check_rotation(decoder, ids, own)
    logits_error, cache_error = _check_selective(decoder, ids, logits, own)
    result = SelfCheck(
        logits_error=logits_error,
        cache_error=cache_error,
        rotation_error=rotation_error,
        layers_without_rope=decoder.rotaries.count(None),
        tolerance=TOLERANCE.get(decoder.dtype, HALF_TOLERANCE),
    )
    if not result.passed:
        raise SelfCheckError(
            f"{type(decoder.model).__name__} failed its self-check: relative errors are {logits_error:.2g} (logits), "
            f"{cache_error:.2g} (KV) and {rotation_error:.2g} (re-rotation), over {result.tolerance:.2g}; "
            "its KV cannot be reused right"
        )
    return result


def _own_prefill(decoder: Decoder, ids: Tensor, offset: int = 0) -> tuple[Tensor, DynamicCache]:
    cache = DynamicCache()  # not by config: a sliding-window layer would forget what is compared here
    positions = torch.arange(offset, offset + ids.shape[1])[None]
    device = decoder.device
    out = decoder.model(
        input_ids=ids.to(device), position_ids=positions.to(device), past_key_values=cache, use_cache=True
    )
    return out.logits[0, -1], cache


def _check_rotation(decoder: Decoder, ids: Tensor, here: DynamicCache) -> float:
    keys, values = layer_kv(here, 0)
    if keys.shape != values.shape:
        raise UnsupportedModelError(
            f"{type(decoder.model).__name__} has keys of {keys.shape[-1]} and values of {values.shape[-1]} "
            "dimensions (latent attention, MLA); chunkcache stores keys and values of one size"
        )
    layers = [layer_kv(here, index)[0] for index in range(len(here.layers))]
    decoder.heads = [(keys.shape[1], keys.shape[3]) for keys in layers]
    _, there = _own_prefill(decoder, ids, DELTA)
    errors: list[float] = []
    for index, rotary in enumerate(decoder.rotaries):
        (keys, values), (wanted, values_there) = layer_kv(here, index), layer_kv(there, index)
        keys, wanted = keys[0], wanted[0]
        moved = torch.empty_like(keys)
        if rotary is not None:
            rotary.shift(keys, DELTA, moved)
        with_rope, without = _error(moved, wanted), _error(keys, wanted)
        if without < with_rope:
            decoder.rotaries[index] = None
        errors += [min(with_rope, without), _error(values, values_there)]
    return _worst(errors)


def _check_selective(decoder: Decoder, ids: Tensor, logits: Tensor, own: DynamicCache) -> tuple[float, float]:
    right = [torch.cat(layer_kv(own, index)) for index in range(len(own.layers))]
    wrong = [layer.neg() for layer in right]
    logits_errors: list[float] = []
    cache_errors: list[float] = []

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
        logits_errors.append(_error(fused_logits, logits))
        for index in range(len(own.layers)):
            pairs = zip(layer_kv(prefill.cache, index), layer_kv(own, index), strict=True)
            cache_errors.extend(_error(value, wanted) for value, wanted in pairs)
    return _worst(logits_errors), _worst(cache_errors)


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


def _worst(errors: list[float]) -> float:
    """Return the largest error, and NaN if one of them is."""
    return float(torch.tensor(errors).max())


def _error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.float(), reference.float()
    return float((value - reference).norm() / reference.norm())
