"""Chunk KV on demand: out of the store, or computed by the model and then stored.

A chunk is prefilled right after the prefix it will stand behind, and the prefix's own KV are left out of what is
stored. So no chunk believes that it starts the text, and the first chunk of a prompt is exact.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from chunkcache.blend import Decoder, Policy
from chunkcache.errors import ContextLengthError, EntryLostError
from chunkcache.kv import ChunkKey, ChunkKV, ChunkRef, Origin, Span, TokenIds, chunk_name, hashed_label
from chunkcache.kv.transfer import join, marked
from chunkcache.library.deletion import DeletionMethods
from chunkcache.library.encoder import ChunkEncoder, Encoder, packs
from chunkcache.library.registry import ChunkRegistry, warn_once
from chunkcache.library.single_flight import SingleFlight
from chunkcache.store import Store

Progress = Callable[[int, int], None]
PART_TOKENS = 8192  # chunk tokens that are computed and stored at a time
_NEAR = "\0near"  # keeps chunks that were computed behind their nearest chunks apart from all others


class ChunkLibrary(DeletionMethods):
    """Looks up, computes, stores and deletes the chunk KV of one model and tenant.

    Args:
        decoder: the model that computes.
        store: where chunk KV are kept.
        fingerprint: identity of model and tokenizer, part of every key.
        tenant: part of every key.
        lead_in: token ids that stand before a chunk while it is computed ahead, for policies that want it.
        registry: what is known of chunks; None for an empty one.
        is_current: says whether the model still is the one with this fingerprint; None for always.
        encoder: computes; None for one that runs the decoder's own model.

    Attributes:
        fingerprint: as given.
        registry: the chunks that were looked up or computed here.
        pack_tokens: how many tokens of several chunks are computed in one forward at most.
        refused: chunk KV that were not stored, since the model had changed or a hook had cut them.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: Store,
        fingerprint: str,
        tenant: str = "",
        lead_in: TokenIds = (),
        registry: ChunkRegistry | None = None,
        is_current: Callable[[], bool] | None = None,
        encoder: ChunkEncoder | None = None,
    ) -> None:
        self._decoder = decoder
        self._encoder = encoder or Encoder(decoder)
        self.pack_tokens = self._encoder.pack_tokens
        self._store = store
        self.fingerprint = fingerprint
        self._is_current = is_current or (lambda: True)
        self.refused = 0
        self._tenant = tenant
        self._tenant_label = hashed_label("tenant", tenant)
        self._lead_in = lead_in
        self._flights: SingleFlight[ChunkRef, ChunkKV] = SingleFlight()
        self._behind = lru_cache(maxsize=64)(lambda prefix, lead: (*prefix, *lead))  # many chunks share one tuple
        self.registry = registry if registry is not None else ChunkRegistry()

    def of_model(self, fingerprint: str) -> ChunkLibrary:
        """Return the library over what another state of the model has left in the store, for deletion."""
        other = copy.copy(self)
        other.fingerprint, other._is_current = fingerprint, lambda: False
        return other

    # --- references

    def ref(self, token_ids: TokenIds, context_ids: TokenIds, variant: str = "") -> ChunkRef:
        """Return the reference to a chunk that is computed right after `context_ids`; variants are kept apart."""
        key = ChunkKey.of(self.fingerprint, context_ids, token_ids, self._tenant + variant)
        return ChunkRef(key, token_ids, context_ids)

    def ref_for(self, token_ids: TokenIds, prefix: TokenIds, policy: Policy) -> ChunkRef:
        """Return the reference to a chunk as `policy` wants it computed ahead of requests that begin with `prefix`.

        That is after prefix and lead-in, or after the prefix alone where both leave no room.
        """
        tokens = policy.lead_in()
        lead_in = self._lead_in[-tokens:] if tokens else ()
        fits = len(prefix) + len(lead_in) + len(token_ids) < self._decoder.max_tokens
        return self.ref(token_ids, self._behind(prefix, lead_in) if fits and lead_in else prefix)

    def ref_near(self, token_ids: TokenIds, prefix: TokenIds) -> ChunkRef:
        """Return the reference to a chunk as it is computed behind its nearest chunks, for requests with `prefix`.

        It does not say which chunks these are: KV computed behind others stay of use when a corpus grows. So they are
        never exact.
        """
        return replace(self.ref(token_ids, prefix, variant=_NEAR), near=True)

    def held_ref(self, token_ids: TokenIds, prefix: TokenIds, policy: Policy) -> ChunkRef:
        """Return `ref_near` where `policy` wants it and the store has it, else `ref_for`."""
        near = self.ref_near(token_ids, prefix) if policy.neighbours() else None
        return near if near is not None and self.holds(near) else self.ref_for(token_ids, prefix, policy)

    # --- look up

    def look_up(self, token_ids: TokenIds, prefix: TokenIds, policy: Policy) -> tuple[ChunkRef, ChunkKV | None]:
        """Return the best reference that `policy` has to a chunk, and its KV; None if the store has none.

        KV that were computed behind a chunk of what is now another trust label are not used.
        """
        ref = self.held_ref(token_ids, prefix, policy)
        kv = self.get(ref)
        if ref.near and (kv is None or not self._is_trusted(kv)):
            ref = self.ref_for(token_ids, prefix, policy)
            kv = self.get(ref)
        return ref, kv

    def get(self, ref: ChunkRef) -> ChunkKV | None:
        """Return the stored KV of a chunk, or None."""
        return self.get_key(ref.key, ref.token_ids)

    def get_key(self, key: ChunkKey, token_ids: TokenIds) -> ChunkKV | None:
        """Return what is stored under `key` if it is the KV of `token_ids`, or None."""
        kv = self._store.get(key, token_ids, self._decoder.heads)
        return kv if kv is None or kv.source else replace(kv, source=self._store.kind)

    def holds(self, ref: ChunkRef, recorded: bool = False) -> bool:
        """Return whether the store has a chunk, without counting a hit or a miss.

        Args:
            ref: the chunk.
            recorded: whether it must say what its tokens looked at.
        """
        if ref.key not in self._store:
            return False
        kv = self.get(ref) if recorded else None
        return not recorded or (kv is not None and kv.context is not None)

    def get_prefix(self, token_ids: TokenIds) -> ChunkKV | None:
        """Return the KV of a prefix, all of it loaded, or None if the store does not hold it."""
        kv = self.get(self.ref(token_ids, ()))
        try:
            return None if kv is None else kv.loaded()
        except EntryLostError:
            return None

    def find(self, token_ids: TokenIds) -> list[Span]:
        """Return the spans of known chunks in a prompt, in order, without KV where these have gone from the store.

        They are exact where they were computed after the very tokens that stand before them here.
        """
        found = self.registry.find_tokens(token_ids, self.fingerprint)
        return [self._filled(span, keys, token_ids) for span, keys in found]

    def _filled(self, span: Span, keys: Sequence[ChunkKey], token_ids: TokenIds) -> Span:
        here = None if span.offset else self.ref(span.chunk_ids, token_ids[: span.start]).key
        for key in sorted(keys, key=lambda key: key != here):
            kv = self.get_key(key, span.chunk_ids)
            if kv is None:
                self.registry.forget_key(span.chunk_ids, key)
            elif key == here or self._is_trusted(kv):
                return replace(span, kv=kv, exact=key == here)
        return span

    def fits(self, ref: ChunkRef) -> bool:
        """Return whether a chunk and what it stands behind are within the model's context."""
        return self.room(ref) >= 0

    def room(self, ref: ChunkRef) -> int:
        """Return how many more tokens could stand before a chunk in the model's context."""
        return self._decoder.max_tokens - 1 - len(ref.context_ids) - len(ref.token_ids)

    # --- compute and store

    def put(self, ref: ChunkRef, kv: ChunkKV, chunks: Sequence[TokenIds] = ()) -> bool:
        """Store `kv` of a chunk or of a part of one, and make it findable; return whether the store took it.

        Args:
            ref: what it is stored as.
            kv: its KV.
            chunks: the whole chunk that it is of, and those that stand in its context; () if it is a chunk itself,
                and no other stands there. Behind one of another trust label it is not made findable.
        """
        if not self._may_store(kv):
            return False
        kv = self.with_origin(kv, chunks)
        taken = self._store.put(ref.key, kv)
        if self._is_trusted(kv):
            self.registry.add(ref, model=self.fingerprint)
        return taken

    def trusts(self, chunks: Sequence[TokenIds]) -> bool:
        """Return whether the first of some chunks may be used elsewhere as it was computed behind the others."""
        names = [chunk_name(chunk) for chunk in chunks]
        return not names or self.registry.trusts(names[0], names[1:])

    def _is_trusted(self, kv: ChunkKV) -> bool:
        """Return whether all chunks that KV name in their origin have the trust label of the first."""
        names = kv.origin.chunks or (chunk_name(kv.token_ids),)
        return self.registry.trusts(names[0], names[1:])

    def put_as(self, key: ChunkKey, kv: ChunkKV, chunks: Sequence[TokenIds]) -> bool:
        """Store `kv` under a key of the caller's own; return whether the store took it. Otherwise as `put`."""
        return self._may_store(kv) and self._store.put(key, self.with_origin(kv, chunks))

    def _may_store(self, kv: ChunkKV) -> bool:
        """Return whether KV are what their key says: all of the chunk, of a model that is still the same."""
        if not self._is_current():
            warn_once("the model changed while chunks were computed; their KV are not stored")
        elif any(shape[2] != len(kv) for shape in kv.shapes) or len(kv.shapes) != len(self._decoder.layers):
            warn_once("something cut the KV of a chunk while they were computed; they are not stored")
        else:
            return True
        self.refused += 1
        return False

    def with_origin(self, kv: ChunkKV, chunks: Sequence[TokenIds] = ()) -> ChunkKV:
        """Return `kv` with its origin filled in, and all that it names kept; `chunks` as in `put`."""
        given = [chunk_name(chunk) for chunk in chunks or (kv.token_ids,)]
        names = list(dict.fromkeys((*given, *kv.origin.chunks)))
        documents = sorted(self.registry.documents_of(names).union(kv.origin.documents))
        created = kv.origin.created or time.time()
        origin = Origin(
            self.fingerprint, self._tenant_label, tuple(documents), tuple(names), created, kv.origin.compute_s
        )
        return replace(kv, origin=origin)

    def prefix(self, token_ids: TokenIds) -> ChunkKV:
        """Return the KV of a prefix, all of it loaded; computed if the store does not hold it."""
        ref = self.ref(token_ids, ())
        return self.get_prefix(token_ids) or self.compute([ref])[ref]

    def compute(
        self, refs: Sequence[ChunkRef], on_progress: Progress | None = None, record: bool = False
    ) -> dict[ChunkRef, ChunkKV]:
        """Prefill chunks, and store them. What another thread is prefilling is waited for, not computed again.

        Args:
            refs: the chunks.
            on_progress: called with (chunks done, chunks in all) after every chunk.
            record: whether to record what their tokens look at, for which they are computed one by one.

        Returns:
            The KV of each chunk, also of those that the store refused.

        Raises:
            ContextLengthError: a chunk and what it stands behind are longer than the model's context.
        """
        for ref in refs:
            self._check_length(ref)
        computed: dict[ChunkRef, ChunkKV] = {}

        def done(ref: ChunkRef, kv: ChunkKV) -> None:
            computed[ref] = kv
            if on_progress is not None:
                on_progress(len(computed), len(waited_for))

        waited_for = waiting = list(dict.fromkeys(refs))
        while waiting:
            with self._flights.claim({ref: (ref.key, record) for ref in waiting}) as claim:
                for ref, kv in self._encode(claim.claimed, record):
                    claim.resolve(ref, kv)
                    done(ref, kv)
            for ref, kv in claim.others():
                done(ref, join(kv))
            waiting = [ref for ref in waiting if ref not in computed]
        return computed

    def precompute(self, refs: Sequence[ChunkRef], on_progress: Progress | None = None, record: bool = False) -> None:
        """Compute and store chunks part by part, so that neither their KV nor pending writes pile up.

        The arguments are those of `compute`.
        """
        self._store.flush()  # what a far tier once refused is written now
        done = 0
        for part in packs(refs, lambda ref: len(ref.token_ids), PART_TOKENS):

            def counted(n: int, _: int, before: int = done) -> None:
                if on_progress is not None:
                    on_progress(before + n, len(refs))

            self.compute(part, counted, record)
            self._store.flush()
            done += len(part)

    def catch_up(self) -> None:
        """Start what was put off while a request ran; called when its first token is there. See `Store.catch_up`."""
        self._store.catch_up()

    def flush(self) -> None:
        """Wait until all that was computed is in every tier of the store."""
        self._store.flush()

    def _encode(self, refs: Sequence[ChunkRef], record: bool) -> Iterator[tuple[ChunkRef, ChunkKV]]:
        """Yield the KV of chunks, computed and stored, or out of the store if they have come into it meanwhile."""
        for context_ids in dict.fromkeys(ref.context_ids for ref in refs):
            missing = {}
            for ref in (ref for ref in refs if ref.context_ids == context_ids):
                kv = self.get(ref) if not record and self.holds(ref) else None
                if kv is None:
                    missing[ref.token_ids] = ref
                else:
                    yield ref, kv
            context = self.prefix(context_ids) if context_ids and missing else None
            started = time.time()  # a deletion after this is one of what is being computed, too
            for kv in self._encoder.encode(context, list(missing), record):
                kv = marked(replace(kv, origin=replace(kv.origin, created=started)))
                self.put(missing[kv.token_ids], kv)
                yield missing[kv.token_ids], kv

    def compute_behind(
        self, refs: Sequence[ChunkRef], context: ChunkKV | None, others: Sequence[Span], started: float
    ) -> None:
        """Compute chunks behind a context and other chunks, whose stored KV are taken as they are, and store them.

        What is stored names the others, what they were computed behind, and the documents of all, so that it is
        deleted with any of them.

        Args:
            refs: the chunks, each to be stored as it says. With all that stands before, each fits the model.
            context: the KV of a prefix, perhaps with a lead-in, or None.
            others: chunks with their KV, or parts of them, that stand behind it, in order.
            started: when the others were looked up, in seconds since the epoch: a later deletion of one of them is
                one of what is computed here, too.

        Raises:
            EntryLostError: KV of the others are damaged or gone; some of the chunks may be stored.
        """
        origins = [span.kv.origin for span in others if span.kv is not None]
        names = tuple(name for origin in origins for name in origin.chunks)
        documents = tuple(label for origin in origins for label in origin.documents)
        by_ids = {ref.token_ids: ref for ref in refs}
        for kv in self._encoder.encode(others if context is None else (context, *others), list(by_ids)):
            origin = replace(kv.origin, documents=documents, chunks=names, created=started)
            before = [span.chunk_ids for span in others]
            self.put(by_ids[kv.token_ids], replace(kv, origin=origin), [kv.token_ids, *before])

    def _check_length(self, ref: ChunkRef) -> None:
        if not self.fits(ref):
            raise ContextLengthError(
                f"a chunk of {len(ref.token_ids)} tokens behind a prefix of {len(ref.context_ids)} does not fit the "
                f"model's context of {self._decoder.max_tokens} tokens; split it into smaller chunks"
            )

    def credit(self, key: ChunkKey, worth: float) -> None:
        """Count what a use of an entry was worth; see `Store.credit`."""
        self._store.credit(key, worth)
