"""Prefills chunks, many in one forward.

Prepacking (arXiv 2404.09529): sequences stand one after another in a single row, with restarted positions and no
padding. Here they also share one copy of the KV of the context that they stand behind. A dense
block-diagonal mask would have attention compute the scores of every chunk with every other, so attention runs
chunk by chunk instead, and everything else in the model on the whole row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from chunkcache.blend import Decoder, Plan, SelectivePrefill
from chunkcache.blend.assembly import place
from chunkcache.blend.attention import contiguous_from, register, rows_attention, upper
from chunkcache.blend.reuse import Reuse
from chunkcache.kv import ChunkKV, Context, Origin, Span, TokenIds, in_a_row
from chunkcache.kv.clock import StageClock
from chunkcache.kv.transfer import join, to_device

Item = TypeVar("Item")
NAME = "chunkcache_pack"
PACK_TOKENS = 1024  # of all chunks in one forward; twice as many measured no faster on a CPU
PACK_TOKENS_THERE = 8192  # on an accelerator, where a short forward is bound by its launches; not measured


class _Computed(Exception):  # noqa: N818 - a jump out of the model, not an error
    """The KV of the last layer are there; what the model would go on to compute is not wanted."""


class ChunkEncoder(Protocol):
    """Computes chunk KV, by whatever runs the model; see `Encoder`."""

    @property
    def pack_tokens(self) -> int:
        """How many tokens of several chunks are computed in one forward at most."""
        ...

    def encode(self, context: Context, chunks: Sequence[TokenIds], record: bool = False) -> Iterator[ChunkKV]:
        """Yield the KV of each chunk right behind a context."""
        ...


class Encoder:
    """Computes the chunk KV of one model.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        register(NAME, _attention)

    def encode(self, context: Context, chunks: Sequence[TokenIds], record: bool = False) -> Iterator[ChunkKV]:
        """Yield the KV of each chunk, `[2, kv_heads, tokens, head_dim]` per layer, in the order of `chunks`.

        Their `origin` carries `compute_s` alone.

        Args:
            context: what each of them stands right behind, or None; or several in a row, or parts of them, whose
                keys are re-rotated to their places.
            chunks: token ids, none of them empty. With the context, each fits the model.
            record: whether to record what their tokens look at, for which they are computed one by one.

        Raises:
            EntryLostError: a layer of the context is damaged or gone.
        """
        spans = [replace(span, kv=self._on_device(span.kv)) for span in in_a_row(context)]
        if record or not self._packable():
            yield from self._one_by_one(spans, chunks, record)
            return
        for pack in packs(chunks, len, self.pack_tokens):
            yield from _Pack(self._decoder, spans, pack).prefill()

    @property
    def pack_tokens(self) -> int:
        """How many tokens of several chunks are computed in one forward at most."""
        return PACK_TOKENS if self._decoder.device.type == "cpu" else PACK_TOKENS_THERE

    def _on_device(self, kv: ChunkKV | None) -> ChunkKV | None:
        """Return KV on the device of each layer, copied once for all packs; for a model on the CPU as they are."""
        if kv is None or (self._decoder.device.type == "cpu" and not kv.ready):
            return kv
        layers = self._decoder.layers
        return join(to_device(kv, lambda index: next(layers[index].parameters()).device))

    def _packable(self) -> bool:
        """Return whether attention goes through transformers' interface, where it can be run chunk by chunk.

        With SDPA it must, for the self-check to pass. Eager attention of an older model (Falcon) may be a part of
        its attention module.
        """
        eager = self._decoder.config._attn_implementation == "eager"
        return not eager or _own_attention(self._decoder.attentions[0]) is not None

    def _one_by_one(self, context: Sequence[Span], chunks: Sequence[TokenIds], record: bool) -> Iterator[ChunkKV]:
        """Prefill chunks on a shadow of the model each, where their attention can be watched."""
        before = tuple(token for span in context for token in span.token_ids)
        prefix, others = next(iter(context), None), context[1:]
        for ids in chunks:
            clock = StageClock(self._decoder.device)
            started = clock.mark()
            chunk = Span(len(before), len(before) + len(ids), ids)
            plan = Plan.of((*before, *ids), [*others, chunk], prefix)
            prefill = SelectivePrefill(self._decoder, plan, Reuse(), record=record, keep=lambda span: span.kv is None)
            prefill.run()
            compute_s = clock.between(started, clock.mark())
            yield replace(prefill.computed[len(before)], origin=Origin(compute_s=compute_s))


