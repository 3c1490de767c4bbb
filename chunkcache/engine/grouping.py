"""Which requests of an offline batch share their beginning, and in which order they are answered.

Prompts that differ in nothing but the question form a group. Groups come in an order in which neighbours have most
chunks in common, so that the store's nearest tier still holds them (BatchLLM, arXiv 2412.03594).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from chunkcache.errors import PromptError
from chunkcache.prompt import Prompt, PromptChunk

NEIGHBOURS = 64  # groups with a chunk in common that are compared at most, for each chunk: one may be in all of them


class Request(NamedTuple):
    """One question over its chunks; see `CachedLLM.generate`. A plain tuple of the same will do."""

    question: str
    chunks: Sequence[str | PromptChunk] = ()
    system: str | None = None


def checked(requests: Iterable[tuple[Any, ...]]) -> list[Request]:
    """Return the requests as such.

    Raises:
        PromptError: one is something else, or its chunks are one text.
    """
    found = []
    for index, request in enumerate(requests):
        wrong = isinstance(request, (str, bytes, Mapping)) or not isinstance(request, Sequence)
        if wrong or not 1 <= len(request) <= 3:
            raise PromptError(
                f"request {index} is no (question, chunks, system) but a {type(request).__name__}; pass a tuple"
            )
        asked = Request(*request)
        if isinstance(asked.chunks, (str, bytes, Mapping, PromptChunk)) or not isinstance(asked.chunks, Iterable):
            raise PromptError(
                f"request {index}: its chunks are a {type(asked.chunks).__name__}; pass a list of texts"
            )
        found.append(asked._replace(chunks=tuple(asked.chunks)))
    return found


def reordered(requests: Sequence[Request]) -> list[Request]:
    """Return the requests with the chunks first that most of them have, so that more prompts begin alike.

    Raises:
        PromptError: a chunk is no text but a `PromptChunk`, whose place may matter, or something else.
    """
    if any(not isinstance(chunk, str) for request in requests for chunk in request.chunks):
        raise PromptError("reorder=True moves whole chunks; pass them as texts, not as PromptChunks")
    counts = Counter(chunk for request in requests for chunk in request.chunks)
    rank = {chunk: place for place, (chunk, _) in enumerate(counts.most_common())}  # ties as they come
    return [each._replace(chunks=sorted(each.chunks, key=rank.__getitem__)) for each in requests]


def grouped(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return groups of indices of prompts that differ in nothing but the question, in the order they come."""
    groups: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        key = (prompt.token_ids[: prompt.end], prompt.spans) if prompt.end else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def ordered(groups: Sequence[list[int]], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return groups so that each is followed by one that has most chunk tokens in common with it.

    Between equals the one whose prompt begins alike for longer comes first, then the one that came first. Of the
    groups that have a chunk, the first `NEIGHBOURS` still to come are looked at.
    """
    numbers: dict[tuple[int, ...], int] = {}  # chunks are long: they are hashed once
    chunks = [
        [numbers.setdefault(each.chunk_ids, len(numbers)) for each in prompts[group[0]].spans] for group in groups
    ]
    lengths = [len(chunk) for chunk in numbers]
    having: list[deque[int]] = [deque() for _ in numbers]
    for group, own in enumerate(chunks):
        for chunk in set(own):
            having[chunk].append(group)
    left = set(range(len(groups)))
    order: list[list[int]] = []
    current = first = 0
    while left:
        left.remove(current)
        order.append(groups[current])
        own = chunks[current]
        near = {group for chunk in set(own) for group in _next(having[chunk], left)}
        common = {group: sum(lengths[chunk] for chunk in {*own} & {*chunks[group]}) for group in near}
        best = max(near, key=lambda n: (common[n], _alike(own, chunks[n]), -n), default=None)
        while first < len(groups) and first not in left:
            first += 1
        current = first if best is None else best
    return order


def _next(groups: deque[int], left: Set[int]) -> list[int]:
    """Return the first of `groups` that are left, and take those before them that are not out of it."""
    found: list[int] = []
    while groups and len(found) < NEIGHBOURS:
        group = groups.popleft()
        if group in left:
            found.append(group)
    groups.extendleft(reversed(found))
    return found


def _alike(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """Return how many items two sequences begin alike with."""
    return next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
