"""Chunks computed behind their nearest chunks: what is stored, what requests use, and what goes with what."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers_redis import servers
from support.blend import layers_of, own_prefill
from support.llm import QUESTION, own_model, wrapped
from transformers.cache_utils import DynamicCache

import chunkcache
from chunkcache.blend import Plan
from chunkcache.blend.cache import FusedCache
from chunkcache.errors import InputError
from chunkcache.kv import Span, chunk_name
from chunkcache.kv.quantised import dense
from chunkcache.library.neighbours import GRAM, MOST, NearChunks, without_repeats
from chunkcache.store import open_store

Neighbours = partial(chunkcache.Neighbours, first=False)  # one entry of each chunk

LEAD = "A passage of the kind that stands before others. It says nothing that matters here."
POLICY = "query:ratio=0"  # recomputes nothing: what is stored is all that counts
BRIDGE = "The bridge over the river was opened to the public in 1931, after nine years of work."
ARCH = "The arch of the bridge was painted green, and the river below it is deep."
TOLL = "Whoever crossed the bridge over the river paid a toll until 1950."
FERRY = "In winter the ferry sails only when the sea is calm, twice a day."
TEXTS = (BRIDGE, ARCH, TOLL, FERRY)
NEAREST = ((ARCH, TOLL), (BRIDGE, TOLL), (BRIDGE, ARCH), (TOLL, BRIDGE))
FAMILIES = ["llama", "mistral-sliding", "gemma3", "smollm3", "qwen2", "gemma2"]


def near_key(llm, text):
    """Return the key of a text as computed behind its nearest."""
    return llm.engine.library.ref_near(llm.prompts.chunk(text), llm.prompts.prefix()).key


def alone_key(llm, text):
    policy = llm.resolve_policy(POLICY)
    return llm.engine.library.ref_for(llm.prompts.chunk(text), llm.prompts.prefix(), policy).key


def names(llm, *texts):
    return [chunk_name(llm.prompts.chunk(text)) for text in texts]


def filled(store="memory://", model=None, lead_in=LEAD, **options):
    """Return a wrapper that holds ARCH and TOLL as computed behind the lead-in, and BRIDGE behind these two."""
    llm = wrapped(model or own_model(), store=open_store(store), lead_in=lead_in, policy=POLICY)
    llm.precompute([ARCH, TOLL], documents=["arch.md", "toll.md"])
    how = Neighbours(nearest=[[ARCH, TOLL]], **options)
    done = llm.precompute([BRIDGE], documents=["bridge.md"], lead=how)
    assert (done.computed, done.near) == (1, 1)
    return llm


def fused(llm, texts):
    """Return what `FusedCache` puts together of prefix, lead-in and stored chunks, per layer, and its tokens."""
    library, decoder = llm.engine.library, llm.engine.decoder
    context = library.prefix((*llm.prompts.prefix(), *llm.prompts.lead_in))
    spans = [Span(0, len(context), context.token_ids, kv=context)]
    for text in texts:
        kv = llm.store.get(alone_key(llm, text), None)
        spans.append(Span(spans[-1].stop, spans[-1].stop + len(kv), kv.token_ids, kv=kv))
    ids = (*(token for span in spans for token in span.token_ids), 5)
    cache = FusedCache(decoder.config, Plan.of(ids, spans[1:], spans[0]), decoder.rotaries)
    layers = []
    for index, (heads, dim) in enumerate(decoder.heads):
        layers.append(cache.assemble(index, torch.empty(1, heads, 1, dim, dtype=decoder.dtype))[:, :, :-1].clone())
    cache.stop_loading()
    return ids[:-1], layers


@pytest.mark.parametrize("codec", ["", "?codec=int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_chunk_is_computed_behind_what_the_fused_cache_puts_together(name, codec):
    llm = filled("memory://" + codec, own_model(name, attention="eager" if name == "gemma2" else "sdpa"))
    before, layers = fused(llm, [TOLL, ARCH])  # the nearest last
    kv = llm.store.get(near_key(llm, BRIDGE), llm.prompts.chunk(BRIDGE))
    assert kv.position == len(before)
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        cache.update(layer[:1], layer[1:], index)
    _, own = own_prefill(llm.model, kv.token_ids, len(before), cache)
    for layer, expected in zip(kv.layers, layers_of(own, len(before)), strict=True):
        error = (dense(layer) - expected).abs().max() / expected.abs().max()
        assert error < (0.03 if codec else 1e-5)


def test_what_stands_in_the_prompt_as_it_was_computed_is_close_to_full_prefill():
    near, packaged = (wrapped(own_model(), lead_in=" ", policy=POLICY) for _ in range(2))
    near.precompute([TOLL])
    near.precompute([BRIDGE], lead=Neighbours(nearest=[[TOLL]]))
    packaged.precompute([TOLL, BRIDGE])
    full = near.prefill(QUESTION, [TOLL, BRIDGE], policy="full").logits
    errors = [float((llm.prefill(QUESTION, [TOLL, BRIDGE]).logits - full).norm()) for llm in (near, packaged)]
    assert errors[0] < 1e-3 < errors[1]


def test_a_chunk_that_stands_first_is_exact_and_goes_without_its_nearest():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    llm.precompute([ARCH, TOLL])
    done = llm.precompute([BRIDGE], lead=chunkcache.Neighbours(nearest=[[ARCH, TOLL]]))
    assert (done.computed, done.near) == (1, 1)
    prefix, tokens = len(llm.prompts.prefix()), len(llm.prompts.chunk(BRIDGE))
    stats = llm.prefill(QUESTION, [BRIDGE, ARCH]).stats
    assert (stats.hits, stats.misses, stats.exact_tokens) == (2, 0, prefix + tokens)
    stats = llm.prefill(QUESTION, [ARCH, BRIDGE]).stats
    assert (stats.hits, stats.misses, stats.exact_tokens) == (2, 0, prefix)
    expected = llm.prefill(QUESTION, [BRIDGE], policy="full").logits
    torch.testing.assert_close(llm.prefill(QUESTION, [BRIDGE]).logits, expected, atol=1e-4, rtol=0)


def test_a_chunk_is_not_computed_behind_its_own_text_nor_behind_the_same_text_twice():
    chunk, other, third = (tuple(range(first, first + 80)) for first in (0, 100, 200))
    window = (*chunk[40:], *range(300, 340))
    part, most = other[:20], GRAM - 1 + 13  # tokens that 13 n-grams are made of, of 65: a fifth
    twice = (*range(400, 480 - most), *other[-most - 1 :])
    allowed = (*range(500, 580 - most), *third[:most])
    nearest = [chunk, window, other, part, twice, third, allowed, (7,), ()]
    assert without_repeats(chunk, nearest) == [other, third, allowed, (7,), ()]
    many = [tuple(range(at, at + 9)) for at in range(1000, 1900, 9)]
    assert without_repeats(chunk, many) == many[:MOST]


def test_texts_that_repeat_a_text_do_not_stand_before_it():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    longer = f"{BRIDGE} {FERRY}"
    llm.precompute([longer, TOLL])
    llm.precompute([BRIDGE], lead=Neighbours(nearest=[[longer, TOLL]]))
    kv = llm.store.get(near_key(llm, BRIDGE), llm.prompts.chunk(BRIDGE))
    assert kv.origin.chunks == tuple(names(llm, BRIDGE, TOLL))


def test_a_chunk_does_not_meet_its_own_text_in_the_kv_of_its_nearest():
    def near(stored, texts):
        llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
        llm.precompute(stored)
        nearest = [[TOLL if text == BRIDGE else BRIDGE] for text in texts]
        llm.precompute(texts, lead=Neighbours(nearest=nearest, renew=True))
        return [llm.store.get(near_key(llm, text), llm.prompts.chunk(text)) for text in texts]

    both = near([BRIDGE, TOLL], [BRIDGE, TOLL])
    for text, other, kv in zip([BRIDGE, TOLL], [TOLL, BRIDGE], both, strict=True):
        (expected,) = near([other], [text])
        torch.testing.assert_close(kv.layers, expected.layers, atol=0, rtol=0)


def test_without_a_packaged_lead_in_the_seeds_are_what_is_exact_where_it_comes_first():
    llm = wrapped(own_model(), lead_in=LEAD, policy="query:ratio=0,lead=0")
    how = chunkcache.Neighbours(nearest=NEAREST)
    assert llm.precompute(TEXTS, lead=how).near == len(TEXTS)
    entries = [entry for entry in llm.store.entries() if entry.chunks]
    own = [entry for entry in entries if len(entry.chunks) == 1 and entry.chunks[0] in names(llm, *TEXTS)]
    assert len(own) == len(TEXTS)  # each once behind the prefix alone
    assert llm.prefill(QUESTION, TEXTS[:1]).stats.exact_tokens == len(llm.prompts.prefix()) + len(
        llm.prompts.chunk(TEXTS[0])
    )


def test_it_is_never_exact():
    llm = wrapped(own_model(), lead_in=" ", policy=POLICY)
    llm.precompute([TOLL])
    llm.precompute([BRIDGE], lead=Neighbours(nearest=[[TOLL]]))
    prefix = len(llm.prompts.prefix())
    for chunks in ([BRIDGE], [TOLL, BRIDGE]):
        stats = llm.prefill(QUESTION, chunks).stats
        assert (stats.hits, stats.misses) == (len(chunks), 0)
        first = len(llm.prompts.chunk(TOLL)) if chunks[0] == TOLL else 0
        assert stats.exact_tokens == prefix + first
        ids = llm.prompts.build(QUESTION, chunks).token_ids
        spans = llm.engine.library.find(ids)
        assert [span.exact for span in spans if span.chunk_ids == llm.prompts.chunk(BRIDGE)] == [False]
    for policy in ("exact", "prefix", "full"):
        done = llm.prefill(QUESTION, [TOLL, BRIDGE], policy=policy)
        with torch.no_grad():
            own = llm.model(input_ids=done.input_ids).logits[0, -1]
        torch.testing.assert_close(done.logits, own, atol=1e-4, rtol=1e-4)
    cachecraft = llm.prefill(QUESTION, [BRIDGE], policy="cachecraft").stats
    assert cachecraft.chunks == 1
    assert not llm.engine.library.ref_near(llm.prompts.chunk(BRIDGE), ()).is_exact_after(())


def test_requests_use_it_where_it_is_stored_and_count_each_chunk_once():
    llm = filled()
    assert llm.keys([BRIDGE, ARCH]) == [near_key(llm, BRIDGE), alone_key(llm, ARCH)]
    assert llm.keys([BRIDGE], policy="reuse") != llm.keys([BRIDGE])
    before = llm.store.stats()
    stats = llm.prefill(QUESTION, [BRIDGE, ARCH, BRIDGE, FERRY]).stats
    assert (stats.hits, stats.misses) == (3, 1)
    after = llm.store.stats()
    assert (after.hits - before.hits, after.misses - before.misses) == (
        3,
        2,
    )  # what FERRY stands behind; FERRY, prefix
    assert llm.prefetch([BRIDGE, TOLL]) == []
    [batched] = llm.generate_batch([(QUESTION, [BRIDGE, ARCH])], max_new_tokens=2)
    assert batched.stats.misses == 0
    llm.store.delete(near_key(llm, BRIDGE))
    again = llm.prefill(QUESTION, [BRIDGE])  # computed behind the lead-in
    assert again.stats.misses == 1
    assert llm.keys([BRIDGE]) == [alone_key(llm, BRIDGE)]


def test_the_attached_model_uses_it():
    model = own_model()
    llm = filled(model=model)
    ids = llm.prompts.build(QUESTION, [BRIDGE]).token_ids
    llm.precompute([BRIDGE], policy="query:ratio=0,lead=5")  # another version, later
    llm.store.delete(llm.keys([BRIDGE], policy="reuse")[0])
    [span] = [each for each in llm.engine.library.find(ids) if each.chunk_ids == llm.prompts.chunk(BRIDGE)]
    assert span.kv.position == llm.store.get(near_key(llm, BRIDGE), None).position


@pytest.mark.parametrize("how", ["memory", "disk", "redis"])
@pytest.mark.parametrize("what", ["document", "texts", "edit"])
def test_what_was_computed_behind_a_chunk_goes_with_it(how, what, tmp_path):
    with servers(1 if how == "redis" else 0) as started:
        url = {
            "memory": lambda: "memory://",
            "disk": lambda: f"disk://{tmp_path}",
            "redis": lambda: f"redis://127.0.0.1:{started[0].port}/0",
        }[how]()
        llm = filled(url)
        if what == "document":
            llm.delete(document="toll.md")
        elif what == "texts":
            llm.delete(texts=[TOLL])
        else:
            llm.update_document("toll.md", [FERRY])
        left = {entry.key for entry in llm.store.entries()}
        assert near_key(llm, BRIDGE) not in left
        assert alone_key(llm, TOLL) not in left
        assert alone_key(llm, ARCH) in left
        stats = llm.prefill(QUESTION, [BRIDGE, ARCH]).stats  # the chunk itself is not forgotten
        assert (stats.hits, stats.misses) == (1, 1)
        assert llm.keys([BRIDGE]) == [alone_key(llm, BRIDGE)]
        owners = llm.engine.library.registry.documents_of(names(llm, BRIDGE))
        assert owners == {chunkcache.kv.hashed_label("document", "bridge.md")}
        llm.store.close()


def test_after_a_restart_it_is_used_and_deleted_with_what_it_was_computed_behind(tmp_path):
    filled(f"disk://{tmp_path}").store.close()
    llm = wrapped(own_model(), store=f"disk://{tmp_path}", lead_in=LEAD, policy=POLICY)
    assert llm.prefill(QUESTION, [BRIDGE, ARCH, TOLL]).stats.misses == 0
    assert llm.keys([BRIDGE]) == [near_key(llm, BRIDGE)]
    llm.precompute([FERRY], lead=Neighbours(nearest=[[BRIDGE]]))  # names what BRIDGE names, whom nobody registered
    for document in ("toll.md", "arch.md"):
        llm.delete(document=document)
    left = {entry.key for entry in llm.store.entries()}
    assert not left & {near_key(llm, BRIDGE), near_key(llm, FERRY)}
    llm.close()


def test_a_text_that_left_its_document_goes_though_it_was_computed_behind_another_that_stays(tmp_path):
    llm = filled()
    llm.update_document("bridge.md", [FERRY], compute=False)
    assert near_key(llm, BRIDGE) not in llm.store
    assert alone_key(llm, ARCH) in llm.store


def test_its_labels_can_be_added_to():
    llm = filled()
    llm.precompute([BRIDGE], documents=["copy.md"])
    kv = llm.store.get(near_key(llm, BRIDGE), None)
    assert kv.origin.chunks == tuple(names(llm, BRIDGE, TOLL, ARCH))
    assert len(kv.origin.documents) == 4
    llm.delete(document="toll.md")
    assert near_key(llm, BRIDGE) not in llm.store


def test_a_chunk_of_another_trust_label_never_stands_before_one():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    llm.register([BRIDGE, ARCH], trust="house")
    llm.register([TOLL], trust="web")
    llm.register([FERRY])
    llm.precompute(TEXTS, lead=Neighbours(nearest=NEAREST, extra=1.0))
    for text, others in ((BRIDGE, [ARCH]), (ARCH, [BRIDGE]), (TOLL, []), (FERRY, [])):
        kv = llm.store.get(llm.keys([text])[0], None)
        assert kv.origin.chunks[1:] == tuple(names(llm, *others))


def test_what_was_computed_before_a_label_was_given_is_not_used_any_more():
    llm = filled()
    llm.register([TOLL], trust="web")
    ids = llm.prompts.build(QUESTION, [BRIDGE]).token_ids
    found = [span for span in llm.engine.library.find(ids) if span.chunk_ids == llm.prompts.chunk(BRIDGE)]
    assert [span.kv for span in found] == [None]
    stats = llm.prefill(QUESTION, [BRIDGE]).stats
    assert stats.misses == 1
    clean = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    expected = clean.prefill(QUESTION, [BRIDGE]).logits
    torch.testing.assert_close(llm.prefill(QUESTION, [BRIDGE]).logits, expected)


def computing(llm, nearest, policy=POLICY, tokens=1024):
    ids = {llm.prompts.chunk(text): [llm.prompts.chunk(other) for other in near] for text, near in nearest.items()}
    return NearChunks(llm.engine.library, llm.prompts.prefix(), llm.resolve_policy(policy), ids, tokens)


SAID = [f"In {1900 + n} there were {n * 7} boats, {n * 11} nets and {n * 13} sails." for n in range(30)]


@pytest.mark.parametrize("reach", [1, 3, 10])
def test_a_chunk_costs_at_most_one_computation_and_a_third(reach):
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    nearest = {text: [SAID[(n + step) % len(SAID)] for step in range(1, reach + 1)] for n, text in enumerate(SAID)}
    made = computing(llm, nearest)
    chunks = [llm.prompts.chunk(text) for text in SAID]
    steps: list[tuple[int, int]] = []
    near = made.compute(chunks, 0.3, lambda *step: steps.append(step))
    assert len(SAID) <= made.computed <= 1.3 * len(SAID)
    assert near >= (len(SAID) if reach > 1 else 0.7 * len(SAID))
    assert steps[-1] == (30, 30)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    entries = [entry for entry in llm.store.entries() if entry.chunks[1:] or entry.tokens < 60]
    own = [entry.chunks[0] for entry in entries if entry.chunks[0] in names(llm, *SAID)]
    assert len(own) == len(set(own)) == len(SAID)  # a chunk is stored once


def test_a_second_run_computes_nothing():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    how = Neighbours(nearest=NEAREST)
    first = llm.precompute(TEXTS, lead=how)
    assert first.computed == 4
    assert 0 < first.near <= 4
    first_overlaps = llm.overlap(TEXTS, how)
    assert llm.precompute(TEXTS, lead=how) == chunkcache.PrecomputeResult(4, 0, 0)
    renewed = llm.precompute(TEXTS, lead=Neighbours(nearest=NEAREST, extra=0.0, renew=True))
    assert renewed.computed == renewed.near == sum(overlap < 1 for overlap in first_overlaps)
    assert llm.overlap(TEXTS, how) == [1.0] * 4
    assert llm.precompute(TEXTS, lead=Neighbours(nearest=NEAREST, renew=True)).computed == 0


def test_each_chunk_finds_the_one_before_it():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    nearest = {text: SAID[max(0, n - 1) : n] for n, text in enumerate(SAID[:8])}
    llm.precompute(SAID[:1])
    assert computing(llm, nearest).compute([llm.prompts.chunk(text) for text in SAID[7:0:-1]]) == 7
    for n, text in enumerate(SAID[1:8], 1):
        kv = llm.store.get(near_key(llm, text), None)
        assert kv.origin.chunks == tuple(names(llm, *SAID[n::-1]))  # the one before, and what that stood behind


def test_the_overlap_says_how_much_of_what_is_nearest_a_chunk_was_computed_behind():
    llm = filled()
    assert llm.overlap([BRIDGE, ARCH], Neighbours(nearest=[[ARCH, FERRY], [BRIDGE]])) == [0.5, 0.0]
    assert llm.overlap([FERRY, TOLL], Neighbours(nearest=[[TOLL], []])) == [0.0, 1.0]


def test_fewer_stand_before_a_chunk_where_the_context_or_the_bound_is_short():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    llm.precompute([ARCH, TOLL])
    tokens = len(llm.prompts.chunk(ARCH))
    llm.precompute([BRIDGE], lead=Neighbours(nearest=[[ARCH, TOLL]], tokens=tokens))
    kv = llm.store.get(near_key(llm, BRIDGE), None)
    assert kv.origin.chunks[1:] == tuple(names(llm, ARCH))
    most = llm.engine.decoder.max_tokens
    prefix = llm.prompts.prefix()
    long = wrapped(own_model(), lead_in=LEAD * 30, policy=POLICY)  # does not fit
    size = most - len(prefix) - len(llm.prompts.chunk(BRIDGE)) - 1
    many = [text for text in SAID if len(llm.prompts.chunk(text)) <= size]
    long.precompute(many)
    long.precompute([BRIDGE], lead=Neighbours(nearest=[many]))
    kv = long.store.get(near_key(long, BRIDGE), None)
    assert len(prefix) < kv.position <= most - 1 - len(kv)
    assert long.prefill(QUESTION, [BRIDGE]).stats.misses == 0


@pytest.mark.parametrize("codec", ["", "?codec=int8"])
def test_of_a_nearest_chunk_that_does_not_fit_its_end_stands_before_a_chunk(codec, monkeypatch):
    monkeypatch.setattr("chunkcache.library.neighbours.LEAST", kept := 16)
    llm = wrapped(own_model(), store=open_store("memory://" + codec), lead_in=LEAD, policy=POLICY)
    long = " ".join(SAID[:2])
    llm.precompute([TOLL, long], documents=["toll.md", "long.md"])
    tokens = len(llm.prompts.chunk(TOLL))
    how = partial(Neighbours, nearest=[[TOLL, long]], renew=True)
    llm.precompute([BRIDGE], lead=how(tokens=tokens + kept - 1))  # leaves less room than is worth it
    assert llm.store.get(near_key(llm, BRIDGE), None).origin.chunks == tuple(names(llm, BRIDGE, TOLL))
    llm.precompute([BRIDGE], lead=how(tokens=tokens + kept))
    kv = llm.store.get(near_key(llm, BRIDGE), None)
    assert kv.origin.chunks == tuple(names(llm, BRIDGE, long, TOLL))

    context = llm.engine.library.prefix((*llm.prompts.prefix(), *llm.prompts.lead_in))
    assert kv.position == len(context) + kept + tokens
    ids, layers = fused(llm, [long, TOLL])
    cache = DynamicCache()
    first = len(ids) - tokens - kept  # of the end of the long one, where the whole of it would stand
    rotaries = llm.engine.decoder.rotaries
    for index, layer in enumerate(layers):
        moved = layer[:, :, first:].clone()
        rotaries[index].shift(layer[0, :, first:], len(context) - first, moved[0])
        both = torch.cat((layer[:, :, : len(context)], moved), dim=2)
        cache.update(both[:1], both[1:], index)
    _, own = own_prefill(llm.model, kv.token_ids, kv.position, cache)
    for layer, expected in zip(kv.layers, layers_of(own, kv.position), strict=True):
        assert (dense(layer) - expected).abs().max() / expected.abs().max() < (0.03 if codec else 1e-5)
    llm.delete(document="long.md")
    assert not llm.engine.library.holds(llm.engine.library.ref_near(llm.prompts.chunk(BRIDGE), llm.prompts.prefix()))


def test_one_entry_depends_on_no_more_chunks_than_it_may_name(monkeypatch):
    monkeypatch.setattr("chunkcache.library.neighbours.NAMES", 3)
    llm = filled()
    llm.precompute([FERRY], lead=Neighbours(nearest=[[BRIDGE, ARCH]]))
    kv = llm.store.get(near_key(llm, FERRY), None)
    assert kv.origin.chunks == tuple(names(llm, FERRY, ARCH))  # BRIDGE names three, and has no other version


def test_lost_neighbours_are_no_failure(tmp_path):
    llm = wrapped(own_model(), store=open_store(f"disk://{tmp_path}"), lead_in=LEAD, policy=POLICY)
    llm.precompute([ARCH])
    for file in tmp_path.rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        if len(data) > 10_000:
            third = len(data) // 3  # in the first layer: a chunk behind it needs nothing of its last
            file.write_bytes(data[:third] + bytes([data[third] ^ 1]) + data[third + 1 :])
    done = llm.precompute([BRIDGE], lead=Neighbours(nearest=[[ARCH]]))
    assert (done.computed, done.near) == (1, 0)
    assert llm.keys([BRIDGE]) == [alone_key(llm, BRIDGE)]
    assert llm.prefill(QUESTION, [BRIDGE]).stats.misses == 0
    llm.store.close()


def test_a_policy_that_does_not_want_them_gets_none():
    llm = wrapped(own_model(), lead_in=LEAD)
    for policy in ("reuse", "cachecraft", "fusionrag:lead=none"):
        assert llm.precompute(TEXTS, policy=policy, lead=Neighbours(nearest=NEAREST)).near == 0


def test_the_nearest_are_found_among_the_texts():
    llm = wrapped(own_model(), lead_in=LEAD, policy=POLICY)
    assert llm.precompute(TEXTS, lead="neighbours").near == 4
    kv = llm.store.get(llm.keys([BRIDGE])[0], None)
    assert set(kv.origin.chunks) <= set(names(llm, *TEXTS))
    asked = []

    def nearest(texts):
        asked.extend(texts)
        return [[BRIDGE] for _ in texts]

    llm.precompute([*TEXTS, SAID[0]], lead=Neighbours(nearest=nearest))
    assert asked == [SAID[0]]  # the others are stored


def test_what_makes_no_sense_is_refused():
    llm = wrapped()
    with pytest.raises(InputError, match="lead='near'"):
        llm.precompute(TEXTS, lead="near")
    with pytest.raises(InputError, match="nearest has 1 lists for 4 texts"):
        llm.precompute(TEXTS, lead=Neighbours(nearest=[[BRIDGE]]))
    with pytest.raises(InputError, match="tokens=0"):
        Neighbours(tokens=0)
    with pytest.raises(InputError, match="extra=2"):
        Neighbours(extra=2)
