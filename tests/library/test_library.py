"""Chunk KV on demand: what is computed is what the model itself would compute, batched or not."""

from __future__ import annotations

import re

import pytest
import torch
from support.llm import tiny_model
from transformers import DynamicCache

from chunkcache.blend import Decoder
from chunkcache.blend.query import Query
from chunkcache.errors import ContextLengthError
from chunkcache.kv import ChunkKV, ChunkRef
from chunkcache.library.library import ChunkLibrary
from chunkcache.store import MemoryStore

FAMILIES = ["llama", "mistral-sliding", "gemma3", "smollm3", "glm4", "qwen3-moe"]
PREFIX = tuple(range(10, 22))
CHUNKS = [tuple(range(start, start + size)) for start, size in ((30, 5), (60, 31), (100, 17), (140, 31))]


def new_library(name: str = "llama", tenant: str = "") -> ChunkLibrary:
    return ChunkLibrary(Decoder(tiny_model(name)), MemoryStore(), "fingerprint", tenant)


def refs(library: ChunkLibrary, context: tuple[int, ...] = PREFIX, chunks=CHUNKS) -> list[ChunkRef]:
    return [library.ref(chunk, context) for chunk in chunks]


def compute(
    library: ChunkLibrary, context: tuple[int, ...] = PREFIX, chunks=CHUNKS
) -> dict[tuple[int, ...], ChunkKV]:
    """Compute chunks; return their KV by token ids."""
    return {ref.token_ids: kv for ref, kv in library.compute(refs(library, context, chunks)).items()}


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
    computed = compute(new_library(name))
    for chunk in CHUNKS:
        assert computed[chunk].position == len(PREFIX)
        assert_same(computed[chunk], own_kv(name, (*PREFIX, *chunk), len(PREFIX)))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_by_one_is_the_same(name):
    together, alone = compute(new_library(name)), new_library(name)
    for chunk in CHUNKS:
        assert_same(compute(alone, chunks=[chunk])[chunk], together[chunk].layers)


def test_without_a_prefix():
    computed = compute(new_library(), ())
    assert computed[CHUNKS[1]].position == 0
    assert_same(computed[CHUNKS[1]], own_kv("llama", CHUNKS[1], 0))


def test_what_is_stored_is_no_view_of_the_batch():
    library = new_library()
    for kv in compute(library).values():
        assert all(layer.numel() == layer.untyped_storage().nbytes() / 4 for layer in kv.layers)


def test_computed_chunks_are_stored():
    library = new_library()
    assert library.get(library.ref(CHUNKS[0], PREFIX)) is None
    computed = compute(library)
    assert all(map(library.holds, refs(library)))
    assert_same(library.get(library.ref(CHUNKS[0], PREFIX)), computed[CHUNKS[0]].layers)


def test_the_prefix_is_stored_once():
    library = new_library()
    first = library.prefix(PREFIX)
    assert first.position == 0
    assert_same(first, own_kv("llama", PREFIX, 0))
    assert library.prefix(PREFIX).layers is library.prefix(PREFIX).layers


def test_context_and_tenant_are_part_of_the_key():
    decoder, store = Decoder(tiny_model()), MemoryStore()
    ours, theirs = (ChunkLibrary(decoder, store, "fingerprint", tenant) for tenant in ("a", "b"))
    compute(ours)
    assert ours.holds(ours.ref(CHUNKS[0], PREFIX))
    assert not ours.holds(ours.ref(CHUNKS[0], PREFIX[:-1]))
    assert not theirs.holds(theirs.ref(CHUNKS[0], PREFIX))
    other = ChunkLibrary(decoder, store, "other model", "a")
    assert not other.holds(other.ref(CHUNKS[0], PREFIX))


def test_progress_counts_every_chunk():
    seen, library = [], new_library()
    library.compute(refs(library), on_progress=lambda *counts: seen.append(counts))
    assert seen == [(done, len(CHUNKS)) for done in range(1, len(CHUNKS) + 1)]


def test_nothing_to_compute():
    assert new_library().compute([]) == {}


