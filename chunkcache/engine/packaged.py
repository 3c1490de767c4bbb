"""Questions over packaged documents, by which is measured what suits a model: the same for every model, in a minute.

Each comes with what full prefill makes of its answer, and with its chunks' KV as they would be stored.
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
from chunkcache.blend import Decoder, Plan, Policy, SelectivePrefill
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
class Asked:
    """A question over packaged documents.

    Attributes:
        prompt: the prompt.
        answer: token ids of the right answer.
        full: log-probabilities `[answer, vocab]` after full prefill, along the answer.
        alone: KV of the prompt's spans, the prefix first if there is one, computed behind the prefix alone.
        behind: computed behind the lead-in, too.
        full_s: seconds of full prefill of a prompt with these chunks.
    """

    prompt: Prompt
    answer: Sequence[int]
    full: Tensor
    alone: Sequence[ChunkKV]
    behind: Sequence[ChunkKV]
    full_s: float

    def moved(self, decoder: Decoder, policy: Policy, *, lead: bool = True) -> Moved:
        """Answer over stored KV, those behind the lead-in or those without, and compare with full prefill."""
        exact = bool(self.prompt.prefix_tokens) + (not lead)  # the prefix, and what was computed right behind it
        plan = _filled(self.prompt, self.behind if lead else self.alone, exact)
        prefill = SelectivePrefill(decoder, plan, policy)
        kl = kl_div(_along(prefill, self.answer), self.full, reduction="sum", log_target=True)
        return Moved(float(kl), len(self.answer), prefill.cache.select_s)


@dataclass(frozen=True)
class Moved:
    """How far a policy moved the distributions along one answer.

    Attributes:
        kl: KL(full || policy) summed over the answer's tokens, in nats.
        tokens: of the answer.
        look_s: seconds that choosing what is recomputed took.
    """

    kl: float
    tokens: int
    look_s: float


def mean_kl(moved: Sequence[Moved]) -> float:
    """Return the KL per token of the answers, in nats."""
    return sum(each.kl for each in moved) / sum(each.tokens for each in moved)


def packaged(
    decoder: Decoder, prompts: PromptBuilder, on_step: Callable[[int, int], None] | None = None
) -> list[Asked]:
    """Compute what is needed of every question; empty where there is no lead-in, or no room for one.

    Args:
        decoder: a decoder over the model.
        prompts: builds its prompts.
        on_step: called with (sets of documents done, all).
    """
    lead_in, encoder = prompts.lead_in[-LEAD:], Encoder(decoder)
    before: list[ChunkKV] = []  # the prefix, if there is one, and the lead-in: those of every set
    asked: list[Asked] = []
    for number, (texts, questions) in enumerate(_sets()):
        built = [(prompts.build(question, texts), prompts.encode(answer)) for question, answer in questions]
        longest = max(len(prompt.token_ids) for prompt, _ in built)
        if not lead_in or longest + len(lead_in) > decoder.max_tokens:
            return []
        spans = built[0][0].spans
        started = time.perf_counter()
        true = _true(decoder, built[0][0])
        full_s = time.perf_counter() - started
        first, chunks = true[: len(true) - len(spans)], [span.chunk_ids for span in spans]
        before = before or [*first, *encoder.encode(first, [lead_in])]
        alone, behind = ([*first, *encoder.encode(context, chunks)] for context in (first, before))
        for prompt, answer in built:
            full = _along(SelectivePrefill(decoder, _filled(prompt, true, len(true)), Reuse()), answer)
            asked.append(Asked(prompt, answer, full, alone, behind, full_s))
        if on_step is not None:
            on_step(number + 1, SETS)
    return asked


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


def _spans(prompt: Prompt) -> list[Span]:
    """Return the prefix of a prompt, if it has one, and its chunks."""
    return [*([Span(0, prompt.prefix_tokens, prompt.prefix)] if prompt.prefix_tokens else ()), *prompt.spans]


def _filled(prompt: Prompt, kvs: Sequence[ChunkKV], exact: int) -> Plan:
    """Return the plan of a prompt with the KV of its spans, the first so many of which are exact."""
    spans = [
        Span(span.start, span.stop, span.chunk_ids, span.offset, kv, exact=place < exact)
        for place, (span, kv) in enumerate(zip(_spans(prompt), kvs, strict=True))
    ]
    return Plan.of(prompt.token_ids, spans)


def _true(decoder: Decoder, prompt: Prompt) -> list[ChunkKV]:
    """Return the KV of a prompt's prefix, if any, and chunks as full prefill has them."""
    plan = Plan.of(prompt.token_ids, _spans(prompt))
    full = SelectivePrefill(decoder, plan, Reuse(), keep=lambda span: True)
    full.run()
    return [full.computed[span.start] for span in plan.chunks]


@torch.no_grad()
def _along(prefill: SelectivePrefill, answer: Sequence[int]) -> Tensor:
    """Prefill, and return the log-probabilities `[answer, vocab]` along an answer."""
    rows = prefill.run()[None]
    if len(answer) > 1:
        ids = torch.tensor([list(answer[:-1])], device=rows.device)
        more = prefill.model(input_ids=ids, past_key_values=prefill.cache, use_cache=True).logits[0]
        rows = torch.cat((rows, more))
    log_probs: Tensor = rows.float().log_softmax(-1)
    return log_probs
