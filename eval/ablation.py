"""What makes the query policy's selection good: variants of it, each with the same number of tokens.

The question's attention is recorded once per prompt, for every layer, head and question token; a variant is a way to
make scores of it. Only fidelity is measured here, since the variants cost the same; time is `compare`'s job.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Plan, Policy
from chunkcache.blend.kvshift import evenly_spaced
from chunkcache.blend.link import Link
from chunkcache.blend.policy import Check
from chunkcache.blend.shift import Shift
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS, forced_answer, greedy_answer, measure_fidelity
from chunkcache.eval.measure import OnStep, averages, finite, measure_prompts, table
from chunkcache.eval.results import Results, Row
from chunkcache.kv import ChunkKV
from chunkcache.kv.quantised import dense
from chunkcache.llm import CachedLLM

BENCH = "selection"
LEAD = 1024
STORE = "memory://?max_bytes=4GiB"
MEAN, MAX, LAST = range(3)  # over the question's tokens


@dataclass
class Seen:
    """What one prompt gives its variants to choose by.

    Attributes:
        plan: the prompt.
        attention: `[layers, 3, heads, tokens]`; mean and maximum over the question's tokens, and the last one's.
        value_norms: `[layers, heads, tokens]` of the stored values.
        sensitivity: `[tokens]` how far a token's stored values are from those computed without a lead-in.
        sentences: `[tokens]` the sentence that a token is in, counted over the prompt.
    """

    plan: Plan
    attention: Tensor
    value_norms: Tensor
    sensitivity: Tensor
    sentences: Tensor

    def scores(self, low: float = 1 / 2, high: float = 2 / 3, rows: int = MEAN) -> Tensor:
        """Return the attention `[layers, heads, tokens]` of a band of layers, given as shares of the depth."""
        return band(self.attention[:, rows], low, high)


def band(values: Tensor, low: float = 1 / 2, high: float = 2 / 3) -> Tensor:
    """Return of `values` `[layers, ...]` those of a band of layers."""
    first = int(low * len(values))
    return values[first : max(first + 1, math.ceil(high * len(values)))]


@dataclass(frozen=True)
class Variant:
    """One way to select: `choose` gives the positions, of so many tokens, to recompute below layer `stop`.

    With a `shift`, the other tokens are corrected by these.
    """

    name: str
    choose: Callable[[Seen, int], Tensor]
    lead: bool = True
    stop: float = 1.0
    shift: Shift | None = None


def top(score: Callable[[Seen], Tensor]) -> Callable[[Seen, int], Tensor]:
    """Return a choice of the tokens with the highest `score` `[tokens]`."""

    def choose(seen: Seen, count: int) -> Tensor:
        candidates = seen.plan.inexact
        return candidates[score(seen)[candidates].topk(count).indices]

    return choose


def default(seen: Seen) -> Tensor:
    """Score as the query policy does: layers from the middle to two thirds, mean over heads and question tokens."""
    return seen.scores().mean((0, 1))


def smoothed(width: int) -> Callable[[Seen], Tensor]:
    """Return the default score, averaged over `width` neighbours."""
    return lambda seen: avg_pool1d(default(seen)[None], width, 1, width // 2, count_include_pad=False)[0]


def by_sentence(seen: Seen) -> Tensor:
    """Score a token by the mean of its sentence, and by its own within the last one that fits."""
    score = default(seen)
    sums = torch.zeros(int(seen.sentences.max()) + 1)
    means = sums.index_add(0, seen.sentences, score) / seen.sentences.bincount().clamp(min=1)
    return means[seen.sentences] + 1e-6 * score


def by_quota(seen: Seen, count: int) -> Tensor:
    """Choose the same share of every chunk."""
    spans = [span for span in seen.plan.reused if not span.exact]
    total = sum(map(len, spans))
    score = default(seen)
    parts = [span.start + score[span.start : span.stop].topk(count * len(span) // total).indices for span in spans]
    return torch.cat(parts)


def with_first(k: int) -> Callable[[Seen, int], Tensor]:
    """Return a choice of the first `k` of each chunk, and the default's up to the count."""

    def choose(seen: Seen, count: int) -> Tensor:
        first = Link(k).select(seen.plan)[:count]
        score = default(seen).index_fill(0, first, math.inf)
        return seen.plan.inexact[score[seen.plan.inexact].topk(count).indices]

    return choose


