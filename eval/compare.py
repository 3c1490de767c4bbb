"""Policies and peers side by side on the same prompts: time to first token, fidelity and answers.

The clock runs from the texts in hand to the first token id on the host; a peer's from the token ids in hand. Full
prefill, every policy and every peer see each prompt in turn, in an order drawn anew for each prompt, so that a drift
of the machine hits all alike. What the rows come to is told by `eval.summary`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import layer_kv, parse_policy
from chunkcache.errors import PeerError
from chunkcache.eval.answers import exact_match, f1, rouge_l
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS, first_kl, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.machine import SEED, ran_on
from chunkcache.eval.memory import PeakMemory
from chunkcache.eval.results import Results
from chunkcache.llm import CachedLLM
from chunkcache.store import Store
from chunkcache.store.url import redacted

if TYPE_CHECKING:
    from chunkcache.eval.peers.client import Peer

logger = logging.getLogger("chunkcache")

BENCH = "requests"
FULL = "full"
PEER = "peer:"
STORE = "memory://?max_bytes=4GiB"
_OWN_STORE = "memory://?max_bytes=2GiB"


@dataclass(frozen=True)
class Row:
    """One prompt under one policy, in one round; seconds, and nats for KL.

    Attributes:
        prompt: its number.
        round: from 0 on.
        policy: its name, or `peer:` and the peer's.
        chunks: in the prompt.
        tokens: of the prompt.
        ttft_s: time to first token; None for a peer that failed.
        error: why it failed.
        stages: where it went (`RequestStats.stages`); None for a peer, like all that is known of policies only.
        recomputed_share: token-layers computed, of those of the prompt.
        hits: chunks found in the store.
        misses: chunks that were not.
        fallbacks: 1 if the model prefilled the whole prompt itself instead.
        peak_ratio: peak memory of the request over the size of the prompt's own KV; None where it is unknown.
        kl_first: KL(full || policy) of the first token; this and what follows None unless answers were asked for.
        kl_mean: its mean along full prefill's greedy answer; None for a peer, like agreement.
        agreement: share of that answer's tokens that the policy would have chosen, too.
        same_answer: whether its own greedy answer is full prefill's.
        question: the prompt's.
        answer: its own greedy answer.
        accepted: the answers that count as right.
        f1, em, rouge_l: of its answer against these; None if there are none.
    """

    prompt: int
    round: int
    policy: str
    chunks: int
    tokens: int
    ttft_s: float | None
    error: str | None = None
    stages: Mapping[str, float] | None = None
    recomputed_share: float | None = None
    hits: int | None = None
    misses: int | None = None
    fallbacks: int | None = None
    peak_ratio: float | None = None
    kl_first: float | None = None
    kl_mean: float | None = None
    agreement: float | None = None
    same_answer: bool | None = None
    question: str | None = None
    answer: str | None = None
    accepted: Sequence[str] = ()
    f1: float | None = None
    em: float | None = None
    rouge_l: float | None = None


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    policies: Sequence[str],
    about: Mapping[str, Any] | None = None,
    path: Path | None = None,
    store: str | Store = STORE,
    cold: bool = False,
    rounds: int = 1,
    answers: bool = True,
    peers: Sequence[Peer] = (),
    peer_prompts: int | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
) -> Results:
    """Run full prefill, `policies` and `peers` over `cases`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: the prompts.
        policies: policy strings; full prefill always runs and need not be named.
        about: what tells these cases from others, such as the checksum of their file; goes into the settings.
        path: file that the rows go to, which an interrupted run goes on with; None for none.
        store: the store for the chunk KV, or its URL; large enough for the chunks of one prompt.
        cold: empty the stores before each request, so that it computes the KV of its chunks itself; otherwise they
            are precomputed before its clock starts.
        rounds: how often each prompt is timed.
        answers: whether fidelity and answers are measured, once per prompt.
        peers: started already.
        peer_prompts: they run on the first so many prompts only; None for all.
        on_prompt: called with (prompts done, prompts in all).

    Raises:
        PolicyError: a policy is unknown, or needs a calibration that there is none of.
        ResultsError: `path` holds rows of other settings, or of another machine.
        DocumentError: cases have answers, but the package that scores them is not installed.
    """
    torch.manual_seed(SEED)
    names = list(dict.fromkeys([FULL, *policies]))
    for name in names:
        parse_policy(name)
    ours = _policies(model, tokenizer, names, store, cold)
    settings = {
        **(about or {}),
        "policies": names,
        "options": {each.name: each.options for each in ours},
        "fingerprint": ours[0].llm.fingerprint,
        "peers": {peer.name: {"versions": peer.versions, "settings": peer.settings} for peer in peers},
        "peer_prompts": peer_prompts if peers else None,
        "store": redacted(store) if isinstance(store, str) else type(store).__name__,
        "cold": cold,
        "rounds": rounds,
        "answers": answers,
        "answer_tokens": ANSWER_TOKENS if answers else 0,
        "seed": SEED,
    }
    if answers and any(case.answers for case in cases):
        rouge_l("a", ["a"])
    with Results.open(path, BENCH, settings, ran_on(model)) as results:
        theirs = [_PeerContender(peer, ours[0].llm, cold) for peer in peers]
        there: dict[int, set[tuple[str, int]]] = {}
        for row in results.rows:
            there.setdefault(row["prompt"], set()).add((row["policy"], row["round"]))
        _warm_up([*ours, *theirs], cases[0])
        try:
            for index, case in enumerate(cases):
                contenders = [*ours, *(theirs if peer_prompts is None or index < peer_prompts else ())]
                wanted = {(contender.name, turn) for contender in contenders for turn in range(rounds)}
                if not wanted <= there.get(index, set()):
                    for measured in _measure(ours[0].llm, contenders, index, case, rounds, answers):
                        results.add(asdict(measured))
                if on_prompt is not None:
                    on_prompt(index + 1, len(cases))
        finally:
            for each in ours:
                each.llm.forget()
    return results


def kv_bytes(cache: Cache) -> int:
    """Return the size of all keys and values in `cache`."""
    return sum(part.nbytes for index in range(len(cache.layers)) for part in layer_kv(cache, index))


def _measure(
    llm: CachedLLM, contenders: Sequence[_Contender], index: int, case: Case, rounds: int, answers: bool
) -> list[Row]:
    rows: list[Row] = []
    for turn in range(rounds):
        for contender in contenders:
            contender.prepare(case, again=turn > 0)
        order = random.Random(f"{SEED} {index} {turn}").sample(contenders, len(contenders))
        timed = {each.name: each.time(case) for each in order}
        judged: dict[str, dict[str, Any]] = {}
        if answers and turn == 0:
            reference = _Reference(*greedy_answer(llm, timed[FULL].outcome, ANSWER_TOKENS))
            judged = {each.name: each.judge(case, timed[each.name], reference) for each in contenders}
        rows += [
            Row(prompt=index, round=turn, policy=name, chunks=len(case.chunks), **shot.fields, **judged.get(name, {}))
            for name, shot in timed.items()
        ]
    return rows


def _warm_up(contenders: Sequence[_Contender], case: Case) -> None:
    """Let kernels and allocators settle on a prompt of two texts that are in no prompt that is measured."""
    short = Case("Is this only to warm up?", tuple(chunk[len(chunk) // 8 :] for chunk in case.chunks[:2]))
    for contender in contenders:
        contender.time(short)


@dataclass(frozen=True)
class _Shot:
    """One timed prefill: the fields of its row, and what is needed to judge it."""

    fields: dict[str, Any]
    outcome: Any


@dataclass(frozen=True)
class _Reference:
    """Full prefill's greedy answer: token ids, the log-probabilities `[tokens, vocab]` behind them, and its text."""

    ids: list[int]
    log_probs: Tensor


