"""Chunk KV by vLLM's own model: a chunk is a request of its own, whose keys and values are kept as they come.

All layers share one scratch cache of a few blocks. Before a layer attends, the KV of what the chunks stand behind are
put in there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from chunkcache.blend import Decoder
from chunkcache.blend.assembly import place
from chunkcache.integrations.vllm.paged import PagedModel, Run
from chunkcache.kv import ChunkKV, Context, Origin, Span, TokenIds, in_a_row
from chunkcache.library.encoder import PACK_TOKENS, packs


class PagedEncoder:
    """Computes chunk KV; see `chunkcache.library.encoder.Encoder`.

    Args:
        paged: runs.
        decoder: says how keys are rotated.
    """

    pack_tokens = PACK_TOKENS

    def __init__(self, paged: PagedModel, decoder: Decoder) -> None:
        self._paged, self._decoder = paged, decoder

    @torch.inference_mode()
    def encode(self, context: Context, chunks: Sequence[TokenIds], record: bool = False) -> Iterator[ChunkKV]:
        """Yield the KV of each chunk, `[2, kv_heads, tokens, head_dim]` per layer, in the order of `chunks`.

        Args:
            context: what each of them stands right behind, or None; or several in a row, or parts of them.
            chunks: token ids, none of them empty.
            record: not done here; what tokens look at is asked for by policies that are not served.
        """
        spans = in_a_row(context)
        for pack in packs(chunks, len, self.pack_tokens):
            yield from self._encode(spans, pack)

    def _encode(self, context: Sequence[Span], chunks: Sequence[TokenIds]) -> list[ChunkKV]:
        began = time.perf_counter()
        start, block = sum(map(len, context)), self._paged.block
        shared = start // block  # whole blocks of the context
        used, tables = shared, []
        for chunk in chunks:
            own = -(-(start + len(chunk)) // block) - shared
            tables.append(torch.cat((torch.arange(shared), torch.arange(used, used + own))))
            used += own
        kept: list[list[Tensor]] = [[] for _ in chunks]

        def see(index: int, _: Tensor, key: Tensor, value: Tensor) -> None:
            before = self._context(index, context, key)
            if shared:
                self._paged.write(index, tables[0], 0, before[:, :, : shared * block])
            first = 0
            for chunk, table, layers in zip(chunks, tables, kept, strict=True):
                if start > shared * block:
                    self._paged.write(index, table, shared * block, before[:, :, shared * block :])
                rows = slice(first, first := first + len(chunk))
                layers.append(torch.stack((key[rows], value[rows])).transpose(1, 2).contiguous())

        ids = torch.tensor([token for chunk in chunks for token in chunk])
        runs = [Run(table, start, start + len(chunk)) for table, chunk in zip(tables, chunks, strict=True)]
        with self._paged.scratch(used):
            layers = range(len(self._paged.attentions))
            self._paged.forward(ids, runs, see={index: partial(see, index) for index in layers})
        token_s = (time.perf_counter() - began) / len(ids)
        return [
            ChunkKV.of(chunk, start, layers_of, origin=Origin(compute_s=token_s * len(chunk)))
            for chunk, layers_of in zip(chunks, kept, strict=True)
        ]

    def _context(self, index: int, context: Sequence[Span], like: Tensor) -> Tensor:
        """Return `[2, kv_heads, tokens, head_dim]` of layer `index` of the context, keys rotated to their places."""
        kv_heads, head_dim = self._paged.heads[index]
        both = like.new_empty(2, kv_heads, sum(map(len, context)), head_dim)
        for span in context:
            assert span.kv is not None
            place(span, span.kv.layers[index], self._decoder.rotaries[index], both[:, :, span.start : span.stop])
        return both
