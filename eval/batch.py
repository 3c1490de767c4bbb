"""Offline batches: tokens per second, KV, loads, and whether answers hold, of three ways to answer many questions.

Some questions are asked over each of a few sets of chunks, and neighbouring sets have a chunk in common. They come
shuffled, and are answered one by one in that order; by `generate_batch`; and, as transformers' users do it, by the
model's own `generate()` on left-padded whole prompts, to tell what sharing adds from what batching does. The store
is empty before each pass: computing chunks is part of its time. Attention is timed by itself, too: over one copy of
shared KV, and over a copy for each sequence.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import layer_kv
from chunkcache.engine.batch import MAX_BATCH, Batch
from chunkcache.engine.generation import Generation
from chunkcache.engine.grouping import grouped
from chunkcache.engine.stats import RequestStats
from chunkcache.eval.answers import f1
from chunkcache.eval.attention_time import time_attention
from chunkcache.eval.batch_summary import BATCHED, GROUPED, WAYS
from chunkcache.eval.batch_summary import summary as summary
from chunkcache.eval.data import Case
from chunkcache.eval.machine import ran_on
from chunkcache.eval.memory import PeakMemory
from chunkcache.eval.results import FULL, Results
from chunkcache.llm import CachedLLM
from chunkcache.store import open_store
from chunkcache.store.url import redacted

BENCH = "batch"
STORE = "memory://?max_bytes=4GiB"
BATCHES, LENGTHS = (2, 4, 8), (512, 1024, 2048, 4096)  # sequences and shared tokens that attention is timed for
OnPass = Callable[[int, int], None]


def workload(cases: Sequence[Case], chunks: int, questions: int, seed: int = 0) -> list[Case]:
    """Return the cases shuffled, each over the chunks of its set instead of its own.

    Args:
        cases: in runs of `questions`, which make a set; an incomplete run at the end is left out.
        chunks: of a set: of its cases in turn, and the last is the first of the set before it.
        questions: how many are asked over a set.
        seed: of the order.
    """
    found: list[Case] = []
    common: str | None = None
    for start in range(0, len(cases) - questions + 1, questions):
        asked = cases[start : start + questions]
        deepest = max(len(case.chunks) for case in asked)
        pool = dict.fromkeys(case.chunks[i] for i in range(deepest) for case in asked if i < len(case.chunks))
        own = [chunk for chunk in pool if chunk != common][: chunks - (common is not None)]
        texts = tuple(own) if common is None else (*own, common)
        common = texts[0]
        found += [Case(case.question, texts, case.answers) for case in asked]
    random.Random(seed).shuffle(found)
    return found


@dataclass(frozen=True)
class Batching:
    """How questions are answered.

    Attributes:
        policies: policy strings; full prefill always runs.
        store: URL of a store that is used for nothing else, since it is cleared before each pass.
        max_batch: sequences that are decoded together at most.
        new_tokens: length of an answer at most.
        rounds: how often all passes are run.
    """

    policies: Sequence[str]
    store: str = STORE
    max_batch: int = MAX_BATCH
    new_tokens: int = 32
    rounds: int = 1


def bench_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    batching: Batching,
    about: Mapping[str, Any],
    path: Path | None = None,
    on_pass: OnPass | None = None,
) -> Results:
    """Answer `cases`, in their order and in groups, under full prefill and each policy; and in plain batches.

    The order of the ways goes round from policy to policy and from round to round: over three rounds each comes first
    once. Fewer leave some of the machine's drift in the figures.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: what `workload` returned.
        batching: how they are answered.
        about: settings that say where the cases are from.
        path: the file of the results; None keeps them in memory.
        on_pass: called with (passes done, passes in all).

    Raises:
        PolicyError, StoreURLError: one is unknown.
        ResultsError: the file holds something else.
    """
    names = list(dict.fromkeys([FULL, *batching.policies]))
    settings = {
        **about, "requests": len(cases), "policies": names, "store": redacted(batching.store),
        "max_batch": batching.max_batch, "new_tokens": batching.new_tokens, "rounds": batching.rounds,
    }  # fmt: skip
    with Results.open(path, BENCH, settings, ran_on(model)) as results, open_store(batching.store) as opened:
        llms = {name: chunkcache.wrap(model, tokenizer, store=opened, policy=name) for name in names}
        passes = _Passes(llms, cases, batching.max_batch, batching.new_tokens)
        todo = [
            (round_, name, way)
            for round_ in range(batching.rounds)
            for index, name in enumerate(names)
            for turn in range(len(WAYS))
            if (way := WAYS[(turn + round_ + index) % len(WAYS)]) != BATCHED or name == FULL
        ]
        for done, (round_, name, way) in enumerate(todo):
            if not results.done(kind="pass", round=round_, policy=name, way=way):
                results.add({"kind": "pass", "round": round_, **passes.run(name, way)})
            if on_pass is not None:
                on_pass(done + 1, len(todo))
        for batch in BATCHES:
            for tokens in LENGTHS:
                if not results.done(kind="attention", sequences=batch, tokens=tokens):
                    results.add(time_attention(model, batch, tokens))
    return results


class _FirstScores(LogitsProcessor):
    """Takes the scores of the first token of each sequence, in the order that they are computed in."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scores is None:
            self.scores = scores.float().log_softmax(-1)
        return scores


