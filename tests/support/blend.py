"""Shared by the tests of the blend room: decoders of the zoo, plans over stored KV, references to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import zoo
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from chunkcache.blend import Decoder, Plan, Policy, SelectivePrefill, self_check
from chunkcache.kv import ChunkKV, Span

PREFIX = 6  # tokens of the prompt below: prefix, chunk, a gap, chunk, question
CHUNKS = ((6, 36), (40, 70))
TOKENS = 90  # several windows, and more rows than one block of `rows_attention`


@cache
def decoder(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Decoder:
    """Return the checked decoder of a model that all tests share."""
    checked = Decoder(zoo.build(name, attention, dtype))
    self_check(checked)
    return checked


def random_ids(tokens: int = TOKENS, seed: int = 1) -> tuple[int, ...]:
    """Return token ids that are no special tokens."""
    return tuple(torch.randint(4, 128, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist())


@torch.no_grad()
def own_prefill(
    model: PreTrainedModel, ids: Sequence[int], start: int = 0, cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Return logits `[tokens, vocab]` and KV of the model's own prefill of `ids` at positions from `start` on.

    The cache is not made by config: its sliding-window layers keep everything, so that all of it can be compared.
    """
    cache = DynamicCache() if cache is None else cache
    positions = torch.arange(start, start + len(ids))[None]
    output = model(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=cache, use_cache=True)
    return output.logits[0], cache


def layers_of(cache: Cache, start: int = 0, end: int | None = None) -> list[Tensor]:
    """Return positions `start` to `end` of each layer of `cache`, as `[2, kv_heads, tokens, head_dim]`."""
    return [torch.cat((layer.keys, layer.values))[:, :, start:end].clone() for layer in cache.layers]


def span(start: int, kv: ChunkKV, first: int = 0, length: int | None = None, exact: bool = False) -> Span:
    """Return a span at `start` that reuses `length` tokens of `kv`, all by default, from its index `first` on."""
    stop = start + (len(kv) - first if length is None else length)
    return Span(start, stop, kv.token_ids, first, kv, exact)


def alone(model: PreTrainedModel, ids: Sequence[int], position: int = 0) -> ChunkKV:
    """Return the chunk KV of `ids`, prefilled at `position` with nothing else in view."""
    return ChunkKV.of(ids, position, layers_of(own_prefill(model, ids, position)[1]))


def right_plan(ids: Sequence[int], own: Cache, exact: bool = False) -> Plan:
    """Return a plan whose stored KV are those of the model's own prefill."""
    bounds = ((0, PREFIX), *CHUNKS)
    kv = [ChunkKV.of(ids[start:end], start, layers_of(own, start, end)) for start, end in bounds]
    return _plan(ids, kv, exact)


def wrong_plan(ids: Sequence[int], own: Cache) -> Plan:
    """Return a plan whose chunks hold noise, computed at other positions; only the prefix is right."""
    kv = [ChunkKV.of(ids[:PREFIX], 0, layers_of(own, 0, PREFIX))]
    for start, end in CHUNKS:
        noise = [3 * torch.randn_like(layer) for layer in layers_of(own, start, end)]
        kv.append(ChunkKV.of(ids[start:end], 11, noise))
    return _plan(ids, kv)


def chunk_plan(model: PreTrainedModel, ids: Sequence[int]) -> Plan:
    """Return a plan as a request has it: each chunk was prefilled alone, at position 0."""
    prefix = alone(model, ids[:PREFIX])
    return _plan(ids, [prefix, *(alone(model, ids[start:end]) for start, end in CHUNKS)])


def _plan(ids: Sequence[int], kv: Sequence[ChunkKV], exact: bool = False) -> Plan:
    starts = (0, *(start for start, _ in CHUNKS))
    return Plan.of(ids, [span(start, one, exact=exact or start == 0) for start, one in zip(starts, kv, strict=True)])


class Selective:
    """One selective prefill, run at once: what came out, and which rows each layer computed.

    Attributes:
        logits: `[rows, vocab]` of the rows that the last layer computed.
        rows: the positions of these rows.
        rows_at: for each layer, the positions whose keys and values it computed.
        layers: KV `[2, kv_heads, tokens, head_dim]` of each layer, before sliding windows are trimmed.
        cache: the fused cache, trimmed.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, plan: Plan, policy: Policy, **options: Any) -> None:
        prefill = SelectivePrefill(decoder, plan, policy, trim=False)
        self.cache = prefill.cache
        self.rows_at: dict[int, Tensor] = {}
        self._update, prefill.cache.update = prefill.cache.update, self._note_rows
        output = prefill.model(
            input_ids=torch.tensor([plan.token_ids]), past_key_values=prefill.cache, use_cache=True, **options
        )
        del prefill.cache.update
        self.logits = output.logits[0]
        self.rows = self.cache.rows
        self.layers = layers_of(self.cache)
        self.cache.trim()

    def _note_rows(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if not self.cache.scouting:
            self.rows_at.setdefault(layer_idx, self.cache.rows)  # the first call: of a check layer, its probe
        return self._update(key, value, layer_idx, *args, **kwargs)


class FrozenCache(DynamicCache):
    """The reference for partial recompute: every row is computed, and all but `rows_at` get the KV given.

    Rows do not see one another but through keys and values, so the rows of interest must come out alike.
    """

    def __init__(self, frozen: Sequence[Tensor], rows_at: dict[int, Tensor]) -> None:
        super().__init__()
        self._frozen = frozen
        self._rows_at = rows_at

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Put the fresh KV of the rows of this layer over the frozen ones."""
        rows = self._rows_at[layer_idx]
        both = self._frozen[layer_idx].clone()
        both[:, :, rows] = torch.cat((key, value))[:, :, rows]
        return super().update(both[:1], both[1:], layer_idx, *args, **kwargs)
