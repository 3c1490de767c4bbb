"""From a prompt to a plan: its spans are filled with stored KV, and what is missing is computed first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from chunkcache.blend import Decoder, Plan, Policy
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import ContextLengthError, EntryLostError
from chunkcache.kv import ChunkKV, ChunkRef, Span
from chunkcache.library import ChunkLibrary
from chunkcache.prompt import Prompt

if TYPE_CHECKING:
    from chunkcache.engine.contextual import ContextualChunks


class Planner:
    """Plans the requests of one wrapped model.

    Args:
        decoder: the model.
        library: where chunk KV come from.
    """

    def __init__(self, decoder: Decoder, library: ChunkLibrary) -> None:
        self._decoder = decoder
        self._library = library

    @cached_property
    def contextual(self) -> ContextualChunks:
        """Where the chunks of policies come from that store them as they came out of a prompt."""
        from chunkcache.engine.contextual import ContextualChunks

        return ContextualChunks(self._library)

    def plan(self, prompt: Prompt, policy: Policy, stats: RequestStats, room: int = 1) -> Plan:
        """Look up what is stored of `prompt`, and compute what the policy needs and is missing.

        Args:
            prompt: the prompt.
            policy: what will be recomputed of it.
            stats: counts what is found and computed.
            room: tokens that must fit behind the prompt.

        Raises:
            ContextLengthError: prompt and room do not fit the model's context.
        """
        started = time.perf_counter()
        ids, limit = prompt.token_ids, self._decoder.max_tokens
        if len(ids) + room > limit:
            raise ContextLengthError(
                f"a prompt of {len(ids)} tokens and {room} new ones do not fit the model's context of {limit} "
                "tokens; pass fewer or shorter chunks, or pass a lower max_new_tokens"
            )
        stats.chunks = len(prompt.spans)
        if not policy.reuses:
            return Plan.of(ids, prompt.spans)
        prefix = self._prefix(prompt, stats) if prompt.prefix_tokens else None
        chunks = self._chunks(prompt, policy, stats)
        stats.lookup_s = time.perf_counter() - started - stats.compute_s
        return Plan.of(ids, chunks, prefix)

    def _prefix(self, prompt: Prompt, stats: RequestStats) -> Span | None:
        head = None if prompt.head is None else replace(prompt.head, source="conversation")
        kv = head or self._library.get_prefix(prompt.prefix)
        if kv is None:
            ref = self._library.ref(prompt.prefix, ())
            kv = self._compute([ref], stats).get(ref)
            stats.computed_tokens += prompt.prefix_tokens
        return None if kv is None else Span(0, len(kv), kv.token_ids, kv=kv, exact=True)

    def _chunks(self, prompt: Prompt, policy: Policy, stats: RequestStats) -> list[Span]:
        """Return the chunks with their KV: exact as long as all before are; from there on, computed elsewhere."""
        exact = self._exact(prompt, policy)
        rest = prompt.spans[len(exact) :]
        if policy.stores_in_context or policy.versioned:
            others = self.contextual.find(prompt, rest, policy)
        else:
            others = self._precomputed(prompt, rest, policy, stats)
        chunks = [*exact, *others]
        stats.leads.update((span.start, "context") for span in exact)
        found = sum(span.kv is not None for span in chunks)
        stats.hits, stats.misses = found - stats.misses, len(chunks) - found + stats.misses
        return chunks

    def _fits(self, policy: Policy, kv: ChunkKV) -> bool:
        """Return whether `policy` takes these KV: a lossless one takes none that a codec has rounded."""
        if not policy.lossless:
            return True
        dtype = self._decoder.dtype
        try:
            return all(isinstance(layer, Tensor) and layer.dtype == dtype for layer in kv.loaded().layers)
        except EntryLostError:
            return True  # the prefill counts it, and computes the chunk itself

    def _exact(self, prompt: Prompt, policy: Policy) -> list[Span]:
        """Return the first chunks that are stored as they stand here, after the very same tokens."""
        chunks: list[Span] = []
        for span in prompt.spans:
            ref = self._library.ref(span.token_ids, prompt.token_ids[: span.start])
            kv = self._library.get(ref) if self._library.holds(ref) else None
            if kv is None or not self._fits(policy, kv):
                break
            chunks.append(Span(span.start, span.stop, span.token_ids, kv=kv, exact=True))
        return chunks

    def _precomputed(
        self, prompt: Prompt, spans: tuple[Span, ...], policy: Policy, stats: RequestStats
    ) -> list[Span]:
        """Return chunks with the KV that are computed ahead of requests; what is missing is computed now."""
        chunks = dict.fromkeys(span.chunk_ids for span in spans)
        found = {ids: self._library.look_up(ids, prompt.context_ids, policy) for ids in chunks}
        stored = dict(found.values())
        refs = [found[span.chunk_ids][0] for span in spans]
        missing = [ref for ref, kv in stored.items() if kv is None]
        stats.misses = sum(stored[ref] is None for ref in refs)
        stats.computed_tokens += sum(len(span) for span, ref in zip(spans, refs, strict=True) if stored[ref] is None)
        kv = {**stored, **(self._compute(missing, stats) if missing else {})}
        stats.leads.update((span.start, _lead(ref, prompt)) for span, ref in zip(spans, refs, strict=True))
        return [
            replace(span, kv=kv[ref], exact=not span.offset and ref.is_exact_after(prompt.token_ids[: span.start]))
            for span, ref in zip(spans, refs, strict=True)
        ]

    def _compute(self, refs: list[ChunkRef], stats: RequestStats) -> Mapping[ChunkRef, ChunkKV]:
        """Return the KV of what is missing; what is left out is computed with the prompt."""
        started = time.perf_counter()
        computed = self._library.compute(refs)
        stats.compute_s += time.perf_counter() - started
        return computed


def _lead(ref: ChunkRef, prompt: Prompt) -> str:
    """Return what a chunk is computed behind; see `ChunkReport`."""
    if ref.near:
        return "neighbours"
    return "lead-in" if len(ref.context_ids) > len(prompt.context_ids) else "prefix"
