"""Requests to an AsyncLLM, their answers, and whether these are right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from chunkcache.integrations.vllm import request_params, transfer_config
from chunkcache.kv import TokenIds
from chunkcache.prompt import Prompt


@dataclass(frozen=True)
class Kind:
    """A prompt with chunks, and the policy that they are reused under.

    No two kinds of different policies share a chunk: it may be stored behind other tokens for one than for the other,
    and an answer may use either.
    """

    prompt: Prompt
    policy: str

    def fresh(self, chunks: Sequence[int], prefix: bool = True) -> int:
        """Return how many tokens nothing is stored of, if these chunks are, and the prefix."""
        stored = sum(len(self.prompt.spans[index]) for index in chunks) + prefix * self.prompt.prefix_tokens
        return len(self.prompt.token_ids) - stored

    @property
    def whole(self) -> tuple[int, int]:
        """How many chunks there are, and how many tokens nothing is stored of if all of them are."""
        return len(self.prompt.spans), self.fresh(range(len(self.prompt.spans)))

    def spec(self, chunks: Sequence[int] | None = None, **more: Any) -> dict[str, Any]:
        """Return what a request says of its chunks, or of those with these numbers only."""
        spec = request_params(self.prompt, self.policy)["kv_transfer_params"]["chunkcache"]
        spans = spec["spans"] if chunks is None else [spec["spans"][index] for index in chunks]
        return {**spec, "spans": spans, **more}


@dataclass(frozen=True)
class Answer:
    """What a client got.

    Attributes:
        kind: number of what it asked.
        token_ids: the answer.
        figures: what vLLM says was done for it; None where vLLM computed it all.
    """

    kind: int
    token_ids: TokenIds = field(repr=False)
    figures: dict[str, Any] | None

    @property
    def pattern(self) -> tuple[int, int, int]:
        """What tells how much of it was stored: kind, chunks found, tokens that nothing was stored of."""
        figures = self.figures or {}
        return self.kind, figures.get("hits", 0), figures.get("fresh", 0)


class Engine:
    """One AsyncLLM.

    Args:
        model: a folder.
        store: URL of the connector's store; None for no connector.
        options: more of the engine's.
    """

    def __init__(self, model: str, store: str | None, **options: Any) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        if store is not None:
            options["kv_transfer_config"] = KVTransferConfig(**transfer_config(store=store, share=False))
        args = AsyncEngineArgs(model, **{"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, **options})
        self._llm = AsyncLLM.from_engine_args(args)
        self._names = itertools.count()

    async def ask(
        self, kind: int, prompt: Prompt, spec: Any, tokens: int, leave_after: int | None = None
    ) -> Answer | None:
        """Ask a prompt; None if it was left after so many tokens.

        Raises:
            RuntimeError: it did not end as it should.
        """
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"chunkcache": spec}}
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args=extra)
        asked = {"prompt_token_ids": list(prompt.token_ids)}
        async with aclosing(self._llm.generate(asked, params, str(next(self._names)))) as stream:
            async for output in stream:
                if leave_after is not None and len(output.outputs[0].token_ids) >= leave_after:
                    return None
        told = output.outputs[0]
        if told.finish_reason != "length" or len(told.token_ids) != tokens:
            raise RuntimeError(f"ended by {told.finish_reason!r} after {len(told.token_ids)} tokens")
        figures = (output.kv_transfer_params or {}).get("chunkcache")
        return Answer(kind, tuple(told.token_ids), figures)

    def unfinished(self) -> int:
        """Return how many requests it still has."""
        return len(self._llm.output_processor.request_states)

    def counters(self) -> dict[str, int]:
        """Return what the connector has counted."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        start = "vllm:chunkcache_"
        found = [metric for metric in get_metrics_snapshot() if metric.name.startswith(start)]
        return {metric.name.removeprefix(start): int(metric.value) for metric in found if metric.value}

    def close(self) -> None:
        """End it."""
        self._llm.shutdown()


@contextmanager
def running(model: str, store: str | None, options: dict[str, Any]) -> Iterator[Engine]:
    """Run an engine, and end it; the arguments are those of `Engine`."""
    engine = Engine(model, store, **options)
    try:
        yield engine
    finally:
        engine.close()


class Judge:
    """Compares answers with those that are right.

    Args:
        plain: by kind, what vLLM answers without chunks.
        fused: what is right for each pattern.

    Attributes:
        counts: of answers; `unjudged` are those that nobody knows what is right for.
    """

    def __init__(self, plain: Sequence[TokenIds], fused: dict[tuple[int, int, int], set[TokenIds]]) -> None:
        self._plain, self._fused = plain, fused
        names = ("wrong", "unjudged", "fused", "fused_in_part", "left_to_the_engine")
        self.counts = dict.fromkeys(names, 0)
        self._full = {kind: hits for kind, hits, _ in fused}

    def add(self, answer: Answer) -> None:
        """Judge an answer."""
        if answer.figures is None:
            self._count("left_to_the_engine", answer, answer.token_ids == self._plain[answer.kind])
            return
        kind, hits, _ = answer.pattern
        known = self._fused.get(answer.pattern)
        if not known:
            self.counts["unjudged"] += 1
            print(f"not to be had over a store that is well: {answer.pattern}, {answer.figures}")
            return
        self._count("fused" if hits == self._full[kind] else "fused_in_part", answer, answer.token_ids in known)

    def _count(self, name: str, answer: Answer, right: bool) -> None:
        self.counts[name if right else "wrong"] += 1
        if not right:
            print(f"wrong, {name}: {answer.pattern}, {answer.figures}")
