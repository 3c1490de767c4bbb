"""Requests for a load test: when they arrive, what they ask, and which chunks were retrieved for them.

Two things are drawn apart, so that the same requests can be sent at any rate. *Arrivals* are times at a mean rate of
one request per second, by a Poisson process or by a recorded trace; `at_rate` stretches them. *Requests* are texts in
an order: documents by a Zipf law over the chunks of a data set, or by recorded sessions.

Two formats are read, both JSON Lines:

    sessions    {session_id, turns: [{document_ids: [...], prompt}]}, the documents' texts standing in the prompt
                as `[Document N: text]` in the order of their ids, then `Question: text`
    trace       Mooncake's {timestamp, input_length, output_length, hash_ids}; timestamps in milliseconds
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from chunkcache.errors import DocumentError, InputError
from chunkcache.eval.data import Case

T = TypeVar("T")
HIGHEST_SKEW = 5.0  # above, all requests are for the same few chunks
Turns = list[dict[str, Any]]
_DOCUMENT = re.compile(r"^\[Document \d+: (.*?)\]\s*(?=^\[Document \d+: |^Question: )", re.M | re.S)
_QUESTION = re.compile(r"^Question: (.*)\Z", re.M | re.S)


@dataclass(frozen=True)
class Request:
    """One question over its chunks, by their numbers in the workload."""

    question: str
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Requests in the order they arrive.

    Attributes:
        chunks: the texts that may be asked for; by a Zipf law the most popular first, else as they first come.
        requests: what is asked.
    """

    chunks: tuple[str, ...]
    requests: tuple[Request, ...]

    def texts(self, request: Request) -> list[str]:
        """Return the texts of a request's chunks, in its order."""
        return [self.chunks[number] for number in request.chunks]


# --- arrivals


def poisson(count: int, seed: int) -> list[float]:
    """Return when `count` requests arrive by a Poisson process of one per second."""
    draw = random.Random(seed)
    return list(accumulate(draw.expovariate(1) for _ in range(count)))