@dataclass
class _Passes:
    """Passes over all requests; full prefill's first tokens are kept, to compare the others' with."""

    llms: dict[str, CachedLLM]
    cases: Sequence[Case]
    max_batch: int
    new_tokens: int
    _full: list[Tensor] | None = None

    def run(self, policy: str, way: str) -> dict[str, Any]:
        """Answer all requests, and return a row."""
        llm = self.llms[policy]
        if self._full is None and policy != FULL:
            self._full = self._answer(self.llms[FULL], GROUPED, 1)[1]
        per_token = self._warm_up(llm, way)
        llm.store.clear()
        before = _hits(llm)
        batches: list[dict[str, Any]] = []
        with PeakMemory(llm.model.device) as peak:
            started = time.perf_counter()
            answers, first = self._answer(llm, way, self.new_tokens, batches)
            seconds = time.perf_counter() - started
        if self._full is None:
            self._full = first
        return {
            "policy": policy,
            "way": way,
            "seconds": seconds,
            "prompt_tokens": sum(each.stats.tokens for each in answers),
            "new_tokens": sum(len(each.token_ids) for each in answers),
            "kv_bytes": max(
                batch["kv_bytes"]
                or per_token
                * len(batch["requests"])
                * (max(answers[index].stats.tokens for index in batch["requests"]) + self.new_tokens)
                for batch in batches
            ),
            "peak_bytes": peak.nbytes,
            "loads": {tier: hits - before[tier] for tier, hits in _hits(llm).items()},
            "batches": batches,
            "answers": [
                {
                    "request": index,
                    "question": case.question,
                    "tokens": answer.stats.tokens,
                    "recomputed_share": answer.stats.recomputed_share,
                    "answer": answer.text,
                    "token_ids": answer.token_ids,
                    "f1": f1(answer.text, case.answers) if case.answers else None,
                    "kl_first": _kl(self._full[index], first[index]),
                }
                for index, (case, answer) in enumerate(zip(self.cases, answers, strict=True))
            ],
        }

    def _answer(
        self, llm: CachedLLM, way: str, new_tokens: int, batches: list[dict[str, Any]] | None = None
    ) -> tuple[list[Generation], list[Tensor]]:
        """Return the answers, and the log-probabilities `[vocab]` of the first token of each."""
        taken = _FirstScores()
        first: dict[int, Tensor] = {}
        last = time.perf_counter()

        def take(batch: Batch) -> None:
            nonlocal last
            assert taken.scores is not None
            first.update(zip(batch.requests, taken.scores.cpu(), strict=True))
            taken.scores = None
            now = time.perf_counter()
            if batches is not None:
                batches.append(
                    {
                        "requests": list(batch.requests),
                        "shared_tokens": batch.shared_tokens,
                        "kv_bytes": batch.kv_bytes,
                        "seconds": now - last,
                    }
                )
            last = now

        requests = [(case.question, case.chunks) for case in self.cases]
        options: dict[str, Any] = {
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "logits_processor": LogitsProcessorList([taken]),
        }
        if way == GROUPED:
            answers = llm.generate_batch(requests, max_batch=self.max_batch, on_batch=take, **options)
        elif way == BATCHED:
            answers = plain_batches(llm, requests, self.max_batch, take, options)
        else:
            answers = []
            for index, request in enumerate(requests):
                answers.append(llm.generate(*request, **options))
                take(Batch((index,), index, 0, 0, index + 1, len(requests), (answers[-1],)))
        return answers, [first[index] for index in range(len(self.cases))]

    def _warm_up(self, llm: CachedLLM, way: str) -> float:
        """Let kernels and allocators settle on short prompts; return the bytes of KV of a token."""
        chunks = [chunk[:200] for chunk in self.cases[0].chunks[:2]]
        requests = [("Is this to warm up?", chunks), ("Or not?", chunks)]
        if way == GROUPED:
            llm.generate_batch(requests, max_new_tokens=2)
        elif way == BATCHED:
            plain_batches(llm, requests, 2, lambda batch: None, {"max_new_tokens": 2, "do_sample": False})
        start = llm.prefill("Is this to warm up?", chunks)
        layers = range(len(start.past_key_values.layers))
        return sum(part.nbytes / part.shape[2] for index in layers for part in layer_kv(start.past_key_values, index))


