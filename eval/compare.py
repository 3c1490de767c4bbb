"""Policies and peers side by side on the same prompts: time to first token, fidelity and answers.

The clock runs from the texts in hand to the first token id on the host; that of a peer, and of the model alone, from
the token ids in hand. Full prefill, every policy, the model alone and every peer see each prompt in turn, in an order
drawn anew for each prompt, so that a drift of the machine hits all alike. `eval.summary` says what the rows come to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chunkcache.eval.answers import holds_gold, rouge_l
from chunkcache.eval.contenders import (
    BuildContender,
    Contender,
    FindNearest,
    PeerContender,
    PlainContender,
    Reference,
    policy_contenders,
)
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS, greedy_answer
from chunkcache.eval.machine import SEED, ran_on
from chunkcache.eval.overlap import repeated_share
from chunkcache.eval.results import FULL, PLAIN, Results
from chunkcache.llm import CachedLLM
from chunkcache.store import Store
from chunkcache.store.url import redacted

if TYPE_CHECKING:
    from chunkcache.eval.peers import Build, Peer

BENCH = "requests"
STORE = "memory://?max_bytes=4GiB"


@dataclass(frozen=True)
class Row:
    """One prompt under one policy, in one round; seconds, and nats for KL.

    Attributes:
        prompt: its number.
        round: from 0 on.
        policy: its name, `plain` for the model alone, `build:` and the commit of another build, or `peer:` and the
            peer's name.
        chunks: in the prompt.
        tokens: of the prompt.
        ttft_s: time to first token; None for a peer that failed.
        error: why it failed.
        stages: where it went (`RequestStats.stages`); None for a peer, like all that is known of policies only.
        recomputed_share: token-layers computed, of those of the prompt.
        hits: chunks found in the store.
        misses: chunks that were not.
        fallbacks: 1 if the model prefilled the whole prompt itself instead.
        later_s: what was recomputed once the first token was out; None where no answer was decoded on from it.
        peak_ratio: peak memory of the request over the size of the prompt's own KV; None where it is unknown.
        kl_first: KL(full || policy) of the first token; this and what follows None unless answers were asked for.
        kl_mean: its mean along full prefill's greedy answer; None for a peer, like agreement.
        agreement: share of that answer's tokens that the policy would have chosen, too.
        same_answer: whether its own greedy answer is full prefill's.
        question: the prompt's.
        answer: its own greedy answer.
        accepted: the answers that count as right.
        f1, em, rouge_l, holds_gold: of its answer against these (`eval.answers`); None if there are none.
        gold_in_chunks: whether an accepted answer stands in a chunk of the prompt; None if there are none.
        repeated_chunks: share of the prompt's chunks that stand in another of them (`eval.overlap`).
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
    later_s: float | None = None
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
    holds_gold: float | None = None
    gold_in_chunks: bool | None = None
    repeated_chunks: float | None = None