def trace_arrivals(path: str | Path, count: int) -> list[float]:
    """Return when the first `count` requests of a trace in Mooncake's format arrive, at a mean of one per second.

    Raises:
        DocumentError: the file is in another format, holds fewer requests, or all of these come at once.
    """
    rows = json_lines(path)[:count]
    try:
        times = [float(row["timestamp"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise _no_trace(path, error) from None
    if len(times) < count:
        raise DocumentError(f"{path} holds {len(times)} requests, not {count}; lower the number of requests")
    if any(later < earlier for earlier, later in pairwise(times)):
        raise DocumentError(f"{path} is no trace in time order: a timestamp is before the one in the line above")
    if times[-1] == times[0]:
        raise DocumentError(f"the first {count} requests of {path} come all at once: take more of them")
    span = times[-1] - times[0]
    return [(time - times[0]) / span * (count - 1) for time in times]


def at_rate(arrivals: Sequence[float], rate: float) -> list[float]:
    """Return arrivals of one per second, in seconds at `rate` requests per second.

    Raises:
        InputError: the rate is not above 0.
    """
    check_rate(rate)
    return [arrival / rate for arrival in arrivals]


def check_rate(rate: float) -> None:
    """Raise InputError unless `rate` is one that requests can arrive at."""
    if not 0 < rate < float("inf"):
        raise InputError(f"a rate of {rate} requests per second is not above 0; pass for example 0.5")


# --- requests


def zipf_workload(cases: Sequence[Case], count: int, chunks: int, documents: int, skew: float, seed: int) -> Workload:
    """Draw requests for chunks of Zipf popularity, with questions of the cases that the chunks are from.

    Args:
        cases: where chunks and questions come from.
        count: how many requests.
        chunks: different chunks of each.
        documents: how many different chunks there are to ask for: the first of the cases.
        skew: exponent of the Zipf law over them; 0 makes all alike.
        seed: of everything that is drawn.

    Raises:
        DocumentError: the cases have fewer different chunks than a request needs.
        InputError: the skew is out of range.
    """
    asked_of: dict[str, str] = {text: case.question for case in reversed(cases) for text in case.chunks}
    texts = list(dict.fromkeys(text for case in cases for text in case.chunks))[:documents]
    if len(texts) < chunks:
        raise DocumentError(
            f"{len(texts)} different chunks are too few for requests of {chunks}; pass more documents"
        )
    draw = random.Random(seed)
    draw.shuffle(texts)
    drawn = zipf_draws(len(texts), chunks, skew, draw)
    found = [next(drawn) for _ in range(count)]
    return Workload(tuple(texts), tuple(Request(asked_of[texts[numbers[0]]], numbers) for numbers in found))


def zipf_draws(documents: int, k: int, skew: float, draw: random.Random) -> Iterator[tuple[int, ...]]:
    """Return tuples, without end, of `k` different numbers below `documents`: n has a weight of `(n + 1) ** -skew`.

    Raises:
        InputError: the skew is below 0 or too high.
    """
    if not 0 <= skew <= HIGHEST_SKEW:
        raise InputError(f"a skew of {skew} is not between 0 and {HIGHEST_SKEW:g}; pass for example 0.9")
    weights = np.arange(1, documents + 1, dtype=float) ** -skew
    drawn = np.random.default_rng(draw.getrandbits(64))  # exponential races: who comes in is who would be drawn next
    return (tuple(np.argsort(drawn.exponential(size=documents) / weights)[:k].tolist()) for _ in repeat(None))


def session_workload(path: str | Path, count: int, chunks: int, seed: int, at_once: int = 4) -> Workload:
    """Read the first `count` turns of recorded sessions, interleaved; each with its first `chunks` documents.

    Raises:
        DocumentError: the file cannot be read, holds no such sessions, or too few turns.
    """
    numbers: dict[str, int] = {}
    requests = []
    for _, turn in interleaved(recorded_sessions(path), random.Random(seed), at_once):
        question, texts = turn_texts(turn, path)
        requests.append(Request(question, tuple(numbers.setdefault(text, len(numbers)) for text in texts[:chunks])))
        if len(requests) == count:
            return Workload(tuple(numbers), tuple(requests))
    raise DocumentError(f"{path} holds {len(requests)} turns, not {count}; lower the number of requests")


def turn_texts(turn: dict[str, Any], path: str | Path) -> tuple[str, list[str]]:
    """Return the question of a recorded turn, and its documents' texts.

    Raises:
        DocumentError: the prompt does not hold them as `[Document N: text]` and `Question: text`.
    """
    prompt = str(turn.get("prompt", ""))
    texts, asked = _DOCUMENT.findall(prompt), _QUESTION.search(prompt)
    if asked is None or len(texts) != len(turn["document_ids"]):
        raise DocumentError(
            f"a turn of {path} names {len(turn['document_ids'])} documents, and its prompt holds {len(texts)} as "
            "`[Document N: text]`, with `Question: text` behind them; the texts are needed to send requests"
        )
    return asked[1].strip(), texts


# --- files


def recorded_sessions(path: str | Path) -> list[Turns]:
    """Read the turns of each session.

    Raises:
        DocumentError: the file cannot be read, or holds no sessions.
    """
    rows = json_lines(path)
    try:
        return [[{**turn, "document_ids": list(turn["document_ids"])} for turn in row["turns"]] for row in rows]
    except (KeyError, TypeError) as error:
        raise DocumentError(f"{path} holds no sessions ({error!r}); a row is {{session_id, turns: [...]}}") from None


def interleaved(sessions: Sequence[Sequence[T]], draw: random.Random, at_once: int) -> Iterator[tuple[int, T]]:
    """Yield all turns with the number of their session, `at_once` sessions being under way at a time."""
    waiting = list(enumerate(map(list, sessions)))
    draw.shuffle(waiting)
    going_on = [waiting.pop() for _ in range(min(at_once, len(waiting)))]
    while going_on:
        session = draw.choice(going_on)
        number, turns = session
        yield number, turns.pop(0)
        if not turns:
            going_on.remove(session)
            going_on += [waiting.pop()] if waiting else []


def trace_blocks(path: str | Path, limit: int) -> list[list[Any]]:
    """Read the block hashes of the first `limit` requests of a trace in Mooncake's format.

    Raises:
        DocumentError: the file cannot be read, or is in another format.
    """
    try:
        return [list(row["hash_ids"]) for row in json_lines(path)[:limit]]
    except (KeyError, TypeError) as error:
        raise _no_trace(path, error) from None


def json_lines(path: str | Path) -> list[Any]:
    """Read all rows of a JSON Lines file.

    Raises:
        DocumentError: it cannot be read as such.
    """
    try:
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DocumentError(f"{path} cannot be read as JSON Lines: {error}") from None


def _no_trace(path: str | Path, error: Exception) -> DocumentError:
    return DocumentError(f"{path} holds no trace ({error!r}); a row is {{timestamp, hash_ids: [...]}}")