class _Contender(Protocol):
    """A policy or a peer."""

    name: str

    def prepare(self, case: Case, again: bool) -> None:
        """Get ready what may be computed before the prompt is known, outside of the clock."""

    def time(self, case: Case) -> _Shot:
        """Prefill, on the clock."""

    def judge(self, case: Case, shot: _Shot, reference: _Reference) -> dict[str, Any]:
        """Return the fields of a row on fidelity and answers; uses the shot up."""


class _PolicyContender:
    def __init__(self, name: str, llm: CachedLLM, cold: bool) -> None:
        self.name = name
        self.llm = llm
        self.policy = llm.resolve_policy(name)
        self._cold = cold

    @property
    def options(self) -> str:
        """The policy with nothing left open, and which fit of the guard it runs with."""
        guard = self.llm.tuning.guard(self.policy)
        fit = "" if guard is None else f", guard fit {hashlib.sha256(repr(guard).encode()).hexdigest()[:12]}"
        return f"{self.policy}{fit}"

    def prepare(self, case: Case, again: bool) -> None:
        if again and (self.policy.stores_in_context or self.policy.versioned):
            self.llm.forget()  # what it stored of this very prompt
        if self.policy.reuses and not self.policy.stores_in_context and not self._cold:
            self.llm.precompute(case.chunks, policy=self.name)

    def time(self, case: Case) -> _Shot:
        if self._cold:
            self.llm.forget()
        with PeakMemory(self.llm.model.device) as peak:
            started = time.perf_counter()
            start = self.llm.prefill(case.question, case.chunks, policy=self.name)
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
            "peak_ratio": None if peak.nbytes is None else peak.nbytes / kv_bytes(start.cache),
        }
        return _Shot(fields, start)

    def judge(self, case: Case, shot: _Shot, reference: _Reference) -> dict[str, Any]:
        ids, start = reference.ids, shot.outcome
        log_probs = reference.log_probs if self.name == FULL else forced_answer(self.llm, start, ids)
        fidelity = measure_fidelity(reference.log_probs, log_probs)
        if fidelity.agreement < 1:
            if any(start.cache.is_sliding):  # what slid out of the window is gone
                start = self.llm.prefill(case.question, case.chunks, policy=self.name)
            elif len(ids) > 1:
                start.cache.crop(1 - len(ids))
            ids = greedy_answer(self.llm, start, ANSWER_TOKENS)[0]
        measured = {name: _finite(value) for name, value in asdict(fidelity).items()}
        return {**measured, **_answered(self.llm.tokenizer, case, ids, reference)}


