"""Chunk KV on demand: out of the store, or computed by the model and then stored.

A chunk is prefilled right behind the prefix it will stand behind, and the prefix's own KV left out of what is
stored. So no chunk believes that it starts the text, and the first chunk of a prompt is exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from chunkcache.blend import Decoder, FusedCache
from chunkcache.errors import ContextLengthError, EntryLostError
from chunkcache.kv import ChunkKey, ChunkKV, ContextAttention, Origin, chunk_name, hashed_label
from chunkcache.library.documents import Owners
from chunkcache.library.encoder import Encoder, TokenIds, cut_kv
from chunkcache.library.finder import Finder, Known
from chunkcache.library.single_flight import Flights
from chunkcache.library.versions import Variants
from chunkcache.store import Entry, EntryFilter, Store

Progress = Callable[[int, int], None]
Span = tuple[int, int]  # first and last + 1 position

_REPAIRED = "\0repaired"  # keeps versions computed behind repaired KV apart from exact ones


class ChunkLibrary:
    """Looks up, computes and stores the chunk KV of one model.

    Args:
        decoder: the model that computes.
        store: where chunk KV are kept.
        fingerprint: identity of model and tokenizer, part of every key.
        tenant: part of every key.

    Attributes:
        finder: finds every chunk that was looked up or computed here inside other prompts.
    """

    def __init__(self, decoder: Decoder, store: Store, fingerprint: str, tenant: str) -> None:
        self._decoder = decoder
        self._encoder = Encoder(decoder)
        self._store = store
        self._fingerprint = fingerprint
        self._tenant = tenant
        self._tenant_label = hashed_label("tenant", tenant)
        self._owners = Owners()
        self._flights: Flights[TokenIds, ChunkKV] = Flights()
        self._variants = Variants()
        self.finder = Finder()

    def key(self, context: TokenIds, token_ids: TokenIds) -> ChunkKey:
        """Return the key of `token_ids` computed right behind `context`."""
        return ChunkKey.of(self._fingerprint, context, token_ids, self._tenant)

    def get(self, context: TokenIds, token_ids: TokenIds) -> ChunkKV | None:
        """Return the stored KV of `token_ids` computed right behind `context`, or None."""
        return self._store.get(self.key(context, token_ids), token_ids, self._decoder.heads)

    def holds(self, context: TokenIds, token_ids: TokenIds) -> bool:
        """Return whether the store has an entry for it, without counting a hit or a miss."""
        return self.key(context, token_ids) in self._store

    def holds_recorded(self, context: TokenIds, token_ids: TokenIds) -> bool:
        """Return whether the store has an entry for it that says what its tokens looked at."""
        kv = self.get(context, token_ids) if self.holds(context, token_ids) else None
        return kv is not None and kv.context is not None

    def know(self, context: TokenIds, token_ids: TokenIds) -> None:
        """Make a chunk findable, whoever stored it."""
        self.finder.add(Known(self.key(context, token_ids), token_ids, context, chunk_name(token_ids)))

    def find(self, known: Known) -> ChunkKV | None:
        """Return the stored KV of a chunk that the finder named, or None if it has gone since."""
        kv = self._store.get(known.key, known.token_ids, self._decoder.heads)
        if kv is None:
            self.finder.remove(known)
        return kv

    def put(self, context: TokenIds, kv: ChunkKV, chunks: Sequence[TokenIds] = ()) -> None:
        """Store `kv`, computed behind `context`, and make it findable.

        Args:
            context: what stands before it.
            kv: of a chunk, or of a part of one.
            chunks: the whole chunk that it is of, and those that stand in `context`; () if it is a chunk itself,
                and nothing else stands there.
        """
        self._store.put(self.key(context, kv.token_ids), self._signed(kv, chunks))
        self.know(context, kv.token_ids)

    def belongs(self, chunk: TokenIds, document: str) -> None:
        """Take note that a chunk is part of a document, whose `hashed_label` is `document`."""
        self._owners.add(chunk_name(chunk), document)

    def relabel(self, context: TokenIds, token_ids: TokenIds) -> None:
        """Let a stored entry say that it is from all documents that are now known to have the chunk."""
        kv = self.get(context, token_ids)
        if kv is None or self._owners.of([chunk_name(token_ids)]) <= set(kv.origin.documents):
            return
        try:
            self.put(context, kv.loaded())
        except EntryLostError:
            return  # counted by the store; whoever needs the chunk computes it, with its labels

    def forget(self, where: EntryFilter) -> int:
        """Delete all KV of this model and tenant that agree with `where`; return how many there were."""
        if where.document is not None:
            for name in self._owners.drop(where.document):
                self.finder.forget(name)
        elif where.chunk is not None:
            self._owners.forget(where.chunk)
            self.finder.forget(where.chunk)
        else:
            self._owners.clear()
            self.finder.clear()
        return self._store.purge(replace(where, model=self._fingerprint, tenant=self._tenant_label))

    def forget_stale(self, document: str, chunks: Collection[TokenIds]) -> int:
        """Delete the KV computed from chunks that `document` (a `hashed_label`) once had, and no other document has.

        Args:
            document: the document.
            chunks: what it consists of now.
        """
        now = {chunk_name(chunk) for chunk in chunks}
        gone = self._owners.drop(document, but=now)
        entries = list(
            self._store.entries(EntryFilter(model=self._fingerprint, tenant=self._tenant_label, document=document))
        )
        gone |= {e.chunks[0] for e in entries if e.chunks and e.chunks[0] not in now and e.documents == (document,)}
        for entry in entries:
            context = entry.chunks[1:]
            if gone.intersection(entry.chunks) or not entry.chunks:  # deleted below, or a prefix
                continue
            if any(name not in now and not self._owners.of([name]) for name in context):  # perhaps the document's
                self._store.delete(entry.key)
            elif not now.intersection(entry.chunks):
                self._disown(entry, document)
        return sum(self.forget(EntryFilter(chunk=name)) for name in gone)

    def _disown(self, entry: Entry, document: str) -> None:
        """Let a stored entry say that it is not from `document`."""
        kv = self._store.get(entry.key, None)
        if kv is not None:
            others = tuple(hashed_label for hashed_label in entry.documents if hashed_label != document)
            with suppress(EntryLostError):  # counted by the store
                self._store.put(entry.key, replace(kv.loaded(), origin=replace(kv.origin, documents=others)))

    def prefix(self, token_ids: TokenIds) -> ChunkKV:
        """Return the KV of a prefix, all of it loaded; computed if the store does not hold it."""
        return self.stored_prefix(token_ids) or self.compute({token_ids: ()})[token_ids]

    def stored_prefix(self, token_ids: TokenIds) -> ChunkKV | None:
        """Return the KV of a prefix, all of it loaded, or None if the store does not hold it."""
        kv = self.get((), token_ids)
        try:
            return None if kv is None else kv.loaded()
        except EntryLostError:
            return None

    def compute(
        self, chunks: Mapping[TokenIds, TokenIds], on_progress: Progress | None = None, record: bool = False
    ) -> dict[TokenIds, ChunkKV]:
        """Prefill chunks, and store them. What another thread is prefilling is waited for, not computed again.

        Args:
            chunks: token ids of each chunk, and those that it stands behind.
            on_progress: called with (chunks done, chunks in all) after every chunk.
            record: whether to record what their tokens look at, for which they are computed one by one.

        Returns:
            The KV of each chunk, also of those that the store refused.

        Raises:
            ContextLengthError: a chunk and what it stands behind are longer than the model's context.
        """
        for token_ids, behind in chunks.items():
            self._check_length(len(behind), len(token_ids))
        computed: dict[TokenIds, ChunkKV] = {}

        def done(kv: ChunkKV) -> None:
            computed[kv.token_ids] = kv
            if on_progress is not None:
                on_progress(len(computed), len(chunks))

        waiting = dict(chunks)
        while waiting:
            with self._flights.board({ids: (self.key(waiting[ids], ids), record) for ids in waiting}) as flights:
                for kv in self._encode({ids: waiting[ids] for ids in flights.mine}, record):
                    flights.land(kv.token_ids, kv)
                    done(kv)
            for kv in flights.others():
                done(kv)
            waiting = {ids: behind for ids, behind in waiting.items() if ids not in computed}
        return computed

    def _encode(self, chunks: Mapping[TokenIds, TokenIds], record: bool) -> Iterator[ChunkKV]:
        """Yield the KV of chunks, computed and stored, or out of the store if they have come into it meanwhile."""
        for behind in dict.fromkeys(chunks.values()):
            missing = []
            for ids in (ids for ids in chunks if chunks[ids] == behind):
                kv = self.get(behind, ids) if not record and self.holds(behind, ids) else None
                if kv is None:
                    missing.append(ids)
                else:
                    yield kv
            context = self.prefix(behind) if behind and missing else None
            started = time.time()  # a deletion after this is one of what is being computed, too
            for kv in self._encoder.encode(context, missing, record):
                kv = replace(kv, origin=replace(kv.origin, created=started))
                self.put(behind, kv)
                yield kv

    def best(
        self, prefix: TokenIds, chunk: TokenIds, overhead: Callable[[ContextAttention | None], float]
    ) -> ChunkKV | None:
        """Return the stored version of `chunk` that needs least recomputing, or None if all of it would have to be.

        Args:
            prefix: what the version stands behind that was computed alone.
            chunk: its token ids.
            overhead: what a version needs, by what it looked at; None is the one computed alone.
        """
        alone = overhead(None) if self.holds(prefix, chunk) else 1.0
        variant, least = self._variants.pick(chunk, overhead)
        while variant is not None and least <= alone and least < 1:
            kv = self._store.get(variant.key, chunk, self._decoder.heads)
            if kv is not None:
                self._store.credit(variant.key, self._variants.use(variant, least))
                return kv
            self._variants.forget(chunk, variant.key)
            variant, least = self._variants.pick(chunk, overhead)
        return self.get(prefix, chunk) if alone < 1 else None

    def remember_version(
        self,
        cache: FusedCache,
        token_ids: TokenIds,
        span: Span,
        chunks: Sequence[TokenIds],
        context: ContextAttention,
    ) -> None:
        """Store the KV of `span` of a prompt as one more version of a chunk, computed behind repaired KV.

        `chunks` are as in `put`.
        """
        kv = cut_kv(cache, token_ids, *span, context)
        key = ChunkKey.of(self._fingerprint, token_ids[: span[0]], kv.token_ids, self._tenant + _REPAIRED)
        if self._store.put(key, self._signed(kv, chunks)):
            for gone in self._variants.add(kv.token_ids, key, context):
                self._store.delete(gone)

    def remember(self, cache: FusedCache, token_ids: TokenIds, span: Span, chunks: Sequence[TokenIds]) -> None:
        """Store the KV of `span` of a prompt as they came out of it; `chunks` are as in `put`."""
        self.put(token_ids[: span[0]], cut_kv(cache, token_ids, *span), chunks)

    def _signed(self, kv: ChunkKV, chunks: Sequence[TokenIds]) -> ChunkKV:
        """Return `kv` with its origin filled in; `chunks` are as in `put`."""
        names = [chunk_name(chunk) for chunk in chunks or (kv.token_ids,)]
        documents = sorted(self._owners.of(names).union(kv.origin.documents))
        origin = Origin(
            self._fingerprint,
            self._tenant_label,
            tuple(documents),
            tuple(names),
            kv.origin.created or time.time(),
            kv.origin.compute_s,
        )
        return replace(kv, origin=origin)

    def _check_length(self, prefix: int, chunk: int) -> None:
        limit = self._decoder.max_tokens
        if prefix + chunk >= limit:
            raise ContextLengthError(
                f"a chunk of {chunk} tokens behind a prefix of {prefix} does not fit the model's context of {limit} "
                "tokens; split it into smaller chunks"
            )