@dataclass(frozen=True)
class Comparison:
    """How prompts are run.

    Attributes:
        policies: policy strings, and `plain` for the model alone; full prefill always runs and need not be named.
        store: the store for the chunk KV, or its URL; large enough for the chunks of one prompt.
        cold: empty the stores before each request, so that it computes the KV of its chunks itself; otherwise they
            are precomputed before its clock starts.
        rounds: how often each prompt is timed.
        answers: whether fidelity and answers are measured, once per prompt; so is full prefill's own answer, which
            all are compared with.
        answer_tokens: the most that an answer has.
        peer_prompts: peers run on the first so many prompts only; None for all.
        nearest: finds the nearest chunks of each, for policies named `...@neighbours`.
    """

    policies: Sequence[str]
    store: str | Store = STORE
    cold: bool = False
    rounds: int = 1
    answers: bool = True
    peer_prompts: int | None = None
    answer_tokens: int = ANSWER_TOKENS
    nearest: FindNearest | None = None


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    comparison: Comparison,
    *,
    about: Mapping[str, Any] | None = None,
    path: Path | None = None,
    peers: Sequence[Peer | Build] = (),
    on_prompt: Callable[[int, int], None] | None = None,
) -> Results:
    """Run full prefill, policies and `peers` over `cases`.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: the prompts.
        comparison: how they are run.
        about: what tells these cases from others, such as the checksum of their file; goes into the settings.
        path: file that the rows go to, which an interrupted run goes on with; None for none.
        peers: and other builds of chunkcache, started already.
        on_prompt: called with (prompts done, prompts in all).

    Raises:
        PeerError: another build fails, or makes another prompt of the same texts.
        PolicyError: a policy is unknown, or needs a calibration that there is none of.
        ResultsError: `path` holds rows of other settings, or of another machine.
        InputError: cases have answers, but the package that scores them is not installed.
    """
    from chunkcache.eval.peers import Build

    torch.manual_seed(SEED)
    builds = [peer for peer in peers if isinstance(peer, Build)]
    systems = [peer for peer in peers if not isinstance(peer, Build)]
    names = list(dict.fromkeys([FULL, *comparison.policies]))
    ours = policy_contenders(
        model, tokenizer, [name for name in names if name != PLAIN], comparison.store, comparison.cold,
        comparison.answer_tokens, comparison.nearest,
    )  # fmt: skip
    alone = [PlainContender(ours[0].llm, comparison.answer_tokens)] if PLAIN in names else []
    settings = {
        **(about or {}),
        "policies": [*names, *(build.name for build in builds)],
        "options": {each.name: each.options for each in ours}
        | {each.name: each.settings["policy"] for each in builds},
        "fingerprint": ours[0].llm.fingerprint,
        "peers": {peer.name: {"versions": peer.versions, "settings": peer.settings} for peer in systems},
        "peer_prompts": comparison.peer_prompts if systems else None,
        "store": redacted(comparison.store) if isinstance(comparison.store, str) else type(comparison.store).__name__,
        "cold": comparison.cold,
        "rounds": comparison.rounds,
        "answers": comparison.answers,
        "answer_tokens": comparison.answer_tokens if comparison.answers else 0,
        "seed": SEED,
    }
    if comparison.answers and any(case.answers for case in cases):
        rouge_l("a", ["a"])  # raises where it is not installed
    with Results.open(path, BENCH, settings, ran_on(model)) as results:
        others = [BuildContender(build, ours[0].llm, comparison.answer_tokens) for build in builds]
        theirs = [PeerContender(peer, ours[0].llm, comparison.cold, comparison.answer_tokens) for peer in systems]
        measured: dict[int, set[tuple[str, int]]] = {}
        for known in results.rows:
            measured.setdefault(known["prompt"], set()).add((known["policy"], known["round"]))
        _warm_up([*ours, *alone, *others, *theirs], cases[0])
        try:
            for index, case in enumerate(cases):
                with_peers = comparison.peer_prompts is None or index < comparison.peer_prompts
                contenders = [*ours, *alone, *others, *(theirs if with_peers else ())]
                wanted = {(each.name, turn) for each in contenders for turn in range(comparison.rounds)}
                if not wanted <= measured.get(index, set()):
                    for row in _rows(ours[0].llm, contenders, index, case, comparison):
                        results.add(asdict(row))
                if on_prompt is not None:
                    on_prompt(index + 1, len(cases))
        finally:
            for contender in ours:
                contender.llm.delete(tenant=True)
    return results


def _rows(
    llm: CachedLLM, contenders: Sequence[Contender], index: int, case: Case, comparison: Comparison
) -> list[Row]:
    rows: list[Row] = []
    gold = any(holds_gold(chunk, case.answers) for chunk in case.chunks) if case.answers else None
    about: dict[str, Any] = {
        "prompt": index, "chunks": len(case.chunks), "gold_in_chunks": gold,
        "repeated_chunks": repeated_share(case.chunks),
    }  # fmt: skip
    for turn in range(comparison.rounds):
        for contender in contenders:
            contender.prepare(case, again=turn > 0)
        order = random.Random(f"{SEED} {index} {turn}").sample(contenders, len(contenders))
        timed = {each.name: each.time(case) for each in order}
        judged: dict[str, dict[str, Any]] = {}
        if comparison.answers and turn == 0:
            reference = Reference(*greedy_answer(llm, timed[FULL].outcome, comparison.answer_tokens))
            judged = {each.name: each.judge(case, timed[each.name], reference) for each in contenders}
        rows += [
            Row(**about, round=turn, policy=name, **shot.fields, **judged.get(name, {}))
            for name, shot in timed.items()
        ]
    return rows


def _warm_up(contenders: Sequence[Contender], case: Case) -> None:
    """Let kernels and allocators settle on a prompt of two texts that are in no prompt that is measured."""
    short = Case("Is this only to warm up?", tuple(chunk[len(chunk) // 8 :] for chunk in case.chunks[:2]))
    for contender in contenders:
        contender.time(short)
