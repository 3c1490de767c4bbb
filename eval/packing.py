"""Precompute throughput: chunks in packs against one by one, behind the prefix alone and behind a lead-in as well."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.blend import Decoder, layer_kv, parse_policy
from chunkcache.kv import ChunkKV
from chunkcache.kv.quantised import dense
from chunkcache.library.encoder import Encoder, TokenIds
from chunkcache.llm import DEFAULT_POLICY
from chunkcache.retriever import Document, split


@dataclass(frozen=True)
class Throughput:
    """Chunks per second, medians over the rounds; `ratio` is the median of packed over one by one in each round."""

    behind: str
    context_tokens: int
    chunk_tokens: int
    one_by_one: float
    packed: float
    ratio: float


def bench_packing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chunk_tokens: Sequence[int] = (64, 256, 512),
    tokens: int = 2048,
    rounds: int = 5,
    on_round: Callable[[int, int], None] | None = None,
) -> list[Throughput]:
    """Measure both ways in turn.

    One by one is the model's own forward on each chunk, with the KV of its context in a transformers cache.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        chunk_tokens: lengths of chunk to measure.
        tokens: tokens of all chunks of one round together.
        rounds: rounds of each.
        on_round: called with (rounds done, rounds in all).
    """
    decoder = Decoder(model)
    encoder = Encoder(decoder)
    prompts = chunkcache.wrap(model, tokenizer).prompts
    prefix = prompts.prefix(None)
    contexts = {
        "prefix": prefix,
        "prefix and lead-in": (*prefix, *prompts.lead_in(parse_policy(DEFAULT_POLICY).lead_in())),
    }
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    done, found = 0, []
    for behind, ids in contexts.items():
        context = next(encoder.encode(None, [ids]))
        for length in chunk_tokens:
            chunks = [
                tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())
                for _ in range(max(2, tokens // length))
            ]
            alone, packed = [], []
            for _ in range(rounds):
                alone.append(_seconds(_prefill_alone(decoder, context, chunk) for chunk in chunks))
                packed.append(_seconds(encoder.encode(context, chunks)))
                done += 1
                if on_round is not None:
                    on_round(done, rounds * len(contexts) * len(chunk_tokens))
            ratios = [one / many for one, many in zip(alone, packed, strict=True)]
            one_by_one, many = (len(chunks) / statistics.median(times) for times in (alone, packed))
            found.append(Throughput(behind, len(ids), length, one_by_one, many, statistics.median(ratios)))
    return found


@dataclass(frozen=True)
class DocumentSpeed:
    """Documents per second whose chunks are precomputed behind prefix and lead-in, packed and one by one."""

    documents: int
    chunks: int
    tokens: int
    packed_per_s: float
    one_by_one_per_s: float


def precompute_speed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    size: int = 512,
    on_round: Callable[[int, int], None] | None = None,
    rounds: int = 2,
) -> DocumentSpeed:
    """Precompute the chunks of documents both ways in turn, and take the median of the rounds.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        documents: what is precomputed.
        size: tokens of a chunk, at most.
        on_round: called with (rounds done, rounds in all).
        rounds: rounds of each way.
    """
    decoder = Decoder(model)
    encoder = Encoder(decoder)
    prompts = chunkcache.wrap(model, tokenizer).prompts
    behind = (*prompts.prefix(None), *prompts.lead_in(parse_policy(DEFAULT_POLICY).lead_in()))
    context = next(encoder.encode(None, [behind]))
    chunks = [prompts.chunk(chunk.text) for document in documents for chunk in split(document, tokenizer, size=size)]
    alone, packed = [], []
    for done in range(rounds):
        packed.append(_seconds(encoder.encode(context, chunks)))
        alone.append(_seconds(_prefill_alone(decoder, context, chunk) for chunk in chunks))
        if on_round is not None:
            on_round(done + 1, rounds)
    packed_s, alone_s = statistics.median(packed), statistics.median(alone)
    count = len(documents)
    return DocumentSpeed(count, len(chunks), sum(map(len, chunks)), count / packed_s, count / alone_s)


def _seconds(work: Iterable[object]) -> float:
    started = time.perf_counter()
    deque(work, maxlen=0)
    return time.perf_counter() - started


def _prefill_alone(decoder: Decoder, context: ChunkKV, chunk: TokenIds) -> list[torch.Tensor]:
    cache = DynamicCache()
    for index, layer in enumerate(context.layers):
        keys, values = dense(layer).to(decoder.device)[:, None]
        cache.update(keys, values, index)
    decoder.prefill(torch.tensor([chunk]), cache)
    return [torch.cat(layer_kv(cache, index))[:, :, len(context) :].clone() for index in range(len(cache.layers))]