def evenly(seen: Seen, count: int) -> Tensor:
    """Choose evenly spaced tokens of all chunks, probes of an offset that they share."""
    candidates = seen.plan.inexact
    return candidates[evenly_spaced(len(candidates), count)]


def at_random(seen: Seen, count: int) -> Tensor:
    """Choose at random, as a check of the measure itself."""
    order = torch.randperm(len(seen.plan.inexact), generator=torch.Generator().manual_seed(0))
    return seen.plan.inexact[order[:count]]


VARIANTS = (
    Variant("query: layers 1/2 to 2/3, mean over heads and question tokens", top(default)),
    Variant("the same, without a lead-in", top(default), lead=False),
    Variant("nothing recomputed", lambda seen, _: seen.plan.inexact[:0]),
    Variant("nothing recomputed, without a lead-in", lambda seen, _: seen.plan.inexact[:0], lead=False),
    Variant("random tokens", at_random),
    Variant("all layers", top(lambda seen: seen.scores(0, 1).mean((0, 1)))),
    Variant("layers 0 to 1/3", top(lambda seen: seen.scores(0, 1 / 3).mean((0, 1)))),
    Variant("layers 0 to 2/3", top(lambda seen: seen.scores(0, 2 / 3).mean((0, 1)))),
    Variant("layers 2/3 to the last", top(lambda seen: seen.scores(2 / 3, 1).mean((0, 1)))),
    Variant("maximum over heads", top(lambda seen: seen.scores().amax(1).mean(0))),
    Variant("maximum over question tokens", top(lambda seen: seen.scores(rows=MAX).mean((0, 1)))),
    Variant("last question token only", top(lambda seen: seen.scores(rows=LAST).mean((0, 1)))),
    Variant("times norm of values", top(lambda seen: (seen.scores() * band(seen.value_norms)).mean((0, 1)))),
    Variant("times context sensitivity", top(lambda seen: default(seen) * seen.sensitivity)),
    Variant("context sensitivity alone", top(lambda seen: seen.sensitivity)),
    Variant("smoothed over 3 tokens", top(smoothed(3))),
    Variant("smoothed over 7 tokens", top(smoothed(7))),
    Variant("whole sentences", top(by_sentence)),
    Variant("the same share of every chunk", by_quota),
    Variant("with the first 2 tokens of each chunk", with_first(2)),
    Variant("with the first 8 tokens of each chunk", with_first(8)),
    Variant("with an offset correction, lambda 2", top(default), shift=Shift(2.0, "evidence")),
    Variant("with an offset correction, lambda 16", top(default), shift=Shift(16.0, "evidence")),
    Variant(
        "with an offset correction of keys only, lambda 2", top(default), shift=Shift(2.0, "evidence", values=False)
    ),
    Variant(
        "with an offset correction of values only, lambda 2", top(default), shift=Shift(2.0, "evidence", keys=False)
    ),
    Variant("evenly spaced tokens", evenly),
    Variant("evenly spaced tokens, with an offset correction, lambda 2", evenly, shift=Shift(2.0, "evidence")),
    Variant("recomputed below half of the layers only", top(default), stop=1 / 2),
    Variant("recomputed below two thirds of the layers only", top(default), stop=2 / 3),
)