def test_a_chunk_that_cannot_fit_is_refused_before_any_work():
    library = new_library()
    with pytest.raises(ContextLengthError, match=r"500 tokens behind a prefix of 12 .* context of 512"):
        compute(library, chunks=[CHUNKS[0], (7,) * 500])
    assert not library.holds(library.ref(CHUNKS[0], PREFIX))


def test_computed_chunks_can_be_found_in_a_prompt():
    library = new_library()
    compute(library)
    [span] = library.find((1, 2, *CHUNKS[1], 3))
    assert (span.start, span.stop, span.offset, span.exact) == (2, 33, 0, False)
    assert span.chunk_ids == span.kv.token_ids == CHUNKS[1]


def test_a_found_chunk_is_exact_behind_the_very_tokens_it_was_computed_after():
    library, other, long = new_library(), tuple(range(300, 312)), tuple(range(400, 450))
    compute(library, PREFIX, [*CHUNKS, long])
    compute(library, other)  # as many tokens, but not the same
    for context in (PREFIX, other):
        [span] = library.find((*context, *CHUNKS[1], 3))
        assert span.exact
        assert_same(span.kv, own_kv("llama", (*context, *CHUNKS[1]), len(context)))
    assert [span.exact for span in library.find((*PREFIX[:-1], 9, *CHUNKS[1]))] == [False]
    assert [span.exact for span in library.find((*PREFIX, *long[:20]))] == [True]
    assert [(span.offset, span.exact) for span in library.find((*PREFIX, *long[7:]))] == [(7, False)]


def test_a_found_chunk_may_have_gone():
    library = new_library()
    compute(library)
    library.delete()
    compute(library, chunks=CHUNKS[:1])
    assert library.find(CHUNKS[1]) == []
    store = MemoryStore()
    library = ChunkLibrary(Decoder(tiny_model()), store, "fingerprint")
    compute(library)
    store.clear()
    [span] = library.find(CHUNKS[1])
    assert span.kv is None
    assert library.find(CHUNKS[1]) == []


def test_a_chunk_is_computed_after_prefix_and_lead_in_where_these_leave_room():
    lead_in = tuple(range(200, 240))
    library = ChunkLibrary(Decoder(tiny_model()), MemoryStore(), "fingerprint", lead_in=lead_in)
    policy = Query(lead=8)
    assert library.ref_for(CHUNKS[0], PREFIX, policy).context_ids == (*PREFIX, *lead_in[-8:])
    assert library.ref_for(CHUNKS[0], PREFIX, Query(lead=0)).context_ids == PREFIX
    assert library.ref_for((7,) * 495, PREFIX, policy).context_ids == PREFIX
    first, second = (library.ref_for(chunk, PREFIX, policy) for chunk in CHUNKS[:2])
    assert first.context_ids is second.context_ids  # not a copy for each chunk


def test_a_key_shows_no_token_and_no_tenant():
    key = new_library(tenant="tenant-7").ref(CHUNKS[0], PREFIX).key
    assert re.fullmatch("[0-9a-f]{64}", key.digest)
    assert key.digest.startswith(str(key))


@pytest.mark.parametrize("cut", ["tokens", "layers"])
def test_kv_that_are_not_all_of_the_chunk_are_not_stored(cut):
    """A hook may prune the cache while a chunk is computed."""
    library = new_library()
    ref = library.ref((5, 6, 7, 8), ())
    kv = library.compute([ref])[ref]
    library.drop(ref.key)
    layers = [layer[:, :, 1:] for layer in kv.layers] if cut == "tokens" else kv.layers[1:]
    library.put(ref, kv.of_layers(layers))
    assert not library.holds(ref)
    assert library.refused == 1


def test_nothing_is_stored_once_the_model_is_another():
    library = new_library()
    ref = library.ref((5, 6, 7, 8), ())
    library._is_current = lambda: False
    assert library.compute([ref])[ref].token_ids == ref.token_ids
    assert not library.holds(ref)
    assert library.refused == 1
