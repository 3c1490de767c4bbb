"""Traces of retrievals for `eval.hints`: drawn from a Zipf law, or read from recorded sessions and block traces."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from chunkcache.eval.workload import interleaved, recorded_sessions, trace_blocks

LIKELY = 8  # guesses of the traces that are recorded
SESSIONS = 4  # that are under way at a time


@dataclass(frozen=True)
class Retrieval:
    """One retrieval: numbers of chunks in the order of rank, and what the retriever takes to be likely next."""

    chunks: tuple[int, ...]
    likely: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A sequence of retrievals over chunks of so many tokens each."""

    name: str
    seed: int
    tokens: tuple[int, ...]
    retrievals: tuple[Retrieval, ...]


def zipf_trace(
    seed: int,
    retrievals: int = 2000,
    documents: int = 300,
    chunks: int = 10,
    k: int = 5,
    skew: float = 0.9,
    follow_up: float = 0.6,
    drift: float = 0.0,
) -> Trace:
    """Make questions about topics of Zipf popularity, and follow-ups that move on to neighbouring chunks.

    A topic is a passage of a document. Its question retrieves, by nearness and some fixed noise, chunks around it
    and a few of two related documents; those that rank right behind are near misses.

    Args:
        seed: of everything that is drawn.
        retrievals: how many.
        documents: in the corpus.
        chunks: in each document.
        k: chunks retrieved.
        skew: exponent of the Zipf distribution over topics.
        follow_up: chance that a session goes on with a question about the chunk behind, instead of a new topic.
        drift: chance, at each retrieval, that two topics swap their popularity.
    """
    draw = random.Random(seed)
    topics = [(document, chunk) for document in range(documents) for chunk in range(chunks)]
    draw.shuffle(topics)
    weights = list(accumulate((rank + 1) ** -skew for rank in range(len(topics))))
    related = [draw.sample(range(documents), 2) for _ in range(documents)]
    at = [draw.choices(topics, cum_weights=weights)[0] for _ in range(SESSIONS)]
    drawn = []
    for _ in range(retrievals):
        session = draw.randrange(SESSIONS)
        document, chunk = at[session]
        if draw.random() < follow_up and chunk + 1 < chunks:
            at[session] = (document, chunk + 1)
        else:
            at[session] = draw.choices(topics, cum_weights=weights)[0]
        ranked = _ranked(*at[session], related, chunks)
        drawn.append(Retrieval(ranked[:k], _likely(ranked, k, chunks)))
        if draw.random() < drift:
            a, b = draw.randrange(len(topics)), draw.randrange(len(topics))
            topics[a], topics[b] = topics[b], topics[a]
    tokens = tuple(draw.randint(4, 8) for _ in range(documents * chunks))
    return Trace("zipf" if not drift else "zipf, drifting", seed, tokens, tuple(drawn))


def session_trace(path: str | Path, seed: int, sessions: int = SESSIONS) -> Trace:
    """Read recorded sessions, JSON Lines of {session_id, turns: [{document_ids: [...]}]}, interleaved at random.

    Likely next is what came new, in any session so far, in the turn after one that retrieved the same chunk.

    Raises:
        DocumentError: the file cannot be read, or holds no such sessions.
    """
    draw = random.Random(seed)
    numbers: dict[str, int] = {}
    last: dict[int, tuple[int, ...]] = {}
    after: dict[int, Counter[int]] = {}
    read = []
    for session, turn in interleaved(recorded_sessions(path), draw, sessions):
        chunks = tuple(numbers.setdefault(name, len(numbers)) for name in turn["document_ids"])
        before = last.get(session, ())
        for number in before:
            after.setdefault(number, Counter()).update(set(chunks).difference(before))
        guesses = sum((after.get(number, Counter()) for number in chunks), Counter())
        likely = [number for number, _ in guesses.most_common() if number not in chunks]
        read.append(Retrieval(chunks, tuple(likely[:LIKELY])))
        last[session] = chunks
    tokens = tuple(draw.randint(4, 8) for _ in numbers)
    return Trace("sessions", seed, tokens, tuple(read))


def block_trace(path: str | Path, limit: int = 1000) -> Trace:
    """Read the first `limit` requests of a trace in Mooncake's format, JSON Lines of {timestamp, hash_ids: [...]}.

    Likely next are the blocks that stood behind the last one in earlier requests.

    Raises:
        DocumentError: the file cannot be read, or is in another format.
    """
    numbers: dict[int, int] = {}
    blocks = [tuple(numbers.setdefault(block, len(numbers)) for block in row) for row in trace_blocks(path, limit)]
    behind: dict[int, int] = {}
    read = []
    for chunks in blocks:
        behind.update(pairwise(chunks))
        likely: list[int] = []
        last = chunks[-1]
        while len(likely) < LIKELY and last in behind:
            likely.append(last := behind[last])
        read.append(Retrieval(chunks, tuple(number for number in likely if number not in chunks)))
    return Trace("blocks", 0, (6,) * len(numbers), tuple(read))


def _ranked(document: int, chunk: int, related: Sequence[Sequence[int]], chunks: int) -> tuple[int, ...]:
    """Return all candidates for a question about a chunk, best first; the same each time."""
    noise = random.Random(document * chunks + chunk)
    scores = {document * chunks + i: -abs(i - chunk) + noise.gauss(0, 1) for i in range(chunks)}
    for other in related[document]:
        scores.update({other * chunks + i: -3 + noise.gauss(0, 1) for i in range(chunks)})
    return tuple(sorted(scores, key=lambda number: (-scores[number], number)))


def _likely(ranked: Sequence[int], k: int, chunks: int) -> tuple[int, ...]:
    """Return neighbours of what was retrieved, those of the best first, then near misses."""
    beside = [
        other for number in ranked[:k] for other in (number + 1, number - 1) if other // chunks == number // chunks
    ]
    candidates = dict.fromkeys([*beside, *ranked[k : 2 * k]])
    return tuple(number for number in candidates if number not in ranked[:k])