def ablate(
    results: Results,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    ratio: float = 0.03,
    on_prompt: OnStep | None = None,
) -> Results:
    """Measure every variant on `cases`, each recomputing the share `ratio` of the reused tokens.

    `results` gets a row of each prompt and variant: `kl_first` and `kl_mean` in nats and `agreement` as in
    `Fidelity`, and `recomputed_share`, the share of token-layers that it computes.
    """
    llm = chunkcache.wrap(model, tokenizer, store=STORE)

    def measure(_: int, case: Case) -> Iterator[Row]:
        start = llm.prefill(case.question, case.chunks, policy="full")
        answer, full = greedy_answer(llm, start, ANSWER_TOKENS)
        seen = {lead: _look(llm, case, LEAD if lead else 0) for lead in (True, False)}
        for looked in seen.values():
            looked.sensitivity = _distance(seen[True].plan, seen[False].plan)
        for variant in VARIANTS:
            looked = seen[variant.lead]
            selected = variant.choose(looked, math.ceil(ratio * len(looked.plan.inexact))).sort().values
            lead = LEAD if variant.lead else 0
            policy = _Fixed(lead=lead, selected=selected, stop=variant.stop, correction=variant.shift)
            prefilled = llm.prefill(case.question, case.chunks, policy=policy)
            fidelity = measure_fidelity(full, forced_answer(llm, prefilled, answer))
            shown = {name: finite(value) for name, value in asdict(fidelity).items()}
            yield {"variant": variant.name, **shown, "recomputed_share": prefilled.stats.recomputed_share}

    measure_prompts(results, cases, len(VARIANTS), measure, on_prompt)
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return the means of each variant over all prompts, and a table of them."""
    names = ("kl_first", "kl_mean", "agreement", "recomputed_share")
    sums = averages(results.rows, ["variant"], "prompt", dict.fromkeys(names, statistics.mean))
    columns = {
        "selection": "{variant}", "recomputed": "{recomputed_share:.1%}", "KL first": "{kl_first:.4f}",
        "KL mean": "{kl_mean:.4f}", "agreement": "{agreement:.1%}",
    }  # fmt: skip
    title = f"{max(each['prompts'] for each in sums)} prompts: means, KL in nats"
    return {"variants": sums, "tables": [table(title, columns, sums)], "plots": []}


def _look(llm: CachedLLM, case: Case, lead: int) -> Seen:
    """Record the question's attention to the stored KV of one prompt."""
    look = _Look(lead=lead)
    llm.precompute(case.chunks, policy=look)
    llm.prefill(case.question, case.chunks, policy=look)
    plan, attention = look.seen[0]
    norms = torch.zeros(len(attention), attention.shape[2], len(plan))
    for span in plan.reused:
        for index, layer in enumerate(span.kv.layers if span.kv else ()):
            norm = dense(layer)[1, :, span.offset : span.offset + len(span)].float().norm(dim=-1)
            norms[index, :, span.start : span.stop] = norm.repeat_interleave(norms.shape[1] // len(norm), 0)
    ends = [str(llm.tokenizer.decode([token])).rstrip().endswith((".", "!", "?")) for token in plan.token_ids]
    sentences = torch.tensor([0, *ends[:-1]]).cumsum(0)
    return Seen(plan, attention.cpu(), norms, torch.zeros(len(plan)), sentences)


def _distance(plan: Plan, other: Plan) -> Tensor:
    """Return `[tokens]` the mean distance over layers between the stored values of two plans of one prompt."""
    distance = torch.zeros(len(plan))
    for a, b in zip(plan.reused, other.reused, strict=True):
        if not a.exact and a.kv is not None and b.kv is not None:
            distance[a.start : a.stop] = _between(a.kv, b.kv)[a.offset : a.offset + len(a)]
    return distance


def _between(a: ChunkKV, b: ChunkKV) -> Tensor:
    pairs = zip(map(dense, a.layers), map(dense, b.layers), strict=True)
    return torch.stack([(x[1] - y[1]).float().square().sum((0, 2)).sqrt() for x, y in pairs]).mean(0)


@dataclass(frozen=True)
class _Look(Policy):
    """Recomputes nothing, and keeps what it saw."""

    name = "look"
    lead: int = 0
    seen: list[tuple[Plan, Tensor]] = field(default_factory=list)

    def lead_in(self) -> int:
        return self.lead

    def select(self, plan: Plan) -> Tensor:
        return plan.inexact[:0]

    def attention_layers(self, layers: int) -> Sequence[int]:
        return range(layers)

    def pool(self, weights: Tensor) -> Tensor:
        return torch.stack((weights.mean(1), weights.amax(1), weights[:, -1]))

    def select_by_attention(self, plan: Plan, attention: Tensor) -> Tensor:
        self.seen.append((plan, attention))
        return plan.inexact[:0]


@dataclass(frozen=True)
class _Fixed(Policy):
    """Recomputes what it is told to."""

    name = "fixed"
    lead: int = 0
    selected: Any = None
    stop: float = 1.0
    correction: Shift | None = None

    def lead_in(self) -> int:
        return self.lead

    def shift(self) -> Shift | None:
        return self.correction

    def select(self, plan: Plan) -> Tensor:
        selected: Tensor = self.selected
        return selected

    def filter_layers(self, layers: int) -> Sequence[int]:
        return [int(self.stop * layers)] if self.stop < 1 else ()

    def filter_rows(self, check: Check) -> Tensor:
        return (~torch.isin(check.rows, check.plan.inexact.to(check.rows.device))).nonzero()[:, 0]
