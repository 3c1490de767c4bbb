"""From a prompt to a plan: which stored KV lie where in it, and what has to be computed first."""

from __future__ import annotations

import time
from functools import partial

from chunkcache.blend import Decoder, FusedCache, Plan, Policy, Segment
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import ContextLengthError
from chunkcache.kv import ChunkKV, ContextAttention, chunk_name
from chunkcache.library.encoder import TokenIds
from chunkcache.library.library import ChunkLibrary
from chunkcache.prompt.builder import Prompt, PromptBuilder


class Planner:
    """Plans the requests of one wrapped model.

    Args:
        decoder: the model.
        library: where chunk KV come from.
        prompts: knows the lead-in.
    """

    def __init__(self, decoder: Decoder, library: ChunkLibrary, prompts: PromptBuilder) -> None:
        self._decoder = decoder
        self._library = library
        self._prompts = prompts

    def plan(self, prompt: Prompt, policy: Policy, started: float, room: int = 1) -> tuple[Plan, RequestStats]:
        """Look up what is stored of `prompt`, and compute what the policy needs and is missing.

        Args:
            prompt: the prompt.
            policy: what will be recomputed of it.
            started: when the request came, by `time.perf_counter`.
            room: tokens that must fit behind the prompt.

        Raises:
            ContextLengthError: prompt and room do not fit the model's context.
        """
        now = time.perf_counter()
        stats = RequestStats(str(policy), chunks=len(prompt.chunks), tokenize_s=now - started)
        ids = prompt.token_ids
        limit = self._decoder.max_tokens
        if len(ids) + room > limit:
            raise ContextLengthError(
                f"a prompt of {len(ids)} tokens and {room} new ones do not fit the model's context of {limit} "
                "tokens; pass fewer or shorter chunks, or lower max_new_tokens"
            )
        segments: list[Segment] = []
        if policy.reuses:
            if prompt.prefix:
                kv = prompt.head or self._prefix(prompt.prefix, stats)
                segments.append(Segment(0, kv, 0, len(kv), exact=True))
            segments += self._chunk_segments(prompt, policy, stats)
            stats.lookup_s = time.perf_counter() - now - stats.compute_s
        return Plan.of(ids, segments, [(each.start, each.end) for each in prompt.placed]), stats

    def behind(self, prefix: TokenIds, chunk: TokenIds, policy: Policy) -> TokenIds:
        """Return what `chunk` is computed behind: prefix and lead-in, or the prefix where both leave no room."""
        lead_in = self._prompts.lead_in(policy.lead_in())
        fits = len(prefix) + len(lead_in) + len(chunk) < self._decoder.max_tokens
        return (*prefix, *lead_in) if fits else prefix

    def remember(
        self, prompt: Prompt, plan: Plan, policy: Policy, cache: FusedCache, contexts: dict[int, ContextAttention]
    ) -> None:
        """Store what a prefill computed of `plan`, if the policy wants it.

        Args:
            prompt: the prompt.
            plan: what was reused of it.
            policy: one that remembers stores all chunks for exact reuse behind the same tokens; a contextual one
                those that were computed whole, as versions of themselves.
            cache: complete, sliding windows not yet trimmed.
            contexts: what the chunks that were computed whole looked at, by their start.
        """
        exact = {segment.start for segment in plan.segments if segment.exact}
        before: list[TokenIds] = []
        for each in prompt.placed:
            start, end = each.start, each.end
            chunks = [each.chunk, *before]
            before.append(each.chunk)
            alone = start == len(prompt.prefix) and start in contexts
            if alone or (policy.stores_in_context and start not in exact):
                self._library.remember(cache, plan.token_ids, (start, end), chunks)
            elif start in contexts:
                self._library.remember_version(cache, plan.token_ids, (start, end), chunks, contexts[start])

    def _prefix(self, prefix: TokenIds, stats: RequestStats) -> ChunkKV:
        kv = self._library.stored_prefix(prefix)
        if kv is None:
            before = time.perf_counter()
            kv = self._library.compute({prefix: ()})[prefix]
            stats.compute_s += time.perf_counter() - before
            stats.computed_tokens += len(prefix)
        return kv

    def _chunk_segments(self, prompt: Prompt, policy: Policy, stats: RequestStats) -> list[Segment]:
        """Return a segment per chunk: exact as long as all before it is, out of its own context afterwards."""
        found = self._found(prompt, policy)
        missing = [chunk for chunk, (kv, _) in zip(prompt.chunks, found, strict=True) if kv is None]
        stats.hits, stats.misses = len(found) - len(missing), len(missing)
        computed: dict[TokenIds, ChunkKV] = {}
        if missing and not (policy.stores_in_context or policy.versioned):
            before = time.perf_counter()
            computed = self._library.compute({chunk: self.behind(prompt.opening, chunk, policy) for chunk in missing})
            stats.compute_s += time.perf_counter() - before
        segments = []
        for each, (stored, exact) in zip(prompt.placed, found, strict=True):
            kv = stored or computed.get(each.chunk)
            if stored is None and kv is not None:
                stats.computed_tokens += each.last - each.first
            if kv is not None and exact:  # stored as it stands here
                segments.append(Segment(each.start, kv, 0, len(kv), exact))
            elif kv is not None:
                begins = each.first == 0 and each.start == kv.position == len(prompt.prefix)
                begins = begins and prompt.opening == prompt.prefix
                segments.append(Segment(each.start, kv, each.first, each.last - each.first, begins))
        return segments

    def _found(self, prompt: Prompt, policy: Policy) -> list[tuple[ChunkKV | None, bool]]:
        """Return what the store has of each chunk, and whether that was computed behind the very same tokens."""
        names = [chunk_name(chunk) for chunk in prompt.chunks] if policy.versioned else []
        found: list[tuple[ChunkKV | None, bool]] = []
        context, exact = prompt.prefix, True
        for index, each in enumerate(prompt.placed):
            chunk, context = each.chunk, (*context, *each.gap)
            exact = exact and self._library.holds(context, each.standing)
            kv = self._library.get(context, each.standing) if exact else None
            exact = kv is not None
            if exact:
                context = (*context, *each.standing)
            elif policy.versioned:
                overhead = partial(policy.overhead, before=names[:index])
                kv = self._library.best(self.behind(prompt.opening, chunk, policy), chunk, overhead)
            elif not policy.stores_in_context:
                kv = self._library.get(self.behind(prompt.opening, chunk, policy), chunk)
            found.append((kv, exact))
        return found
