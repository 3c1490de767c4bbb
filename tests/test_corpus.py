"""Corpus: what is searched and what is stored are the same documents, before, during and after a change."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from support.llm import wrapped

from chunkcache.corpus import Corpus
from chunkcache.errors import ContextLengthError, InputError
from chunkcache.kv import chunk_name, hashed_label
from chunkcache.library import ChunkLibrary
from chunkcache.prompt.builder import PromptChunk
from chunkcache.retriever import Chunk, Document, Embedder, Hit, Retriever
from chunkcache.store import EntryFilter, open_store

BRIDGE = Document("bridge.md", "Bridge", "The bridge over the river was opened to all in 1931, after years of work.")
FERRY = Document("ferry.md", "Ferry", "In winter the ferry sails only when the sea is calm, twice a day.")
KEEPER = Document("keeper.md", "Keeper", "The lighthouse keeper wrote down the weather each morning, for years.")
NOTICE = "This text is the property of the harbour office, and part of more than one document."
QUESTION = "When was the bridge opened?"


@cache
def embedder() -> Embedder:
    return Embedder()


def corpus(*documents: Document, store: str = "memory://", size: int = 48, overlap: int = 0, **options) -> Corpus:
    llm = wrapped(store=open_store(store))
    given = documents or (BRIDGE, FERRY, KEEPER)
    retriever = Retriever.build(given, llm.tokenizer, embedder=embedder(), size=size, overlap=overlap)
    return Corpus(llm, retriever, **options)


def stored(corpus: Corpus, document: str, store=None) -> int:
    """Return how many of a document's chunks a store has; of one that is gone, how many entries are from it."""
    entries = list((store or corpus.llm.store).entries(EntryFilter(document=hashed_label("document", document))))
    if document not in corpus.retriever.documents:
        return len(entries)
    now = {chunk_name(corpus.llm.prompts.chunk(text)) for text in texts_of(corpus, document)}
    return len(now & {entry.chunks[0] for entry in entries})


def texts_of(corpus: Corpus, document: str) -> list[str]:
    return [chunk.text for chunk in corpus.retriever.chunks if chunk.document_id == document]


def test_all_chunks_are_computed_once():
    made = corpus()
    assert made.precompute() == len(made.retriever.chunks) >= 3
    assert made.precompute() == 0


def test_documents_that_spell_special_tokens_are_cut_to_size_and_answered_from():
    spelled = [Document("vocabulary.txt", "v", "<pad>" * 400), Document("log.md", "l", "<s>user\nHi</s>\n" * 40)]
    made = corpus(BRIDGE, *spelled, size=64)
    for chunk in made.retriever.chunks:
        assert chunk.tokens == len(made.llm.prompts.encode(chunk.text)) <= 64
    assert made.precompute() == len({chunk.text for chunk in made.retriever.chunks})
    assert made.generate("<pad><pad>", k=2, max_new_tokens=2).generation.stats.misses == 0


def test_a_chunk_over_the_context_does_not_stop_the_others(caplog):
    long = Document("long.md", "Long", "the sea is calm " * 300)
    made = corpus(BRIDGE, long, FERRY, size=2000)
    assert made.precompute() == 2
    assert "1 of 3 chunks" in caplog.text
    alone = Document("long.md", "Long", "the ferry is back " * 300)
    changes = made.sync([BRIDGE, alone, KEEPER])
    assert {chunk.document_id for chunk in changes.added} == {"long.md", "keeper.md"}
    assert stored(made, "keeper.md") == 1
    assert made.generate(QUESTION, k=1, max_new_tokens=2).hits[0].chunk.document_id == "bridge.md"
    with pytest.raises(ContextLengthError):
        made.generate("Is the ferry back?", k=3, max_new_tokens=2)


