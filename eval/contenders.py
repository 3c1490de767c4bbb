"""What takes part in a comparison: a policy of ours, the model alone, another build of ours, or a peer.

Each is timed and judged on one prompt at a time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Policy, layer_kv, parse_policy
from chunkcache.engine.engine import PrefillOutput
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import PeerError, PolicyError
from chunkcache.eval.answers import exact_match, f1, holds_gold, rouge_l
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import Fidelity, first_kl, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.measure import finite
from chunkcache.eval.memory import PeakMemory
from chunkcache.eval.results import FULL, PEER, PLAIN
from chunkcache.kv import TokenIds
from chunkcache.library.neighbours import Neighbours, without_repeats
from chunkcache.llm import CachedLLM
from chunkcache.store import Store

if TYPE_CHECKING:
    from chunkcache.eval.peers import Build, Peer

logger = logging.getLogger("chunkcache")

FindNearest = Callable[[Sequence[str]], list[list[str]]]
LeadOf = Callable[[Sequence[str]], tuple[list[list[str]], bool]]  # the nearest, and whether the first place is exact
NEIGHBOURS = "neighbours"  # chunks are computed behind their nearest, and for the first place behind the prefix alone
NEAREST = "nearest"  # the former only
FIRST = "first"  # the latter only
STORED = 4  # nearest chunks that are there when a chunk is computed behind them: as many as stand before it

_OWN_STORE = "memory://?max_bytes=2GiB"


@dataclass(frozen=True)
class Shot:
    """One timed prefill: the fields of its row, and what is needed to judge it."""

    fields: dict[str, Any]
    outcome: Any


@dataclass(frozen=True)
class Reference:
    """Full prefill's greedy answer: token ids, the log-probabilities `[tokens, vocab]` behind them, and its text."""

    ids: list[int]
    log_probs: Tensor


class Contender(Protocol):
    """A policy, another build or a peer."""

    name: str

    def prepare(self, case: Case, again: bool) -> None:
        """Get ready what may be computed before the prompt is known, outside of the clock."""

    def time(self, case: Case) -> Shot:
        """Prefill, on the clock."""

    def judge(self, case: Case, shot: Shot, reference: Reference) -> dict[str, Any]:
        """Return the fields of a row on fidelity and answers; uses the shot up."""