class _Pack:
    """Chunks that one forward computes in one row, each behind the same context.

    The model runs without a cache: keys and values of the whole row exist only in the layer that it is in, which
    copies each chunk's into what is stored of it. The last layer is left there.
    """

    def __init__(self, decoder: Decoder, context: Sequence[Span], chunks: Sequence[TokenIds]) -> None:
        self._decoder = decoder
        self._context = context
        self._chunks = chunks
        self._start = sum(map(len, context))
        self._end = self._start + max(map(len, chunks))
        self._layers: list[list[Tensor]] = [[] for _ in chunks]
        ends = list(accumulate(map(len, chunks)))
        self._rows = [slice(end - len(chunk), end) for chunk, end in zip(chunks, ends, strict=True)]

    def prefill(self) -> Iterator[ChunkKV]:
        """Run the model, and yield the KV of each chunk."""
        clock = StageClock(self._decoder.device)
        started = clock.mark()
        twin = self._decoder.shadow(NAME)
        for index, module in enumerate(twin.attentions):
            vars(module)["chunkcache_attend"] = partial(self._attend, index)
        # of the longest chunk
        positions = contiguous_from(torch.arange(self._start, self._end, device=twin.device), self._start)
        with torch.no_grad(), suppress(_Computed):
            twin.model.base_model(
                input_ids=torch.tensor([[token for chunk in self._chunks for token in chunk]], device=twin.device),
                position_ids=torch.cat([positions[: len(chunk)] for chunk in self._chunks])[None],
                attention_mask=self._decoder.masks(positions, self._end),
                use_cache=False,
            )
        token_s = clock.between(started, clock.mark()) / sum(map(len, self._chunks))
        for chunk, layers in zip(self._chunks, self._layers, strict=True):
            yield ChunkKV.of(chunk, self._start, layers, origin=Origin(compute_s=token_s * len(chunk)))

    def _attend(
        self,
        layer_idx: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend from each chunk to the context and to itself, and keep its keys and values.

        Args:
            layer_idx: index of the layer.
            module: its attention module.
            query: `[1, heads, rows, head_dim]`, of all chunks.
            key: `[1, kv_heads, rows, head_dim]`; `value` alike.
            attention_mask: of the longest chunk, from `Decoder.masks`. That of a shorter one is its upper left.

        Returns:
            `[1, rows, heads, head_dim]` and None.

        Raises:
            _Computed: this was the last layer.
        """
        for layers, rows in zip(self._layers, self._rows, strict=True):
            layers.append(torch.cat((key[:, :, rows], value[:, :, rows])))
        if layer_idx + 1 == len(self._decoder.layers):
            raise _Computed
        seen = key.new_empty(2, key.shape[1], self._end, key.shape[3])  # the context, then one chunk after another
        rotary = self._decoder.rotaries[layer_idx]
        for span in self._context:
            assert span.kv is not None
            place(span, span.kv.layers[layer_idx], rotary, seen[:, :, span.start : span.stop])
        outputs = []
        for chunk, layers, rows in zip(self._chunks, self._layers, self._rows, strict=True):
            end = self._start + len(chunk)
            seen[:, :, self._start : end] = layers[-1]
            mask = upper(attention_mask, len(chunk))
            if mask.is_floating_point():  # eager
                attend, mask = _own_attention(module), mask[..., :end]
            else:
                attend = rows_attention
            output, _ = attend(module, query[:, :, rows], seen[:1, :, :end], seen[1:, :, :end], mask, **kwargs)
            outputs.append(output)
        return torch.cat(outputs, dim=1), None


def packs(items: Sequence[Item], tokens_of: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Group items in their order, so that a group of several stays within `most` tokens."""
    pack: list[Item] = []
    tokens = 0
    for item in items:
        if pack and tokens + tokens_of(item) > most:
            yield pack
            pack, tokens = [], 0
        pack.append(item)
        tokens += tokens_of(item)
    if pack:
        yield pack


def _own_attention(module: nn.Module) -> Any:
    """Return the eager attention function of the family that an attention module is of, or None."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    attend: Any = vars(module)["chunkcache_attend"]
    output: tuple[Tensor, None] = attend(module, *args, **kwargs)
    return output
