"""A corpus whose chunks are computed behind their nearest: by its own vectors, and kept near as documents change."""

from __future__ import annotations

from functools import partial

import pytest
from support.llm import own_model, wrapped
from test_corpus import BRIDGE, FERRY, KEEPER, QUESTION, embedder, held, stored, texts_of

import chunkcache
from chunkcache.corpus import Corpus
from chunkcache.errors import InputError
from chunkcache.kv import chunk_name
from chunkcache.retriever import Document, Retriever
from chunkcache.store import open_store

Neighbours = partial(chunkcache.Neighbours, first=False)  # one entry of each chunk

LEAD = "A passage of the kind that stands before others."
BOATS = [
    Document(f"boats{n}.md", "Boats", f"The harbour had {n} boats in the year {1900 + n}, and no ferry.")
    for n in range(8)
]
BREAD = [
    Document(f"bread{n}.md", "Bread", f"Knead the dough {n} times; the bread is baked at {n + 8}.") for n in range(8)
]


def corpus(*documents, store="memory://", **options):
    llm = wrapped(own_model(), store=open_store(store) if isinstance(store, str) else store, lead_in=LEAD)
    retriever = Retriever(llm.tokenizer, embedder=embedder(), size=48)
    made = Corpus(llm, retriever, **options)
    made.add(documents)
    return made


def behind(made, document):
    """Return the ids of the documents whose chunks stood before the one chunk of a document."""
    [text] = texts_of(made, document)
    ids = {chunk_name(made.llm.prompts.chunk(chunk.text)): chunk.document_id for chunk in made.retriever.chunks}
    kv = made.llm.store.get(made.llm.keys([text])[0], None)
    assert ids[kv.origin.chunks[0]] == document
    return {ids[name] for name in kv.origin.chunks[1:]}


def test_chunks_are_computed_behind_those_that_are_about_the_same():
    made = corpus(*BOATS, *BREAD, lead=Neighbours(tokens=100))
    for kind in (BOATS, BREAD):
        own = {document.id for document in kind}
        stood = [behind(made, document.id) for document in kind]
        assert all(stood)
        assert sum(len(each & own) for each in stood) > 2 * sum(len(each - own) for each in stood)
    assert made.generate(QUESTION, k=3, max_new_tokens=2).generation.stats.misses == 0


@pytest.mark.parametrize("mode", ["hybrid", "dense", "keyword"])
def test_the_mode_of_search_makes_no_difference(mode):
    llm = wrapped(own_model(), lead_in=LEAD)
    retriever = Retriever.build([BRIDGE, *BOATS], llm.tokenizer, embedder=embedder(), size=48, mode=mode)
    made = Corpus(llm, retriever, lead=Neighbours(tokens=100))
    assert made.precompute() == 9
    assert all(behind(made, document.id) for document in (BRIDGE, *BOATS))
    nearest = retriever.nearest(retriever.chunks, 8)
    assert [len(near) for near in nearest] == [8] * 9
    assert all(
        near[0].document_id != chunk.document_id for chunk, near in zip(retriever.chunks, nearest, strict=True)
    )


def test_a_new_document_finds_its_nearest_among_the_old():
    made = corpus(*BOATS, *BREAD, refresh=0, lead=Neighbours(tokens=60))
    writes = made.llm.store.stats().writes
    made.add([Document("new.md", "New", "The harbour had 99 boats in the year 1999, and a ferry.")])
    assert made.llm.store.stats().writes - writes == 1
    kinds = [name[:5] for name in behind(made, "new.md")]
    assert kinds.count("boats") > kinds.count("bread")


def test_what_is_near_to_a_new_document_is_computed_again_within_bounds():
    made = corpus(*BOATS, *BREAD, refresh=0.1, lead=Neighbours(tokens=60))
    writes = made.llm.store.stats().writes
    made.add([Document("new.md", "New", "The harbour had 4 boats in the year 1904, and no ferries.")])
    assert 1 < made.llm.store.stats().writes - writes <= 1 + 2  # a tenth of 17 chunks
    assert any("new.md" in behind(made, document.id) for document in BOATS)


def test_a_deletion_takes_along_what_was_computed_behind_it_and_the_rest_is_refreshed():
    made = corpus(*BOATS, *BREAD, refresh=0, lead=Neighbours(tokens=100))
    depends = [document.id for document in (*BOATS, *BREAD) if "boats3.md" in behind(made, document.id)]
    assert depends
    made.delete("boats3.md")
    assert stored(made, "boats3.md") == 0
    others = [document.id for document in (*BOATS, *BREAD) if document.id not in (*depends, "boats3.md")]
    assert all(held(made, [texts_of(made, document)[0] for document in others]))
    lost = [document for document in depends if document != "boats3.md"]
    assert not any(held(made, [texts_of(made, document)[0] for document in lost]))
    done = made.refresh(share=0.07)
    assert done.computed == 2
    assert done.stale >= len(lost) - 2
    made.refresh(share=1)
    made.refresh(share=1)
    assert made.refresh(share=1, seconds=60).stale <= len(BOATS)
    assert all(behind(made, document) for document in lost)
    assert all(held(made, [chunk.text for chunk in made.retriever.chunks]))


