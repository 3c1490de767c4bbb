"""Which requests of an offline batch share their beginning, and in which order they are answered.

Prompts that differ in nothing but the question form a group. Groups come in an order in which neighbours have most
chunks in common, so that the store's nearest tier still holds them (BatchLLM, arXiv 2412.03594).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from chunkcache.errors import PromptError
from chunkcache.prompt import Passage, Prompt


class Request(NamedTuple):
    """One question over its chunks; see `CachedLLM.generate`. A plain tuple of the same will do."""

    question: str
    chunks: Sequence[str | Passage] = ()
    system: str | None = None


def checked(requests: Sequence[tuple[Any, ...]]) -> list[Request]:
    """Return the requests as such.

    Raises:
        PromptError: one is something else.
    """
    for index, request in enumerate(requests):
        if isinstance(request, str) or not 1 <= len(request) <= 3:
            raise PromptError(f"request {index} is no (question, chunks, system) but a {type(request).__name__}")
    return [Request(*request) for request in requests]


def reordered(requests: Sequence[Request]) -> list[Request]:
    """Return the requests with the chunks first that most of them have, so that more prompts begin alike.

    Raises:
        PromptError: a chunk is a `Passage`, whose place may matter.
    """
    if any(isinstance(chunk, Passage) for request in requests for chunk in request.chunks):
        raise PromptError("reorder=True moves whole chunks; pass them as texts, not as Passages")
    counts = Counter(chunk for request in requests for chunk in request.chunks)
    rank = {chunk: place for place, (chunk, _) in enumerate(counts.most_common())}  # ties as they come
    return [each._replace(chunks=sorted(each.chunks, key=rank.__getitem__)) for each in requests]


def grouped(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return groups of indices of prompts that differ in nothing but the question, in the order they come."""
    groups: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (prompt.prefix, prompt.placed) if shared_tokens(prompt) else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def ordered(groups: Sequence[list[int]], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return groups so that each is followed by one that has most chunk tokens in common with it.

    Between equals the one whose prompt begins alike for longer comes first, then the one that came first.
    """
    chunks = [dict.fromkeys(prompts[group[0]].chunks) for group in groups]
    having: dict[tuple[int, ...], set[int]] = {}
    for number, own in enumerate(chunks):
        for chunk in own:
            having.setdefault(chunk, set()).add(number)
    left = dict.fromkeys(range(len(groups)))
    order: list[list[int]] = []
    current = 0
    while left:
        del left[current]
        order.append(groups[current])
        for chunk in chunks[current]:
            having[chunk].discard(current)
        common: Counter[int] = Counter()
        for chunk in chunks[current]:
            common.update(dict.fromkeys(having[chunk], len(chunk)))
        ids = prompts[groups[current][0]].chunks
        best = max(common, key=lambda n: (common[n], _alike(ids, prompts[groups[n][0]].chunks), -n), default=None)
        current = next(iter(left), 0) if best is None else best
    return order


def _alike(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """Return how many items two sequences begin alike with."""
    return next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))


def shared_tokens(prompt: Prompt) -> int:
    """Return how many tokens stand before the question."""
    return len(prompt.token_ids) - len(prompt.question)
