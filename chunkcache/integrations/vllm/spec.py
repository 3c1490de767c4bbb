"""What a request tells the engine about its chunks: where they stand, and under which policy they are reused.

It travels as `kv_transfer_params={"chunkcache": {...}}`, in `SamplingParams.extra_args` or in the body of an HTTP
request, and holds numbers and token ids only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkcache.blend import Policy, parse_policy
from chunkcache.errors import InputError, PromptError
from chunkcache.kv import Span, TokenIds
from chunkcache.prompt import Prompt

NAME = "chunkcache"
NOT_SAVED = "lmcache.skip_save"  # else an LMCache that knows prompts by their tokens would take fused KV for exact


@dataclass(frozen=True)
class ChunkSpec:
    """Where the chunks of one prompt stand.

    Attributes:
        prefix: tokens before the first chunk that are likely to stand there again.
        spans: start and stop of each chunk, in order and without overlap.
        wholes: by index of a span, the whole chunk and the index in it of the span's first token, where the prompt
            holds a part of a chunk only.
        context: tokens that the chunks were computed after, a lead-in apart: a number of the prompt's first ones.
        policy: a policy string; "" for the engine's own.
        warm: whether missing chunks are computed before the request is served, however long that takes.
    """

    prefix: int
    spans: tuple[tuple[int, int], ...]
    wholes: dict[int, tuple[int, TokenIds]] = field(default_factory=dict, repr=False)
    context: int = 0
    policy: str = ""
    warm: bool = False

    @property
    def end(self) -> int:
        """Position right after the last chunk."""
        return self.spans[-1][1]

    @classmethod
    def parse(cls, given: Any, tokens: int) -> ChunkSpec:
        """Read what a request brought along.

        Args:
            given: as made by `request_params`. Instead of `spans`, `chunks` may give the lengths of chunks that stand
                one right behind the other after the prefix.
            tokens: of the prompt.

        Raises:
            InputError: it is malformed, or does not fit the prompt.
        """
        if not isinstance(given, dict):
            raise InputError(f"chunkcache={type(given).__name__}: give an object with prefix and spans")
        prefix = _number(given, "prefix", 0)
        spans, wholes = _spans(given, prefix)
        context = _number(given, "context", prefix)
        policy = given.get("policy") or ""
        if not isinstance(policy, str):
            raise InputError("chunkcache: policy is no string")
        end = 0
        for start, stop in spans:
            if start < end or stop <= start:
                raise InputError(f"chunkcache: the span {start} to {stop} is empty, or overlaps the one before")
            end = stop
        if not spans or end >= tokens or prefix > spans[0][0] or context > spans[0][0]:
            raise InputError(
                f"chunkcache: prefix={prefix}, context={context} and {len(spans)} spans up to {end} do not fit a "
                f"prompt of {tokens} tokens, whose last is none of a chunk"
            )
        return cls(prefix, spans, wholes, context, policy, bool(given.get("warm")))

    def prompt(self, token_ids: Sequence[int]) -> Prompt:
        """Return the prompt that these token ids are, with its chunks.

        Raises:
            InputError: a span holds other tokens than the whole chunk that is given for it.
        """
        ids = tuple(token_ids)
        spans = []
        for index, (start, stop) in enumerate(self.spans):
            offset, whole = self.wholes.get(index, (0, ids[start:stop]))
            span = Span(start, stop, whole, offset)
            if span.token_ids != ids[start:stop]:
                raise InputError(f"chunkcache: the span at position {start} is no part of the chunk given for it")
            spans.append(span)
        return Prompt(ids, self.prefix, tuple(spans), ids[: self.context])


def request_params(prompt: Prompt, policy: str | Policy | None = None, *, warm: bool = False) -> dict[str, Any]:
    """Return what a request of this prompt brings along: `extra_args` of vLLM's sampling params.

    Over HTTP the value of `kv_transfer_params` goes into the body, beside the prompt as token ids.

    Args:
        prompt: as a `PromptBuilder` built it.
        policy: which reused tokens are recomputed; None for the engine's own policy.
        warm: compute missing chunks before the request is served. By default they are computed with the prompt, and
            stored afterwards in the engine's steps.

    Raises:
        PromptError: the prompt goes on from a conversation, whose KV another process holds.
        PolicyError: the policy is unknown.
    """
    if prompt.head is not None or prompt.context_ids != prompt.token_ids[: len(prompt.context_ids)]:
        raise PromptError("a prompt that goes on from a conversation cannot be sent to vLLM: build it as a whole")
    if not prompt.spans:
        return {}
    spec: dict[str, Any] = {"prefix": prompt.prefix_tokens, "spans": []}
    for span in prompt.spans:
        part = span.offset > 0 or len(span) < len(span.chunk_ids)
        spec["spans"].append([span.start, span.stop, *([span.offset, list(span.chunk_ids)] if part else [])])
    if len(prompt.context_ids) != prompt.prefix_tokens:
        spec["context"] = len(prompt.context_ids)
    if policy is not None:
        spec["policy"] = str(parse_policy(policy))
    if warm:
        spec["warm"] = True
    return {"kv_transfer_params": {NOT_SAVED: True, NAME: spec}}


def salt_of(spec: ChunkSpec, token_ids: Sequence[int], own: str | None, request: str) -> str:
    """Return a namespace of vLLM's prefix cache that no other prompt, policy or request has.

    Fused blocks are right for this request alone: `query` chooses rows of the first chunks by the question behind
    the last.

    Args:
        spec: where the chunks stand.
        token_ids: the prompt.
        own: the caller's own salt.
        request: what tells this request from others.
    """
    named = json.dumps([spec.prefix, spec.spans, spec.policy, own, request])
    sha = hashlib.sha256(named.encode())
    sha.update(" ".join(map(str, token_ids)).encode())
    return f"{NAME}:{sha.hexdigest()}"


def _number(given: dict[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"chunkcache: {name} is no number of tokens")
    return value


def _spans(given: dict[str, Any], prefix: int) -> tuple[tuple[tuple[int, int], ...], dict[int, tuple[int, TokenIds]]]:
    """Return the spans, and what is given of those that are parts of chunks."""
    raw = given.get("spans")
    if raw is None:
        raw, at = [], prefix
        for length in _list(given.get("chunks")):
            raw.append([at, at := at + _integer(length)])
    spans, wholes = [], {}
    for index, each in enumerate(_list(raw)):
        start, stop, *whole = _list(each) if len(_list(each)) in (2, 4) else (None, None)
        spans.append((_integer(start), _integer(stop)))
        if whole:
            wholes[index] = _integer(whole[0]), tuple(map(_integer, _list(whole[1])))
    return tuple(spans), wholes


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise InputError("chunkcache: spans or chunks are no list")
    return list(value)


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError("chunkcache: a span is no pair of positions")
    return value