class PolicyContender:
    """A policy of ours, over a store of its own or one that it shares.

    Args:
        name: what it is called in results.
        policy: the policy.
        llm: the wrapped model.
        cold: whether requests compute their chunks themselves.
        answer_tokens: the most it answers.
        lead: says behind which of their nearest chunks are computed; None for behind the lead-in alone.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        llm: CachedLLM,
        cold: bool,
        answer_tokens: int,
        lead: LeadOf | None = None,
    ) -> None:
        self.name = name
        self.llm = llm
        self.policy = llm.resolve_policy(policy)
        self._cold, self._answer_tokens = cold, answer_tokens
        self._lead = lead

    @property
    def options(self) -> str:
        """The policy with nothing left open, and which fit of the guard it runs with."""
        guard = self.llm.engine.tuning.selection(self.policy)
        fit = "" if guard is None else f", guard fit {hashlib.sha256(repr(guard.model).encode()).hexdigest()[:12]}"
        return f"{self.policy}{fit}"

    def prepare(self, case: Case, again: bool) -> None:
        """Compute what may be before the prompt is known: the chunks."""
        if again and (self.policy.stores_in_context or self.policy.versioned):
            self.llm.delete(tenant=True)  # what it stored of this very prompt
        if self.policy.reuses and not self.policy.stores_in_context and not self._cold:
            if self._lead is not None:
                nearest, first = self._lead(case.chunks)
                self.llm.precompute(self._others(case, nearest), policy=self.policy)  # a corpus holds them already
                how = Neighbours(nearest=nearest, first=first, renew=True)
                self.llm.precompute(case.chunks, policy=self.policy, lead=how)
            else:
                self.llm.precompute(case.chunks, policy=self.policy)

    def _others(self, case: Case, nearest: Sequence[Sequence[str]]) -> list[str]:
        """Return the texts that may stand before the chunks of a case."""
        others: dict[TokenIds, str] = {}
        for chunk, texts in zip(map(self.llm.prompts.chunk, case.chunks), nearest, strict=True):
            near = {self.llm.prompts.chunk(text): text for text in texts}
            others.update((ids, near[ids]) for ids in without_repeats(chunk, near)[:STORED])
        return list(others.values())

    def time(self, case: Case) -> Shot:
        """Prefill, on the clock."""
        if self._cold:
            self.llm.delete(tenant=True)
        with PeakMemory(self.llm.model.device) as peak:
            started = time.perf_counter()
            start = self.llm.prefill(case.question, case.chunks, policy=self.policy)
            int(start.logits.argmax())  # the first token id, on the host
            ttft_s = time.perf_counter() - started
        stats = start.stats
        fields = {
            "tokens": stats.tokens,
            "ttft_s": ttft_s,
            "stages": stats.stages(ttft_s),
            "recomputed_share": stats.recomputed_share,
            "hits": stats.hits,
            "misses": stats.misses,
            "fallbacks": stats.fallbacks,
            "peak_ratio": None if peak.nbytes is None else peak.nbytes / kv_bytes(start.past_key_values),
        }
        return Shot(fields, start)

    def judge(self, case: Case, shot: Shot, reference: Reference) -> dict[str, Any]:
        """Return the fields of a row on fidelity and answers; uses the shot up."""
        start = shot.outcome
        again = partial(self.llm.prefill, case.question, case.chunks, policy=self.policy)
        known = reference.log_probs if self.name == FULL else forced_answer(self.llm, start, reference.ids)
        start.stats.take_later(start.past_key_values)
        judged = _judged(self.llm, case, start, known, reference, again, self._answer_tokens)
        return {**judged, "later_s": start.stats.later_s}


class PlainContender:
    """The model alone: one call of it on the token ids, over a cache of transformers' own.

    Nothing of ours is on its clock, which runs from the token ids in hand, as a peer's.
    """

    name = PLAIN

    def __init__(self, llm: CachedLLM, answer_tokens: int) -> None:
        self._llm = llm
        self._answer_tokens = answer_tokens

    def prepare(self, case: Case, again: bool) -> None:
        """There is nothing to compute before the prompt is known."""

    @torch.no_grad()
    def time(self, case: Case) -> Shot:
        """Prefill, on the clock."""
        ids = self._llm.prompts.build(case.question, case.chunks).token_ids
        model: Any = self._llm.model
        keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        with PeakMemory(model.device) as peak:
            started = time.perf_counter()
            input_ids, cache = torch.tensor([ids], device=model.device), DynamicCache()
            logits = model(input_ids, past_key_values=cache, **keep).logits[0, -1]
            int(logits.argmax())  # the first token id, on the host
            ttft_s = time.perf_counter() - started
        ratio = None if peak.nbytes is None else peak.nbytes / kv_bytes(cache)
        start = PrefillOutput(logits, cache, input_ids, RequestStats(PLAIN, tokens=len(ids)))
        return Shot({"tokens": len(ids), "ttft_s": ttft_s, "peak_ratio": ratio}, start)

    def judge(self, case: Case, shot: Shot, reference: Reference) -> dict[str, Any]:
        """Return the fields of a row on fidelity and answers; uses the shot up."""
        known = forced_answer(self._llm, shot.outcome, reference.ids)
        return _judged(
            self._llm, case, shot.outcome, known, reference, lambda: self.time(case).outcome, self._answer_tokens
        )


class BuildContender:
    """Another build of chunkcache, with the policy that it has by default."""

    def __init__(self, build: Build, llm: CachedLLM, answer_tokens: int) -> None:
        self.name = build.name
        self._build, self._llm, self._answer_tokens = build, llm, answer_tokens

    def prepare(self, case: Case, again: bool) -> None:
        """Compute what may be before the prompt is known: the chunks."""
        self._build.warm(case)

    def time(self, case: Case) -> Shot:
        """Prefill, on the clock.

        Raises:
            PeerError: it does not make the same prompt of the texts, or fails.
        """
        told = self._build.prefill(case)
        token_ids = told.pop("token_ids")
        if token_ids != list(self._llm.prompts.build(case.question, case.chunks).token_ids):
            raise PeerError(f"{self.name} makes another prompt of the same texts, and cannot be compared")
        return Shot({"tokens": len(token_ids), **told}, None)

    def judge(self, case: Case, shot: Shot, reference: Reference) -> dict[str, Any]:
        """Return the fields of a row on fidelity and answers of the prompt that was timed last."""
        logits, ids = self._build.judge(reference.ids, self._answer_tokens)
        fidelity = measure_fidelity(reference.log_probs, logits.log_softmax(-1))
        return {**_measured(fidelity), **_answered(self._llm.tokenizer, case, ids, reference)}


class PeerContender:
    """A peer, which is given token ids; one that has ended is left out from then on."""

    def __init__(self, peer: Peer, llm: CachedLLM, cold: bool, answer_tokens: int) -> None:
        self.name = PEER + peer.name
        self._peer = peer
        self._llm = llm
        self._cold, self._answer_tokens = cold, answer_tokens
        self._failed: str | None = None

    def prepare(self, case: Case, again: bool) -> None:
        """Compute what may be before the prompt is known: the chunks."""
        if not self._cold:
            self._try(partial(self._peer.warm, self._parts(case)))

    def time(self, case: Case) -> Shot:
        """Prefill, on the clock."""
        parts = self._parts(case)
        answer = self._try(partial(self._peer.answer, parts, self._answer_tokens))
        ttft_s = None if answer is None else answer.ttft_s
        return Shot({"tokens": sum(map(len, parts)), "ttft_s": ttft_s, "error": self._failed}, answer)

    def judge(self, case: Case, shot: Shot, reference: Reference) -> dict[str, Any]:
        """Return the fields of a row on fidelity and answers; uses the shot up."""
        answer = shot.outcome
        if answer is None:
            return {}
        full = reference.log_probs[0]
        comparable = answer.logits is not None and answer.logits.shape == full.shape
        kl = finite(first_kl(full, answer.logits)) if comparable else None
        return {"kl_first": kl, **_answered(self._llm.tokenizer, case, answer.token_ids, reference)}

    def _try(self, ask: Callable[[], Any]) -> Any:
        """Ask the peer; one that has ended is left out from then on."""
        if self._failed is not None and self._peer.ended:
            return None
        try:
            self._failed = None
            return ask()
        except PeerError as error:
            self._failed = str(error).partition(". It said")[0]
            logger.warning("%s fails: %s", self.name, error)
            return None

    def _parts(self, case: Case) -> list[list[int]]:
        from chunkcache.eval.peers.client import parts

        return parts(self._llm.prompts.build(case.question, case.chunks))


def parse_contender(name: str) -> tuple[Policy, str]:
    """Return the policy that a name such as `query@neighbours` begins with, and what its chunks are computed behind.

    Raises:
        PolicyError: the policy is unknown or wants no neighbours, or there is something else behind the @.
    """
    text, at, lead = name.partition("@")
    policy = parse_policy(text)
    if at and (lead not in (NEIGHBOURS, NEAREST, FIRST) or not policy.neighbours()):
        raise PolicyError(
            f"{name}: @{NEIGHBOURS}, @{NEAREST} and @{FIRST} are for policies that want nearest chunks; "
            "nothing else stands there"
        )
    return policy, lead


def lead_for(name: str, nearest: FindNearest | None) -> LeadOf | None:
    """Return what says behind which chunks those of a contender are computed; None for behind the lead-in alone.

    Raises:
        PolicyError: chunks are to be computed behind their nearest, and `nearest` is None.
    """
    lead = name.partition("@")[2]
    if lead == FIRST:
        return lambda texts: ([[] for _ in texts], True)
    if not lead:
        return None
    if nearest is None:
        raise PolicyError(f"{name}: which chunks are nearest is not known here; leave @{lead} out")
    return lambda texts: (nearest(texts), lead == NEIGHBOURS)


def policy_contenders(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    store: str | Store,
    cold: bool,
    answer_tokens: int,
    nearest: FindNearest | None = None,
) -> list[PolicyContender]:
    """Return the policies, each over what it would find if it ran alone.

    Those that compute chunks behind the same lead-in share them; with another, the first chunk of a prompt would be
    found exact. One that stores chunks in their context gets a store of its own, for the same reason.

    Raises:
        PolicyError: chunks are to be computed behind their nearest, and `nearest` is None.
    """
    run = uuid4().hex
    shared: dict[tuple[int, str], CachedLLM] = {}
    contenders = []
    for name in names:
        policy, lead = parse_contender(name)
        lead_of = lead_for(name, nearest)
        if policy.stores_in_context or policy.versioned:
            llm = chunkcache.wrap(model, tokenizer, store=_OWN_STORE)
        else:
            key = policy.lead_in(), lead
            if key not in shared:
                shared[key] = chunkcache.wrap(model, tokenizer, store=store, tenant=f"bench {run} {key}")
            llm = shared[key]
        contenders.append(PolicyContender(name, policy, llm, cold, answer_tokens, lead_of))
    return contenders


def kv_bytes(cache: Cache) -> int:
    """Return the size of all keys and values in `cache`."""
    return sum(part.nbytes for index in range(len(cache.layers)) for part in layer_kv(cache, index))


def _judged(
    llm: CachedLLM,
    case: Case,
    start: PrefillOutput,
    log_probs: Tensor,
    reference: Reference,
    again: Callable[[], PrefillOutput],
    answer_tokens: int,
) -> dict[str, Any]:
    """Return the fields of a row on fidelity and answers.

    Args:
        llm: the wrapped model.
        case: the prompt.
        start: its prefill, used up along full prefill's answer.
        log_probs: what it gave on the way, `[tokens, vocab]`.
        reference: full prefill's answer.
        again: prefills once more, where the cache cannot be cut.
        answer_tokens: the most that is answered.
    """
    ids = reference.ids
    fidelity = measure_fidelity(reference.log_probs, log_probs)
    if fidelity.agreement < 1:
        cache: Any = start.past_key_values
        if any(cache.is_sliding):  # what slid out of the window is gone
            start = again()
        elif len(ids) > 1:
            cache.crop(1 - len(ids))
        ids = greedy_answer(llm, start, answer_tokens)[0]
    return {**_measured(fidelity), **_answered(llm.tokenizer, case, ids, reference)}


def _measured(fidelity: Fidelity) -> dict[str, Any]:
    """Return the fields of a row on fidelity."""
    return {name: finite(value) for name, value in asdict(fidelity).items()}


def _answered(
    tokenizer: PreTrainedTokenizerBase, case: Case, ids: Sequence[int], reference: Reference
) -> dict[str, Any]:
    """Return the fields of a row that say what was answered, and how good that is."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
    found = {"same_answer": list(ids) == reference.ids, "question": case.question, "answer": text}
    if case.answers:
        scores = {"f1": f1, "em": exact_match, "rouge_l": rouge_l, "holds_gold": holds_gold}
        found |= {"accepted": list(case.answers)}
        found |= {name: score(text, case.answers) for name, score in scores.items()}
    return found