def test_by_default_a_change_leaves_little_without_kv():
    made = corpus(*BOATS)
    made.update(Document("boats3.md", "Boats", "There were no boats in the harbour, only bread."))
    assert stored(made, "boats3.md") == 1
    assert not any("1903" in chunk.text for chunk in made.retriever.chunks)
    assert sum(held(made, [chunk.text for chunk in made.retriever.chunks])) >= 1


def test_time_is_a_bound_too():
    made = corpus(*BOATS, lead=Neighbours(tokens=60, extra=0.0), refresh=0)
    assert made.refresh(share=1, seconds=0).computed == 0


def test_nothing_of_a_deleted_document_is_used_to_compute_what_is_new():
    made = corpus(BRIDGE, FERRY, KEEPER, refresh=1)
    changed = Document("bridge.md", "Bridge", "The bridge over the river was taken down after years of work.")
    old = chunk_name(made.llm.prompts.chunk(BRIDGE.text))
    made.update(changed)
    assert not [entry for entry in made.llm.store.entries() if old in entry.chunks]
    assert stored(made, "bridge.md") == 1
    assert all(held(made, [chunk.text for chunk in made.retriever.chunks]))


def test_a_renamed_document_keeps_its_kv():
    made = corpus(BRIDGE, FERRY, KEEPER, refresh=0)
    keys = made.llm.keys([BRIDGE.text, FERRY.text, KEEPER.text])
    made.sync([Document("renamed.md", "Bridge", BRIDGE.text), FERRY, KEEPER])
    assert made.llm.keys([BRIDGE.text, FERRY.text, KEEPER.text]) == keys
    assert all(key in made.llm.store for key in keys)
    made.delete("renamed.md")
    name = chunk_name(made.llm.prompts.chunk(BRIDGE.text))
    assert not [entry for entry in made.llm.store.entries() if name in entry.chunks]


def test_sync_computes_nothing_behind_what_it_deletes():
    made = corpus(*BOATS[:4], refresh=0)
    made.sync([*BOATS[2:], FERRY])
    now = {chunk_name(made.llm.prompts.chunk(chunk.text)) for chunk in made.retriever.chunks}
    assert all(now.issuperset(entry.chunks) for entry in made.llm.store.entries() if len(entry.chunks) > 1)
    assert all(held(made, [texts_of(made, document.id)[0] for document in (*BOATS[4:], FERRY)]))


def test_after_a_restart_the_corpus_goes_on(tmp_path):
    made = corpus(*BOATS, store=f"disk://{tmp_path}/kv")
    stood = {document.id: behind(made, document.id) for document in BOATS}
    made.retriever.save(tmp_path / "index")
    made.llm.store.close()
    llm = wrapped(own_model(), store=f"disk://{tmp_path}/kv", lead_in=LEAD)
    again = Corpus(llm, Retriever.load(tmp_path / "index", llm.tokenizer, embedder()))
    assert again.precompute() == 0
    assert {document.id: behind(again, document.id) for document in BOATS} == stood
    again.delete("boats0.md")
    name = chunk_name(llm.prompts.chunk(BOATS[0].text))
    assert not [entry for entry in llm.store.entries() if name in entry.chunks]
    llm.close()


def test_hints_and_prefetch_name_what_requests_use():
    store = open_store("tiered:memory://?max_bytes=64MiB|memory://")
    near, far = store.tiers().values()
    done = corpus(*BOATS, store=far)
    made = Corpus(wrapped(own_model(), store=store, lead_in=LEAD), done.retriever)
    keys = made.llm.keys([hit.chunk.text for hit in made.search(QUESTION, 2)])
    store.flush()
    assert all(key in near for key in keys)
    assert all(len(far.get(key, None).origin.chunks) > 1 for key in keys)


@pytest.mark.parametrize("options", [{"lead": "packaged"}, {"policy": "reuse"}, {"policy": "cachecraft"}])
def test_others_compute_as_before(options):
    made = corpus(BRIDGE, FERRY, KEEPER, **options)
    assert all(len(entry.chunks) == 1 for entry in made.llm.store.entries())
    assert made.refresh() == type(made.refresh())(0, 0)


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="refresh=2"):
        corpus(refresh=2)
    with pytest.raises(InputError, match="lead='close'"):
        corpus(lead="close")
    with pytest.raises(InputError, match="refresh=-1"):
        corpus(BRIDGE).refresh(share=-1)
