"""Precompute throughput: chunks in packs against one by one, behind the prefix alone and behind a lead-in as well."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Decoder, layer_kv, parse_policy
from chunkcache.defaults import DEFAULT_POLICY
from chunkcache.eval.measure import OnStep, seconds_of, table
from chunkcache.eval.results import Results, Row
from chunkcache.kv import ChunkKV, TokenIds
from chunkcache.kv.quantised import dense
from chunkcache.library.encoder import Encoder
from chunkcache.retriever import Document, split

BENCH = "packing"
LENGTHS = (64, 256, 512)
TOKENS = 2048  # of all chunks of a round together
_BEHIND = ("prefix", "prefix and lead-in")


def bench_packing(
    results: Results,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = TOKENS,
    rounds: int = 5,
    on_step: OnStep | None = None,
) -> Results:
    """Measure both ways in turn.

    One by one is the model's own forward on each chunk, with the KV of its context in a transformers cache.

    Args:
        results: gets a row of each context (`behind`, of `context_tokens`) and length (`chunk_tokens`), with chunks
            per second `one_by_one` and `packed`, medians over the rounds, and the median `ratio` of a round.
        model: the model.
        tokenizer: its tokenizer.
        lengths: of chunks, in tokens.
        tokens: of all chunks of one round together.
        rounds: of each.
        on_step: called with (contexts and lengths done, all).
    """
    ways = _Ways(model, tokenizer)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    steps = [(behind, length) for behind in _BEHIND for length in lengths]
    for number, (behind, length) in enumerate(steps):
        chunks = [
            tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())
            for _ in range(max(2, tokens // length))
        ]
        if not results.done(behind=behind, chunk_tokens=length):
            one_by_one, packed = ways.seconds(behind, chunks, rounds)
            results.add(
                {
                    "behind": behind,
                    "context_tokens": len(ways.contexts[behind]),
                    "chunk_tokens": length,
                    "one_by_one": len(chunks) / statistics.median(one_by_one),
                    "packed": len(chunks) / statistics.median(packed),
                    "ratio": statistics.median(one / many for one, many in zip(one_by_one, packed, strict=True)),
                }
            )
        if on_step is not None:
            on_step(number + 1, len(steps))
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return the rows, and a table of them."""
    columns = {
        "behind": "{behind}", "tokens": "{chunk_tokens}", "one by one": "{one_by_one:.2f}", "packed": "{packed:.2f}",
        "ratio": "{ratio:.2f}",
    }  # fmt: skip
    return {
        "lengths": results.rows,
        "tables": [table("chunks per second (medians)", columns, results.rows)],
        "plots": [],
    }


def precompute_speed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], size: int = 512
) -> Row:
    """Precompute the chunks of documents, of at most `size` tokens, behind prefix and lead-in, both ways in turn.

    Returns:
        how many `documents`, `chunks` and `tokens` there are, and documents per second `packed_per_s` and
        `one_by_one_per_s`, medians of two rounds.
    """
    ways = _Ways(model, tokenizer)
    chunks = [
        ways.prompts.chunk(chunk.text) for document in documents for chunk in split(document, tokenizer, size=size)
    ]
    one_by_one, packed = ways.seconds(_BEHIND[1], chunks, 2)
    return {
        "documents": len(documents),
        "chunks": len(chunks),
        "tokens": sum(map(len, chunks)),
        "packed_per_s": len(documents) / statistics.median(packed),
        "one_by_one_per_s": len(documents) / statistics.median(one_by_one),
    }


class _Ways:
    """Both ways to compute the KV of chunks."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decoder = Decoder(model)
        self._encoder = Encoder(self._decoder)
        self.prompts = chunkcache.wrap(model, tokenizer).prompts
        prefix = self.prompts.prefix(None)
        lead_in = self.prompts.lead_in[-parse_policy(DEFAULT_POLICY).lead_in() :]
        self.contexts = {
            behind: next(self._encoder.encode(None, [ids]))
            for behind, ids in zip(_BEHIND, (prefix, (*prefix, *lead_in)), strict=True)
        }

    def seconds(self, behind: str, chunks: Sequence[TokenIds], rounds: int) -> tuple[list[float], list[float]]:
        """Return the seconds of each round, one by one and packed."""
        context, one_by_one, packed = self.contexts[behind], [], []
        for _ in range(rounds):
            one_by_one.append(
                seconds_of(
                    lambda: deque((prefill_alone(self._decoder, context, chunk) for chunk in chunks), maxlen=0)
                )
            )
            packed.append(seconds_of(lambda: deque(self._encoder.encode(context, chunks), maxlen=0)))
        return one_by_one, packed


def prefill_alone(decoder: Decoder, context: ChunkKV, chunk: TokenIds) -> list[torch.Tensor]:
    """Return the KV of a chunk behind its context, `[2, kv_heads, tokens, head_dim]` of each layer."""
    cache = DynamicCache()
    for index, layer in enumerate(context.layers):
        keys, values = dense(layer).to(decoder.device)[:, None]
        cache.update(keys, values, index)
    decoder.prefill(torch.tensor([chunk]), cache)
    return [torch.cat(layer_kv(cache, index))[:, :, len(context) :].clone() for index in range(len(cache.layers))]
