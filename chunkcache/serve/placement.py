"""Which replica answers a request: the one that most of its chunks belong to.

Each chunk belongs to one of the replicas by rendezvous hashing (Thaler and Ravishankar, "A name-based mapping scheme
for rendezvous", 1996): no table, and when a replica goes only its own chunks go elsewhere. A request goes where
most of its text belongs, to the least loaded of those where that is the same. A replica with much more to do than the
others is passed over ("Consistent hashing with bounded loads", Mirrokni and others, 2016), so that one popular
document does not keep all requests at one replica.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

PREFIX = 1024  # characters of a request without chunks by which it is placed
CHUNKS = 256  # of a request by which it is placed
BOUND = 1.25  # times the mean load that a replica may have, and one request more
Weights = Mapping[bytes, int]  # of each chunk: how long it is


def weights_of(body: bytes, who: str = "") -> Weights:
    """Return the chunks of a request by hash, with their lengths.

    Args:
        body: the request as it came; what cannot be read has no chunks, and is for the replica to refuse.
        who: tells tenants apart, whose chunks are never shared.

    Returns:
        its documents and the parts with `prompt_cache_breakpoint`, the first `CHUNKS` of them; for `rag`, its index;
        where there is none of these, the beginning of the text, which is what requests without chunks may have in
        common.
    """
    try:
        asked = json.loads(body)
        if not isinstance(asked, dict):
            return {}
        seed = repr((who, asked.get("cache_salt"), asked.get("prompt_cache_key")))
        texts = list(islice(_chunks(asked), CHUNKS)) or [_text(asked)[:PREFIX]]
        return {_digest(seed, text): max(1, len(text)) for text in texts}
    except (ValueError, RecursionError):  # no JSON, or nested too deeply to be read or written
        return {}


def ranked(weights: Weights, loads: Mapping[str, int]) -> list[str]:
    """Return replicas, the best for a request first.

    Args:
        weights: as `weights_of` returns them.
        loads: requests under way at each replica.
    """
    votes = dict.fromkeys(loads, 0)
    for chunk, weight in weights.items() if loads else ():
        votes[max(loads, key=lambda name: _digest(name, chunk.hex()))] += weight
    most = BOUND * (sum(loads.values()) + 1) / max(1, len(loads)) + 1
    return sorted(loads, key=lambda name: (loads[name] > most, -votes[name], loads[name], name))


def _chunks(asked: Mapping[str, Any]) -> Iterator[str]:
    for document in _listed(asked.get("documents")):
        yield document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    for part in _parts(asked):
        if part.get("prompt_cache_breakpoint") is not None:
            yield str(part.get("text"))
    rag = asked.get("rag")
    if isinstance(rag, dict):
        yield f"index {rag.get('index')}"


def _parts(asked: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for message in (*_listed(asked.get("messages")), *_listed(asked.get("input"))):
        for part in _listed(message.get("content")) if isinstance(message, dict) else ():
            if isinstance(part, dict):
                yield part


def _text(asked: Mapping[str, Any]) -> str:
    return json.dumps([asked.get(name) for name in ("instructions", "messages", "input", "prompt")])


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _digest(seed: str, text: str) -> bytes:
    return blake2b(f"{len(seed)}:{seed}{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
