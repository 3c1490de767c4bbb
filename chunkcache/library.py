"""Chunk KV on demand: out of the store, or computed by the model and then stored.

A chunk is prefilled right behind the prefix it will stand behind, and the prefix's own KV left out of what is
stored. So no chunk believes that it starts the text, and the first chunk of a prompt is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import DynamicCache

from chunkcache.blend import Decoder, FusedCache, Plan, Segment, SelectivePrefill, layer_kv
from chunkcache.blend.reuse import Reuse
from chunkcache.errors import ContextLengthError
from chunkcache.kv import ChunkKey, ChunkKV, Context
from chunkcache.matching import Finder, Known
from chunkcache.store import Store
from chunkcache.variants import Variants

TokenIds = tuple[int, ...]
Progress = Callable[[int, int], None]

_REPAIRED = "\0repaired"  # keeps versions computed behind repaired KV apart from exact ones
BATCH_TOKENS = 4096  # tokens of one precompute batch, padding included


class ChunkLibrary:
    """Looks up, computes and stores the chunk KV of one model.

    Args:
        decoder: the model that computes.
        store: where chunk KV are kept.
        fingerprint: identity of model and tokenizer, part of every key.
        salt: tenant salt, part of every key.

    Attributes:
        finder: finds every chunk that was looked up or computed here inside other prompts.
    """

    def __init__(self, decoder: Decoder, store: Store, fingerprint: str, salt: str) -> None:
        self._decoder = decoder
        self._store = store
        self._fingerprint = fingerprint
        self._salt = salt
        self._variants = Variants()
        self.finder = Finder()

    def get(self, context: TokenIds, token_ids: TokenIds) -> ChunkKV | None:
        """Return the stored KV of `token_ids` computed right behind `context`, or None."""
        return self._store.get(self._key(context, token_ids), token_ids)

    def holds(self, context: TokenIds, token_ids: TokenIds) -> bool:
        """Return whether the store has an entry for it, without counting a hit or a miss."""
        return self._key(context, token_ids) in self._store

    def holds_recorded(self, context: TokenIds, token_ids: TokenIds) -> bool:
        """Return whether the store has an entry for it that says what its tokens looked at."""
        kv = self.get(context, token_ids) if self.holds(context, token_ids) else None
        return kv is not None and kv.context is not None

    def know(self, context: TokenIds, token_ids: TokenIds) -> None:
        """Make a chunk findable, whoever stored it."""
        self.finder.add(Known(self._key(context, token_ids), token_ids, context))

    def find(self, known: Known) -> ChunkKV | None:
        """Return the stored KV of a chunk that the finder named, or None if it has gone since."""
        return self._store.get(known.key, known.token_ids)

    def put(self, context: TokenIds, kv: ChunkKV) -> None:
        """Store `kv`, computed behind `context`, and make it findable."""
        self._store.put(self._key(context, kv.token_ids), kv)
        self.know(context, kv.token_ids)

    def prefix(self, token_ids: TokenIds) -> ChunkKV:
        """Return the KV of a prefix, computed if the store does not hold it."""
        kv = self.get((), token_ids)
        if kv is None:
            kv = next(self._encode(None, [token_ids]))
            self.put((), kv)
        return kv

    def compute(
        self, chunks: Mapping[TokenIds, TokenIds], on_progress: Progress | None = None, record: bool = False
    ) -> dict[TokenIds, ChunkKV]:
        """Prefill chunks in batches of like length, and store them.

        Args:
            chunks: token ids of each chunk, and those that it stands behind.
            on_progress: called with (chunks done, chunks in all) after every batch.
            record: whether to record what their tokens look at, for which they are computed one by one.

        Returns:
            The KV of each chunk, also of those that the store refused.

        Raises:
            ContextLengthError: a chunk and what it stands behind are longer than the model's context.
        """
        for token_ids, behind in chunks.items():
            self._check_length(len(behind), len(token_ids))
        computed: dict[TokenIds, ChunkKV] = {}
        encode = self._encode_recorded if record else self._encode
        for behind in dict.fromkeys(chunks.values()):
            context = self.prefix(behind) if behind else None
            for batch in _batches(sorted((ids for ids in chunks if chunks[ids] == behind), key=len)):
                for kv in encode(context, batch):
                    self.put(behind, kv)
                    computed[kv.token_ids] = kv
                if on_progress is not None:
                    on_progress(len(computed), len(chunks))
        return computed

    def best(self, prefix: TokenIds, chunk: TokenIds, overhead: Callable[[Context | None], float]) -> ChunkKV | None:
        """Return the stored version of `chunk` that needs least recomputing, or None if all of it would have to be.

        Args:
            prefix: what the version stands behind that was computed alone.
            chunk: its token ids.
            overhead: what a version needs, by what it looked at; None is the one computed alone.
        """
        alone = overhead(None) if self.holds(prefix, chunk) else 1.0
        variant, least = self._variants.pick(chunk, overhead)
        while variant is not None and least <= alone and least < 1:
            kv = self._store.get(variant.key, chunk)
            if kv is not None:
                self._store.credit(variant.key, self._variants.use(variant, least))
                return kv
            self._variants.forget(chunk, variant.key)
            variant, least = self._variants.pick(chunk, overhead)
        return self.get(prefix, chunk) if alone < 1 else None

    def remember_version(
        self, cache: FusedCache, token_ids: TokenIds, start: int, end: int, context: Context
    ) -> None:
        """Store tokens `start` to `end` of a prompt as one more version of a chunk, computed behind repaired KV."""
        kv = _cut(cache, token_ids, start, end, context)
        key = ChunkKey.of(self._fingerprint, token_ids[:start], kv.token_ids, self._salt + _REPAIRED)
        if self._store.put(key, kv):
            for gone in self._variants.add(kv.token_ids, key, context):
                self._store.delete(gone)

    def remember(self, cache: FusedCache, token_ids: TokenIds, start: int, end: int) -> None:
        """Store the KV of tokens `start` to `end` of a prompt as they came out in their context."""
        self.put(token_ids[:start], _cut(cache, token_ids, start, end))

    def _key(self, context: TokenIds, token_ids: TokenIds) -> ChunkKey:
        return ChunkKey.of(self._fingerprint, context, token_ids, self._salt)

    def _check_length(self, prefix: int, chunk: int) -> None:
        limit = self._decoder.max_tokens
        if prefix + chunk >= limit:
            raise ContextLengthError(
                f"a chunk of {chunk} tokens behind a prefix of {prefix} does not fit the model's context of {limit} "
                "tokens; split it into smaller chunks"
            )

    def _encode_recorded(self, context: ChunkKV | None, batch: Sequence[TokenIds]) -> Iterator[ChunkKV]:
        """Prefill sequences one by one on a shadow of the model, where their attention can be watched."""
        segments = [] if context is None else [Segment(0, context, 0, len(context), exact=True)]
        before = () if context is None else context.token_ids
        computed: list[ChunkKV] = []

        def keep(cache: FusedCache, contexts: dict[int, Context]) -> None:
            start, end = len(before), len(cache.plan)
            computed.append(_cut(cache, cache.plan.token_ids, start, end, contexts[start]))

        for ids in batch:
            plan = Plan.of((*before, *ids), segments, [(len(before), len(before) + len(ids))])
            SelectivePrefill(self._decoder, plan, Reuse(), keep, record=True).run()
            yield computed.pop()

    @torch.no_grad()
    def _encode(self, context: ChunkKV | None, batch: Sequence[TokenIds]) -> Iterator[ChunkKV]:
        """Prefill sequences of different length side by side; padding stands behind them, where none looks."""
        longest = max(map(len, batch))
        input_ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])
        cache = DynamicCache()  # not by config: a sliding-window layer would drop what is to be stored
        start = 0
        if context is not None:
            start = len(context)
            for index, layer in enumerate(context.layers):
                keys, values = layer.to(self._decoder.device)[:, None].expand(-1, len(batch), -1, -1, -1)
                cache.update(keys, values, index)
        self._decoder.prefill(input_ids, cache)
        for row, ids in enumerate(batch):
            end = start + len(ids)
            layers = [
                torch.stack([part[row, :, start:end] for part in layer_kv(cache, index)])
                for index in range(len(cache.layers))
            ]
            yield ChunkKV.of(ids, start, layers)


def _cut(cache: FusedCache, token_ids: TokenIds, start: int, end: int, context: Context | None = None) -> ChunkKV:
    layers = [
        torch.cat([part[:, :, start:end] for part in layer_kv(cache, index)]) for index in range(len(cache.layers))
    ]
    return ChunkKV.of(token_ids[start:end], start, layers, context)


def _batches(chunks: Sequence[TokenIds]) -> Iterator[list[TokenIds]]:
    """Group chunks, sorted by length, so that a padded batch stays within `BATCH_TOKENS`."""
    batch: list[TokenIds] = []
    for chunk in chunks:
        if batch and len(chunk) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch
