"""Chunks stored as they came out of a prompt, for policies that reuse them so: `prefix`, `cachecraft`.

Under `prefix` every chunk is stored for exact reuse after the same tokens. Under a versioned policy a chunk that was
computed whole is stored as one more version of itself, and the version that needs the least recomputing is used
(Cache-Craft, arXiv 2502.15734, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from chunkcache.blend import Policy
from chunkcache.engine.versions import Variants
from chunkcache.kv import ChunkKV, ChunkRef, ContextAttention, Span, chunk_name
from chunkcache.library import ChunkLibrary
from chunkcache.prompt import Prompt

_REPAIRED = "\0repaired"  # keeps versions computed after repaired KV apart from exact ones


def kept(span: Span, policy: Policy) -> bool:
    """Return whether the KV that a prefill computes of a chunk are stored."""
    return not span.exact if policy.stores_in_context else policy.versioned and span.kv is None


class ContextualChunks:
    """Finds and stores the chunks of such policies.

    Args:
        library: where chunk KV come from.
    """

    def __init__(self, library: ChunkLibrary) -> None:
        self._library = library
        self._versions = Variants()

    def find(self, prompt: Prompt, spans: Sequence[Span], policy: Policy) -> list[Span]:
        """Return the last spans of a prompt, which are not exact, with the KV of the best version of each."""
        if not policy.versioned:
            return list(spans)
        names = [chunk_name(span.chunk_ids) for span in prompt.spans]
        first = len(prompt.spans) - len(spans)
        return [
            self._best(prompt, span, policy, partial(policy.overhead, before=names[: first + index]))
            for index, span in enumerate(spans)
        ]

    def store(self, prompt: Prompt, policy: Policy, computed: Mapping[int, ChunkKV]) -> None:
        """Store the KV that a prefill computed of chunks, by their position in the prompt.

        No version is made of a chunk that stood behind one of another trust label: its KV can steer whoever uses them
        (HijackKV, arXiv 2607.19957).
        """
        before: list[tuple[int, ...]] = []
        for span in prompt.spans:
            chunks = [span.chunk_ids, *before]
            before.append(span.chunk_ids)
            kv = computed.get(span.start)
            if kv is None:
                continue
            context_ids = prompt.token_ids[: span.start]
            if policy.stores_in_context or span.start == prompt.prefix_tokens:  # nothing repaired stands before it
                self._library.put(self._library.ref(kv.token_ids, context_ids), replace(kv, context=None), chunks)
            elif kv.context is not None and self._library.trusts(chunks):
                key = self._library.ref(kv.token_ids, context_ids, variant=_REPAIRED).key
                if self._library.put_as(key, kv, chunks):
                    for gone in self._versions.add(kv.token_ids, key, kv.context):
                        self._library.drop(gone)

    def _best(
        self, prompt: Prompt, span: Span, policy: Policy, overhead: Callable[[ContextAttention | None], float]
    ) -> Span:
        """Return the span with the version that needs least recomputing, or none if all of it would have to be."""
        ref = self._library.ref_for(span.chunk_ids, prompt.context_ids, policy)
        alone = overhead(None) if self._library.holds(ref) else 1.0
        variant, least = self._versions.pick(span.chunk_ids, overhead)
        while variant is not None and least <= alone and least < 1:
            kv = self._library.get_key(variant.key, span.chunk_ids)
            if kv is not None:
                self._library.credit(variant.key, self._versions.use(variant, least))
                return replace(span, kv=kv)
            self._versions.forget(span.chunk_ids, variant.key)
            variant, least = self._versions.pick(span.chunk_ids, overhead)
        return self._alone(prompt, span, ref) if alone < 1 else span

    def _alone(self, prompt: Prompt, span: Span, ref: ChunkRef) -> Span:
        exact = not span.offset and ref.is_exact_after(prompt.token_ids[: span.start])
        return replace(span, kv=(kv := self._library.get(ref)), exact=exact and kv is not None)