def plain_batches(
    llm: CachedLLM,
    requests: Sequence[tuple[str, Sequence[str]]],
    max_batch: int,
    on_batch: Callable[[Batch], None],
    options: dict[str, Any],
) -> list[Generation]:
    """Answer with the model's own `generate()`, the whole prompts of a group side by side and padded on the left.

    An answer's `ttft_s` is when its batch was done; what a batch tells of its KV is 0.

    Args:
        llm: whose model and prompts they are; nothing else of it is used.
        requests: question and chunks of each.
        max_batch: sequences of a batch at most.
        on_batch: called with every batch that is done.
        options: keywords for `generate()`.
    """
    started = time.perf_counter()
    tokenizer, device = llm.tokenizer, llm.model.device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos = llm.model.generation_config.eos_token_id
    ends = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
    prompts = [llm.prompts.build(*request) for request in requests]
    found: dict[int, Generation] = {}
    for number, group in enumerate(grouped(prompts)):
        members = sorted(group, key=lambda index: len(prompts[index].token_ids))
        for at in range(0, len(members), max_batch):
            batch = members[at : at + max_batch]
            ids = [list(prompts[index].token_ids) for index in batch]
            longest = max(map(len, ids))
            padded = torch.tensor([[pad] * (longest - len(each)) + each for each in ids], device=device)
            mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids], device=device)
            output = llm.model.generate(padded, attention_mask=mask, pad_token_id=pad, **options)
            seconds = time.perf_counter() - started
            for index, row in zip(batch, output[:, longest:].tolist(), strict=True):
                length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
                text = str(tokenizer.decode(row[:length], skip_special_tokens=True)).strip()
                stats = RequestStats(
                    FULL, len(prompts[index].token_ids), len(requests[index][1]), batched=len(batch), ttft_s=seconds
                )
                found[index] = Generation(text, row[:length], seconds, stats, None)
            done = tuple(found[index] for index in batch)
            on_batch(Batch(tuple(batch), number, 0, 0, len(found), len(requests), done))
    return [found[index] for index in range(len(requests))]


def _hits(llm: CachedLLM) -> dict[str, int]:
    return {name: tier.stats().hits for name, tier in llm.store.tiers().items()}


def _kl(full: Tensor, other: Tensor) -> float:
    kl = torch.nn.functional.kl_div(other, full, reduction="sum", log_target=True)
    return max(float(kl), 0.0)