def test_what_was_precomputed_is_reused():
    made = corpus()
    made.precompute()
    answer = made.generate(QUESTION, k=2, max_new_tokens=4)
    assert answer.hits[0].chunk.document_id == "bridge.md"
    assert (answer.generation.stats.hits, answer.generation.stats.misses) == (2, 0)
    assert answer.text == answer.generation.text


def test_answers_are_those_of_the_wrapper():
    made = corpus()
    answer = made.generate(QUESTION, k=2, max_new_tokens=6)
    chunks = [hit.chunk.text for hit in answer.hits]
    assert made.llm.generate(QUESTION, chunks, max_new_tokens=6).token_ids == answer.generation.token_ids


def test_a_stream_says_the_same():
    made = corpus()
    stream, hits = made.stream(QUESTION, k=2, max_new_tokens=6)
    assert "".join(stream).strip() == made.generate(QUESTION, k=2, max_new_tokens=6).text
    assert len(hits) == 2


@pytest.mark.parametrize("how", ["memory", "disk", "tiered"])
def test_after_an_update_nothing_of_the_old_is_left_in_any_tier(how, tmp_path):
    folder = tmp_path / "kv"
    url = {"memory": "memory://", "disk": f"disk://{folder}", "tiered": f"tiered:memory://|disk://{folder}"}[how]
    made = corpus(store=url)
    made.precompute()
    old = made.llm.keys(texts_of(made, "bridge.md"))
    change = made.update(Document("bridge.md", "Bridge", BRIDGE.text.replace("1931", "1932")))
    assert change.added
    assert change.removed
    for tier in made.llm.store.tiers().values():
        assert not any(key in tier for key in old)
        assert stored(made, "bridge.md", tier) == len(texts_of(made, "bridge.md"))
    assert "1932" in made.search(QUESTION, 1)[0].chunk.text
    made.llm.store.close()


def test_an_update_computes_only_what_is_new():
    said = "Paragraph {} of the report says that the number of boats was {} in the year {}."
    text = "\n\n".join(said.format(n, n * 7, 1900 + n) for n in range(12))
    made = corpus(Document("report.md", "Report", text), lead="packaged")
    made.precompute()
    before = made.llm.store.stats().writes
    change = made.update(Document("report.md", "Report", text.replace("35 in the year", "36 in the year")))
    assert 0 < len(change.added) <= 3
    assert made.llm.store.stats().writes - before == len(change.added)


def test_a_deleted_document_is_gone_but_for_what_others_have():
    shared = [Document(name, name, f"{NOTICE}\n\n{extra.text}") for name, extra in (("a", BRIDGE), ("b", FERRY))]
    made = corpus(*shared, size=24, refresh=1)
    made.precompute()
    texts = {name: set(texts_of(made, name)) for name in "ab"}
    made.delete("a")
    held = {name: [key in made.llm.store for key in made.llm.keys(sorted(texts[name]))] for name in "ab"}
    assert all(held["b"])
    assert held["a"] == [text in texts["b"] for text in sorted(texts["a"])]
    assert texts["a"] & texts["b"]
    assert stored(made, "a") == 0
    assert made.retriever.documents == ["b"]


def test_a_deletion_holds_for_kv_that_a_request_computed():
    made = corpus()
    made.generate(QUESTION, k=1, max_new_tokens=2)
    assert stored(made, "bridge.md") == 1
    made.delete("bridge.md")
    assert stored(made, "bridge.md") == 0