class _PeerContender:
    def __init__(self, peer: Peer, llm: CachedLLM, cold: bool) -> None:
        self.name = PEER + peer.name
        self._peer = peer
        self._llm = llm
        self._cold = cold
        self._failed: str | None = None

    def prepare(self, case: Case, again: bool) -> None:
        if not self._cold:
            self._try(partial(self._peer.warm, self._parts(case)))

    def time(self, case: Case) -> _Shot:
        parts = self._parts(case)
        answer = self._try(partial(self._peer.answer, parts, ANSWER_TOKENS))
        ttft_s = None if answer is None else answer.ttft_s
        return _Shot({"tokens": sum(map(len, parts)), "ttft_s": ttft_s, "error": self._failed}, answer)

    def judge(self, case: Case, shot: _Shot, reference: _Reference) -> dict[str, Any]:
        answer = shot.outcome
        if answer is None:
            return {}
        full = reference.log_probs[0]
        comparable = answer.logits is not None and answer.logits.shape == full.shape
        kl = _finite(first_kl(full, answer.logits)) if comparable else None
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


def _policies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], store: str | Store, cold: bool
) -> list[_PolicyContender]:
    """Return the policies, each over what it would find if it ran alone.

    Those that compute chunks behind the same lead-in share them; with another, the first chunk of a prompt would be
    found exact. One that stores chunks in their context gets a store of its own, for the same reason.
    """
    run = uuid4().hex
    shared: dict[int, CachedLLM] = {}
    found = []
    for name in names:
        policy = parse_policy(name)
        if policy.stores_in_context or policy.versioned:
            llm = chunkcache.wrap(model, tokenizer, store=_OWN_STORE)
        else:
            lead = policy.lead_in()
            if lead not in shared:
                shared[lead] = chunkcache.wrap(model, tokenizer, store=store, tenant=f"bench {run} {lead}")
            llm = shared[lead]
        found.append(_PolicyContender(name, llm, cold))
    return found


def _finite(value: float) -> float | None:
    """Return None for what JSON cannot hold: a divergence where full prefill rules a token out."""
    return value if math.isfinite(value) else None


def _answered(
    tokenizer: PreTrainedTokenizerBase, case: Case, ids: Sequence[int], reference: _Reference
) -> dict[str, Any]:
    """Return the fields of a row that say what was answered, and how good that is."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
    found = {"same_answer": list(ids) == reference.ids, "question": case.question, "answer": text}
    if case.answers:
        scores = {"f1": f1(text, case.answers), "em": exact_match(text, case.answers)}
        found |= {"accepted": list(case.answers), **scores, "rouge_l": rouge_l(text, case.answers)}
    return found
