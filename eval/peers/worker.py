"""The peer's end: requests as JSON lines on stdin, replies as JSON lines on stdout, all else to stderr.

Run by the peer's own Python as `worker.py MODULE:CLASS`, so it imports nothing of chunkcache. The requests:

    {"op": "load", "model": PATH, "threads": N}              -> {"ok": true, "versions": {..}, "settings": {..}}
    {"op": "warm", "parts": [[ids], ..]}                     -> {"ok": true}
    {"op": "answer", "parts": [[ids], ..], "answer_tokens": N} -> {"ttft_s": S, "answer": [ids], "logits": BASE64}

Parts are the prefix, the chunks and, in `answer`, the question; the prompt is these one after the other. What can be
computed ahead of the prefix and chunks is computed in `warm`. `ttft_s` is wall time from the ids in hand to the first
token id on the host, all that the peer does for the request included. `logits` are the first token's, float32. A
request that fails is answered with {"error": TEXT}.

A peer's class has `packages` (whose versions are told), `load(model, threads)`, which returns its settings,
`warm(parts)`, and `answer(parts, answer_tokens)`, which returns seconds, token ids and logits as a NumPy array. One
that is asked otherwise has `operations`: methods that take the fields of a request and return those of a reply, its
`logits` as an array, too.
"""

from __future__ import annotations

import base64
import importlib
import json
import logging
import os
import sys
from importlib.metadata import version
from typing import Any, TextIO


def main() -> None:
    """Answer requests until stdin ends."""
    replies = _claim_stdout()
    module, _, name = sys.argv[1].partition(":")
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # last: no library is to find a file of ours first
    peer: Any = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["op"] == "load":
                peer = getattr(importlib.import_module(module), name)()
            reply = _reply(peer, request)
        except Exception as error:
            logging.exception("the request failed")
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _reply(peer: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "load":
        settings = peer.load(request["model"], request["threads"])
        return {"ok": True, "versions": {name: version(name) for name in peer.packages}, "settings": settings}
    if request["op"] in getattr(peer, "operations", ()):
        told: dict[str, Any] = getattr(peer, request.pop("op"))(**request)
        return told if "logits" not in told else {**told, "logits": _coded(told["logits"])}
    if request["op"] == "warm":
        peer.warm(request["parts"])
        return {"ok": True}
    seconds, answer, logits = peer.answer(request["parts"], request["answer_tokens"])
    return {"ttft_s": seconds, "answer": answer, "logits": _coded(logits)}


def _coded(logits: Any) -> str:
    return base64.b64encode(logits.astype("<f4").tobytes()).decode()


def _claim_stdout() -> TextIO:
    """Return the real stdout, and send whatever else is printed to stderr, also by C libraries."""
    mine = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return mine


if __name__ == "__main__":
    main()