def test_what_is_stale_goes_even_if_the_new_cannot_be_computed(monkeypatch):
    made = corpus()
    made.precompute()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ChunkLibrary, "compute", fail)
    monkeypatch.setattr(ChunkLibrary, "compute_behind", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.update(Document("bridge.md", "Bridge", "The bridge was taken down in 1999, and nobody misses it."))
    assert stored(made, "bridge.md") == 0
    assert made.search("bridge", 1)[0].chunk.text.startswith("The bridge was taken down")


def test_added_documents_are_searched_and_stored():
    made = corpus(FERRY)
    change = made.add([BRIDGE])
    assert stored(made, "bridge.md") == len(change.added) == 1
    assert made.search(QUESTION, 1)[0].chunk.document_id == "bridge.md"


def test_sync_adds_updates_and_deletes():
    made = corpus(BRIDGE, FERRY)
    made.precompute()
    later = Document("ferry.md", "Ferry", "In summer the ferry sails four times a day, whatever the sea is like.")
    change = made.sync([later, KEEPER])
    assert sorted(made.retriever.documents) == ["ferry.md", "keeper.md"]
    assert {chunk.document_id for chunk in change.added} == {"ferry.md", "keeper.md"}
    assert {chunk.document_id for chunk in change.removed} == {"bridge.md", "ferry.md"}
    assert [stored(made, name) for name in ("bridge.md", "ferry.md", "keeper.md")] == [0, 1, 1]
    again = made.sync([later, KEEPER])
    assert (again.added, again.removed) == ((), ())


def test_a_search_brings_kv_near():
    made = corpus(store="tiered:memory://?max_bytes=1MiB|memory://")
    near, far = made.llm.store.tiers().values()
    wrapped(store=far).precompute([chunk.text for chunk in made.retriever.chunks])
    hits = made.search(QUESTION, 2)
    made.llm.store.flush()
    assert all(key in near for key in made.llm.keys([hit.chunk.text for hit in hits]))


def hit(text: str, start: int, document: str = "a") -> Hit:
    return Hit(Chunk(document, start, text, len(text.split()), start, f"{document}{start}"), 1.0)


TEXT = "The first sentence stands here. The second one follows it. The third one is the last of all."


def test_overlapping_chunks_are_said_once():
    made = corpus()
    later, earlier = hit(TEXT[32:], 32), hit(TEXT[:58], 0)
    assert made.passages([later, hit("Another text.", 7, "b"), earlier]) == [
        PromptChunk(TEXT[:58], 0, joins_next=True),
        PromptChunk(TEXT[32:], 58 - 32),
        PromptChunk("Another text."),
    ]
    prompt = made.llm.prompts.build("Why?", made.passages([later, earlier]))
    assert TEXT in made.llm.tokenizer.decode(prompt.token_ids)


def test_three_in_a_row_are_one_run():
    made = corpus()
    parts = [hit(TEXT[:40], 0), hit(TEXT[50:], 50), hit(TEXT[30:60], 30)]
    assert [(each.text, each.skip_chars) for each in made.passages(parts)] == [
        (TEXT[:40], 0),
        (TEXT[30:60], 10),
        (TEXT[50:], 10),
    ]


def test_repeats_and_what_another_says_whole_are_left_out():
    made = corpus()
    assert made.passages([hit(TEXT, 0), hit(TEXT, 0, "b"), hit(TEXT[32:58], 32)]) == [PromptChunk(TEXT)]


def test_overlapping_chunks_reuse_both_kv():
    made = corpus(Document("a", "a", "\n\n".join([TEXT, BRIDGE.text, FERRY.text])), size=32, overlap=12)
    made.precompute()
    answer = made.generate("What stands first?", k=4, max_new_tokens=2)
    stats = answer.generation.stats
    assert any(passage.skip_chars for passage in made.passages(answer.hits))
    assert stats.hits == stats.chunks
    assert stats.reused_tokens > stats.tokens / 3


def test_reorder_puts_chunks_where_they_stood_before():
    made = corpus(reorder=2)
    a, b, c = (hit(document.text, 0, document.id) for document in (BRIDGE, FERRY, KEEPER))
    first = made.passages([a, b, c])
    assert made.passages([b, a, c]) == first
    kept = corpus(reorder=0)
    kept.passages([a, b, c])
    assert [passage.text for passage in kept.passages([b, a, c])] == [FERRY.text, BRIDGE.text, KEEPER.text]


def test_a_negative_tolerance_is_refused():
    with pytest.raises(InputError, match="reorder = -1"):
        corpus(reorder=-1)


def test_a_saved_index_and_a_store_on_disk_go_on_together(tmp_path: Path):
    made = corpus(store=f"disk://{tmp_path}/kv")
    made.precompute()
    made.retriever.save(tmp_path / "index")
    made.llm.store.close()
    llm = wrapped(store=f"disk://{tmp_path}/kv")
    again = Corpus(llm, Retriever.load(tmp_path / "index", llm.tokenizer, embedder()))
    assert again.precompute() == 0
    assert again.generate(QUESTION, k=2, max_new_tokens=2).generation.stats.hits == 2
    again.update(Document("bridge.md", "Bridge", "The bridge was closed in 2001, and is now a museum of bridges."))
    assert stored(again, "bridge.md") == 1
    llm.store.close()


def held(corpus: Corpus, texts: list[str]) -> list[bool]:
    return [key in corpus.llm.store for key in corpus.llm.keys(texts)]


@pytest.mark.parametrize("ahead", [True, False])
def test_the_last_document_that_has_a_text_takes_its_kv_along(ahead):
    made = corpus(Document("a", "a", BRIDGE.text), Document("b", "b", BRIDGE.text), precompute=ahead)
    made.generate(QUESTION, k=2, max_new_tokens=2)
    made.delete("a")
    made.generate(QUESTION, k=2, max_new_tokens=2)
    assert held(made, [BRIDGE.text]) == [True]
    made.delete("b")
    assert held(made, [BRIDGE.text]) == [False]


def test_kv_behind_a_deleted_chunk_go_even_if_its_own_are_gone_already():
    made = corpus(BRIDGE, FERRY, policy="prefix")
    made.generate(QUESTION, k=2, max_new_tokens=2)
    first, *_ = made.passages(made.search(QUESTION, 2))
    name = chunk_name(made.llm.prompts.chunk(first.text))
    for entry in list(made.llm.store.entries()):
        if entry.chunks[:1] == (name,):
            made.llm.store.delete(entry.key)
    assert [entry for entry in made.llm.store.entries() if name in entry.chunks]
    made.delete("bridge.md")
    assert first.text == BRIDGE.text
    assert not [entry for entry in made.llm.store.entries() if name in entry.chunks]


@pytest.mark.parametrize("change", ["update", "delete"])
def test_a_request_that_is_under_way_leaves_nothing_of_what_was_changed(change, monkeypatch):
    made = corpus()
    build = made.llm.prompts.build

    def changed_meanwhile(*args):
        prompt = build(*args)
        if change == "delete":
            made.delete("bridge.md")
        else:
            made.update(Document("bridge.md", "Bridge", "There is no bridge any more, only the ferry goes."))
        return prompt

    monkeypatch.setattr(made.llm.prompts, "build", changed_meanwhile)
    answer = made.generate(QUESTION, k=1, max_new_tokens=2)
    assert answer.generation.stats.misses == 1
    assert held(made, [BRIDGE.text]) == [False]


def test_bad_questions_to_a_corpus_are_refused():
    made = corpus()
    with pytest.raises(InputError, match="k = 0"):
        made.search(QUESTION, 0)
    with pytest.raises(InputError, match="give each an id of its own"):
        made.sync([BRIDGE, BRIDGE])
    assert len(made.retriever.documents) == 3


def test_a_renamed_document_keeps_its_kv():
    made = corpus(lead="packaged")
    made.precompute()
    before = made.llm.store.stats().writes
    made.sync([Document("renamed.md", "Bridge", BRIDGE.text), FERRY, KEEPER])
    assert held(made, [BRIDGE.text]) == [True]
    assert stored(made, "renamed.md") == 1
    assert made.llm.precompute([BRIDGE.text]).computed == 0
    assert made.llm.store.stats().writes - before <= 2  # labels only
