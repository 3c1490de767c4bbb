"""What one request did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from chunkcache.blend import FusedCache, Plan, SelectivePrefill
from chunkcache.engine.provenance import PromptReport
from chunkcache.library.registry import warn_once


@dataclass
class RequestStats:
    """Counts and seconds of one request.

    On an accelerator the seconds of the prefill's parts and of loading are the device's own (`kv.clock`); what the
    host does, such as reading the store, counts by its clock. `assemble_s`, `select_s`, `recompute_s` and `head_s`
    are parts of `prefill_s`, `wait_s` is one of `assemble_s`, and `load_s` runs beside it.

    Attributes:
        policy: the policy that ran, as a string that names it.
        tokens: length of the prompt.
        chunks: chunks in the prompt.
        hits: of these, found in the store (under an attached `generate`, found in the prompt).
        lost: hits whose KV proved damaged or gone while they were loaded, and were computed with the prompt.
        misses: chunks that were computed for this request because the store did not hold them.
        reused_tokens: tokens that stored KV was put in place for.
        computed_tokens: of these, tokens whose KV were computed for this request, and stored.
        exact_tokens: of the reused tokens, tokens whose stored KV is what a full prefill would compute.
        recomputed_share: token-layers computed, a scout's included, as a share of all token-layers of the prompt.
        guard_passes: partial recomputations that the fidelity guard tried; 0 without a guard.
        guard_predicted: KL of the first token that it predicts at most, in nats; 0 after full prefill.
        guard_full: whether it fell back to full prefill.
        fallbacks: 1 if the request was served by the model's own full prefill instead, else 0.
        batched: sequences that were decoded together; 1 for a request that was answered alone.
        tokenize_s: texts to token ids.
        queue_s: waiting for its turn, once it has been tokenised.
        lookup_s: reading the store.
        compute_s: computing chunk KV and a prefix that were missing, and storing them.
        load_s: loading stored KV from a tier that is not in memory, beside the prefill.
        prefill_s: the selective prefill itself; under `generate`, up to the first token.
        assemble_s: re-rotating stored KV, and waiting for those that are still being loaded.
        wait_s: of this, waiting.
        select_s: choosing what is recomputed, with the passes that look for it.
        recompute_s: the decoder layers, on the rows that are computed; under a guard, with the passes it tries.
        head_s: from the last layer to the logits.
        later_s: what was left for later, once the first token was out (`query:later=`).
        later_rows: tokens that it recomputed, the question's among them.
        ttft_s: from the call to the first token (`generate`) or to the logits (`prefill`).
        report: what was done with each chunk and token; None where no selective prefill of just this prompt ran.
        leads: what chunks were computed behind, by their position, as far as it is known; see `ChunkReport`.
    """

    policy: str
    tokens: int = 0
    chunks: int = 0
    hits: int = 0
    misses: int = 0
    lost: int = 0
    reused_tokens: int = 0
    computed_tokens: int = 0
    exact_tokens: int = 0
    recomputed_share: float = 1.0
    guard_passes: int = 0
    guard_predicted: float = 0.0
    guard_full: bool = False
    fallbacks: int = 0
    batched: int = 1
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    lookup_s: float = 0.0
    compute_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    assemble_s: float = 0.0
    wait_s: float = 0.0
    select_s: float = 0.0
    recompute_s: float = 0.0
    head_s: float = 0.0
    later_s: float = 0.0
    later_rows: int = 0
    ttft_s: float = 0.0
    report: PromptReport | None = field(default=None, repr=False, compare=False)
    leads: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose KV were there before the request."""
        return self.reused_tokens - self.computed_tokens

    def stages(self, ttft_s: float | None = None, queued: bool = False) -> dict[str, float]:
        """Return where the time to first token went, in seconds that add up to it.

        Args:
            ttft_s: as measured by the caller; None for `ttft_s`.
            queued: whether waiting for its turn is told by itself; else it is part of `other`.
        """
        named = {
            "tokenise": self.tokenize_s,
            **({"queue": self.queue_s} if queued else {}),
            "lookup": self.lookup_s,
            "compute": self.compute_s,
            "load": self.wait_s,
            "rerotate": self.assemble_s - self.wait_s,
            "select": self.select_s,
            "recompute": self.recompute_s,
            "head": self.head_s,
        }
        return {**named, "other": (self.ttft_s if ttft_s is None else ttft_s) - sum(named.values())}

    def take(self, plan: Plan, prefill: SelectivePrefill, watched: bool = False) -> None:
        """Take over what a selective prefill of `plan` did, after its first token was waited for.

        Args:
            plan: what was to be reused.
            prefill: what ran.
            watched: whether to keep what the question looked at.
        """
        cache = prefill.cache
        self.report = PromptReport(plan, prefill, self.leads, watched)
        cache.seen = None
        if prefill.guarded is not None:
            self.guard_passes = prefill.guarded.passes
            self.guard_predicted = prefill.guarded.predicted
            self.guard_full = prefill.guarded.full
        self.tokens = len(plan)
        self.reused_tokens, self.exact_tokens = prefill.reused_tokens, prefill.exact_tokens
        self.lost = prefill.lost
        self.load_s, self.assemble_s, self.wait_s = cache.load_s, cache.assemble_s, cache.wait_s
        self.select_s, self.recompute_s, self.head_s = cache.select_s, prefill.recompute_s, prefill.head_s
        if cache.prefilled:
            self.recomputed_share = (cache.computed + cache.scouted) / (len(cache.plan) * len(cache.layers))
        else:
            self.fallbacks = 1
            warn_once("the model put the fused cache aside and prefilled the whole prompt itself")
        self.take_later(cache)

    def take_later(self, cache: Any) -> None:
        """Take over what, if anything, has been recomputed over this cache once its first token was out."""
        if isinstance(cache, FusedCache) and cache.later is not None and cache.later.rows is not None:
            self.later_s, self.later_rows = cache.later_s, len(cache.later.rows)
            if self.report is not None:
                self.report.later = cache.later.rows

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as a plain dict for JSON."""
        named = (each.name for each in fields(self) if each.name not in ("report", "leads"))
        return {name: getattr(self, name) for name in named}
