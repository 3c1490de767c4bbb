"""Chunk KV on demand: what is computed is what the model itself would compute, batched or not."""

from __future__ import annotations

import re

import pytest
import torch
from support.llm import tiny_model
from transformers import DynamicCache

from chunkcache.blend import Decoder
from chunkcache.errors import ContextLengthError
from chunkcache.kv import ChunkKV
from chunkcache.library.library import ChunkLibrary
from chunkcache.store import MemoryStore

FAMILIES = ["llama", "mistral-sliding", "gemma3", "smollm3", "glm4", "qwen3-moe"]
PREFIX = tuple(range(10, 22))
CHUNKS = [tuple(range(start, start + size)) for start, size in ((30, 5), (60, 31), (100, 17), (140, 31))]


def new_library(name: str = "llama", tenant: str = "") -> ChunkLibrary:
    return ChunkLibrary(Decoder(tiny_model(name)), MemoryStore(), "fingerprint", tenant)


def own_kv(name: str, ids: tuple[int, ...], start: int) -> list[torch.Tensor]:
    """Return the KV `[2, kv_heads, n, head_dim]` per layer of the tokens from `start` on, by the model itself."""
    cache = DynamicCache()
    with torch.no_grad():
        tiny_model(name)(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return [torch.cat((layer.keys, layer.values))[:, :, start:] for layer in cache.layers]


def assert_same(kv: ChunkKV, layers) -> None:
    for stored, expected in zip(kv.layers, layers, strict=True):
        torch.testing.assert_close(stored, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_in_one_batch_are_what_the_model_computes(name):
    computed = new_library(name).compute(dict.fromkeys(CHUNKS, PREFIX))
    for chunk in CHUNKS:
        assert computed[chunk].position == len(PREFIX)
        assert_same(computed[chunk], own_kv(name, (*PREFIX, *chunk), len(PREFIX)))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_by_one_is_the_same(name):
    together, alone = new_library(name).compute(dict.fromkeys(CHUNKS, PREFIX)), new_library(name)
    for chunk in CHUNKS:
        assert_same(alone.compute(dict.fromkeys([chunk], PREFIX))[chunk], together[chunk].layers)


def test_without_a_prefix():
    computed = new_library().compute(dict.fromkeys(CHUNKS, ()))
    assert computed[CHUNKS[1]].position == 0
    assert_same(computed[CHUNKS[1]], own_kv("llama", CHUNKS[1], 0))


def test_what_is_stored_is_no_view_of_the_batch():
    library = new_library()
    for kv in library.compute(dict.fromkeys(CHUNKS, PREFIX)).values():
        assert all(layer.numel() == layer.untyped_storage().nbytes() / 4 for layer in kv.layers)


def test_computed_chunks_are_stored():
    library = new_library()
    assert library.get(PREFIX, CHUNKS[0]) is None
    computed = library.compute(dict.fromkeys(CHUNKS, PREFIX))
    assert all(library.holds(PREFIX, chunk) for chunk in CHUNKS)
    assert_same(library.get(PREFIX, CHUNKS[0]), computed[CHUNKS[0]].layers)


def test_the_prefix_is_stored_once():
    library = new_library()
    first = library.prefix(PREFIX)
    assert first.position == 0
    assert_same(first, own_kv("llama", PREFIX, 0))
    assert library.prefix(PREFIX) is library.prefix(PREFIX)


def test_context_and_salt_are_part_of_the_key():
    decoder, store = Decoder(tiny_model()), MemoryStore()
    ours, theirs = (ChunkLibrary(decoder, store, "fingerprint", tenant) for tenant in ("a", "b"))
    ours.compute(dict.fromkeys(CHUNKS, PREFIX))
    assert not ours.holds(PREFIX[:-1], CHUNKS[0])
    assert not theirs.holds(PREFIX, CHUNKS[0])
    assert not ChunkLibrary(decoder, store, "other model", "a").holds(PREFIX, CHUNKS[0])


def test_progress_counts_every_chunk():
    seen = []
    new_library().compute(dict.fromkeys(CHUNKS, PREFIX), on_progress=lambda *counts: seen.append(counts))
    assert seen == [(done, len(CHUNKS)) for done in range(1, len(CHUNKS) + 1)]


def test_nothing_to_compute():
    assert new_library().compute(dict.fromkeys([], PREFIX)) == {}


def test_a_chunk_that_cannot_fit_is_refused_before_any_work():
    library = new_library()
    with pytest.raises(ContextLengthError, match=r"500 tokens behind a prefix of 12 .* context of 512"):
        library.compute({CHUNKS[0]: PREFIX, (7,) * 500: PREFIX})
    assert not library.holds(PREFIX, CHUNKS[0])


def test_computed_chunks_can_be_found_in_a_prompt():
    library = new_library()
    library.compute(dict.fromkeys(CHUNKS, PREFIX))
    (match,) = library.finder.find((1, 2, *CHUNKS[1], 3))
    assert (match.start, match.length, match.known.context) == (2, 31, PREFIX)
    assert library.find(match.known).token_ids == CHUNKS[1]


def test_a_found_chunk_may_have_gone():
    library = new_library()
    library.compute(dict.fromkeys(CHUNKS, PREFIX))
    (match,) = library.finder.find(CHUNKS[1])
    library._store.clear()
    assert library.find(match.known) is None


def test_a_key_shows_no_token_and_no_salt():
    key = new_library(tenant="tenant-7").key(PREFIX, CHUNKS[0])
    assert re.fullmatch("[0-9a-f]{64}", key.digest)
    assert key.digest.startswith(str(key))
