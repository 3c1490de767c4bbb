"""Finds out whether chunks of a model are better computed behind the packaged lead-in, or behind the prefix alone.

A lead-in helps most models and harms some. What tells is how far the next token's distribution moves from full
prefill's, along the answers to questions over a few packaged documents, with nothing recomputed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

import chunkcache
from chunkcache.blend import Decoder, Plan, SelectivePrefill
from chunkcache.blend.query import LEAD
from chunkcache.blend.reuse import Reuse
from chunkcache.kv import ChunkKV, Span
from chunkcache.library.encoder import Encoder
from chunkcache.prompt import Prompt, PromptBuilder

EXAMPLES = Path(chunkcache.__file__).parent / "examples"
SETS = 3  # sets of documents
DOCUMENTS = 3  # in each of them
CHARACTERS = 1200  # of each document


@dataclass(frozen=True)
class LeadCheck:
    """What was found.

    Attributes:
        lead: tokens of lead-in that the model's chunks are best computed behind: 0 where it hurts.
        kl_alone: mean KL(full || reuse) along the answers, in nats, of chunks computed behind the prefix alone.
        kl_lead: of chunks computed behind the lead-in.
        answers: questions that were answered.
        tokens: of all answers.
        seconds: how long it took.
    """

    lead: int
    kl_alone: float
    kl_lead: float
    answers: int
    tokens: int
    seconds: float


def check_lead_in(
    decoder: Decoder, prompts: PromptBuilder, on_step: Callable[[int, int], None] | None = None
) -> LeadCheck | None:
    """Measure with and without the lead-in of `prompts`; None where there is none, or no room for one.

    Args:
        decoder: a decoder over the model.
        prompts: builds its prompts.
        on_step: called with (sets of documents done, all).
    """
    started = time.perf_counter()
    lead_in = prompts.lead_in[-LEAD:]
    sums, answers, tokens = torch.zeros(2, dtype=torch.float64), 0, 0
    sets = list(_sets())
    for number, (chunks, questions) in enumerate(sets):
        built = [(prompts.build(question, chunks), answer) for question, answer in questions]
        longest = max(len(prompt.token_ids) for prompt, _ in built)
        if not lead_in or longest + len(lead_in) > decoder.max_tokens:
            return None
        stored = _stored(decoder, built[0][0], lead_in)
        for prompt, answer in built:
            ids = prompts.encode(answer)
            true, *others = (_along(decoder, prompt, kv, ids) for kv in stored)
            for place, log_probs in enumerate(others):
                sums[place] += kl_div(log_probs, true, reduction="sum", log_target=True).double()
            answers, tokens = answers + 1, tokens + len(ids)
        if on_step is not None:
            on_step(number + 1, len(sets))
    alone, behind = (sums / tokens).tolist()
    return LeadCheck(LEAD if behind <= alone else 0, alone, behind, answers, tokens, time.perf_counter() - started)


def _sets() -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """Yield beginnings of packaged documents, and the questions on them with their answers."""
    rows = (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for row in map(json.loads, rows):
        if len(row["documents"]) == 1:
            asked.setdefault(row["documents"][0], []).append(row)
    names = sorted(asked, key=lambda name: (-len(asked[name]), name))
    for first in range(SETS):
        chosen = names[first :: len(names) // DOCUMENTS][:DOCUMENTS]
        texts = [(EXAMPLES / "corpus" / name).read_text(encoding="utf-8")[:CHARACTERS] for name in chosen]
        yield texts, [(row["question"], row["answers"][0]) for name in chosen for row in asked[name]]


def _stored(decoder: Decoder, prompt: Prompt, lead_in: Sequence[int]) -> list[list[ChunkKV]]:
    """Return the KV of a prompt's chunks as full prefill has them, behind the prefix alone, and behind the lead-in.

    The prefix is the first of each.
    """
    prefix = Span(0, prompt.prefix_tokens, prompt.prefix)
    whole = Plan.of(prompt.token_ids, [*([prefix] if len(prefix) else ()), *prompt.spans])
    full = SelectivePrefill(decoder, whole, Reuse(), keep=lambda span: True)
    full.run()
    true = [full.computed[span.start] for span in whole.chunks]
    before = true[0] if len(prefix) else None
    chunks = [span.chunk_ids for span in prompt.spans]
    encoder = Encoder(decoder)
    behind = next(iter(encoder.encode(before, [tuple(lead_in)])))
    first = [] if before is None else [before]
    return [true, [*first, *encoder.encode(first, chunks)], [*first, *encoder.encode([*first, behind], chunks)]]


@torch.no_grad()
def _along(decoder: Decoder, prompt: Prompt, stored: Sequence[ChunkKV], answer: Sequence[int]) -> Tensor:
    """Return the log-probabilities `[answer, vocab]` of a prompt over stored KV, along an answer."""
    ids = (*prompt.token_ids, *answer)
    spans = [Span(0, prompt.prefix_tokens, prompt.prefix)] if prompt.prefix_tokens else []
    spans += prompt.spans
    filled = [
        Span(span.start, span.stop, span.chunk_ids, span.offset, kv, exact=True)
        for span, kv in zip(spans, stored, strict=True)
    ]
    prefill = SelectivePrefill(decoder, Plan.of(ids, filled), Reuse())
    output = prefill.model(
        input_ids=torch.tensor([ids], device=decoder.device), past_key_values=prefill.cache, use_cache=True
    )
    log_probs: Tensor = output.logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
    return log_probs
