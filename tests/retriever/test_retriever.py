"""The retriever: a question finds the chunk that answers it, in every mode, also while documents change."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers_tokenizer import tiny_tokenizer

import chunkcache.retriever
from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever.documents import Document
from chunkcache.retriever.embedder import Embedder
from chunkcache.retriever.retriever import MODES, Change, Retriever

FERRY = "The ferry sails to the islands twice a day and carries forty cars."
BREAD = "Knead flour, water, salt and yeast, then bake the loaf for an hour."
COMET = "The comet was first seen by an astronomer through her new telescope."
DOCUMENTS = [Document(name, name, text) for name, text in (("a", FERRY), ("b", BREAD), ("c", COMET))]


class EqualEmbedder:
    """Gives every text the same vector, and notes which it was given."""

    dim = 2

    def __init__(self):
        self.texts = []

    def passages(self, text):
        return text.split()

    def embed(self, texts, *, on_progress=None):
        self.texts += texts
        return np.ones((len(texts), 2), dtype=np.float32)

    def embed_query(self, query):
        return np.ones((1, 2), dtype=np.float32)


@pytest.fixture(scope="module")
def embedder():
    return Embedder()


def build(documents, embedder, **options):
    return Retriever.build(documents, tiny_tokenizer(), embedder=embedder, **options)


def test_the_chunk_that_answers_comes_first(embedder):
    retriever = build(DOCUMENTS, embedder)
    assert [chunk.document_id for chunk in retriever.chunks] == ["a", "b", "c"]
    hits = retriever.search("How is bread made?", k=2)
    assert len(hits) == 2
    assert hits[0].chunk == retriever.chunks[1]
    assert hits[0].score > hits[1].score
    assert retriever.search("Who discovered the comet?", k=1)[0].chunk.text == COMET


def test_scores_are_cosines_bm25_or_fused_ranks(embedder):
    retriever = build(DOCUMENTS, embedder)
    dense, keyword, hybrid = (
        retriever.search("Which ferry sails?", mode=mode) for mode in ("dense", "keyword", "hybrid")
    )
    cosine = float(embedder.embed_query("Which ferry sails?")[0] @ embedder.embed([FERRY])[0])
    assert dense[0].score == pytest.approx(cosine, abs=1e-5)
    assert [hit.chunk.document_id for hit in keyword] == ["a"]
    assert hybrid[0].chunk.document_id == "a"
    assert hybrid[0].score == pytest.approx(2 / 61)
    assert len(dense) == len(hybrid) == 3


def test_the_mode_is_the_retriever_s_unless_the_search_names_one(embedder):
    built = {mode: build(DOCUMENTS, embedder, mode=mode) for mode in MODES}
    for mode in MODES:
        expected = built["hybrid"].search("Which ferry sails?", mode=mode)
        assert built[mode].search("Which ferry sails?") == expected
        assert built["dense"].search("Which ferry sails?", mode=mode) == expected


def test_a_rare_word_is_found_by_hybrid_search_where_vectors_alone_miss_it():
    documents = [Document(str(i), "", f"word number {i} of many") for i in range(20)]
    retriever = build([*documents, Document("x", "", "part QZX-77 is spare")], EqualEmbedder())
    assert retriever.search("QZX-77", k=1, mode="dense")[0].chunk.document_id == "0"
    assert retriever.search("QZX-77", k=1)[0].chunk.document_id == "x"


def test_an_answer_at_the_end_of_a_long_chunk_is_found(embedder):
    filler = "Nothing much happened in the town that year, and the harvest was neither good nor bad. " * 30
    documents = [Document("long", "", filler + COMET), Document("short", "", filler + BREAD)]
    [first, _] = build(documents, embedder, size=4000).search("Who discovered the comet?")
    assert first.chunk.document_id == "long"


def test_every_chunk_is_ranked_once_when_k_is_large(embedder):
    documents = [Document("many", "", f"{FERRY} " * 60), *DOCUMENTS]
    retriever = build(documents, embedder, size=300)
    hits = retriever.search("Where does the ferry go?", k=1000)
    assert len(hits) == len({hit.chunk for hit in hits}) == len(retriever.chunks)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for k in range(1, len(hits)):
        assert retriever.search("Where does the ferry go?", k=k) == hits[:k]


def test_equal_scores_keep_the_order_of_the_chunks():
    documents = [Document(str(i), "", "word " * (1 + i % 3)) for i in range(30)]
    retriever = build(documents, EqualEmbedder())
    assert [hit.chunk.document_id for hit in retriever.search("any", k=7)] == list("0123456")


def test_options_and_progress_are_passed_on(embedder):
    seen = []
    retriever = build(
        DOCUMENTS, embedder, size=16, overlap=4, on_progress=lambda done, total: seen.append((done, total))
    )
    assert max(chunk.tokens for chunk in retriever.chunks) <= 16
    assert seen[-1] == (len(retriever.chunks), len(retriever.chunks))


class Backwards:
    """Prefers what came last, and notes how many it was given."""

    def __init__(self):
        self.given = []

    def scores(self, query, texts):
        self.given.append(len(texts))
        return range(len(texts))


def test_a_reranker_orders_the_candidates_and_its_scores_are_shown():
    documents = [Document(str(i), "", f"word {i}") for i in range(30)]
    reranker = Backwards()
    retriever = build(documents, EqualEmbedder(), mode="dense", reranker=reranker, candidates=10)
    hits = retriever.search("any", k=3)
    assert [(hit.chunk.document_id, hit.score) for hit in hits] == [("9", 9.0), ("8", 8.0), ("7", 7.0)]
    assert [hit.chunk.document_id for hit in retriever.search("any", k=12)][:2] == ["11", "10"]
    assert reranker.given == [10, 12]


PARAGRAPHS = [
    f"{text} This is paragraph number {i} of the story." for i, text in enumerate([FERRY, BREAD, COMET] * 4)
]


def story(*paragraphs, name="s"):
    return Document(name, "Story", "\n\n".join(paragraphs))


def state(retriever):
    """All that a caller can see of it."""
    found = [retriever.search(query, k=99, mode=mode) for mode in MODES for query in ("ferry", "comet story")]
    ids = [[(hit.chunk, round(hit.score, 4)) for hit in hits] for hits in found]
    return retriever.chunks, retriever.documents, ids


def test_an_edited_document_embeds_only_what_changed():
    retriever = build([story(*PARAGRAPHS), *DOCUMENTS], noting := EqualEmbedder(), size=120)
    before = [chunk for chunk in retriever.chunks if chunk.document_id == "s"]
    noting.texts.clear()
    edited = [*PARAGRAPHS]
    edited[5] = edited[5].replace("number", "NUMBER")
    change = retriever.update(story(*edited))
    assert len(before) > 4
    assert 1 <= len(change.added) < len(before) / 2
    assert {chunk.id for chunk in change.kept} | {chunk.id for chunk in change.removed} == {
        chunk.id for chunk in before
    }
    assert " ".join(noting.texts).split() == " ".join(chunk.text for chunk in change.added).split()
    assert retriever.documents == ["s", "a", "b", "c"]
    now = [chunk for chunk in retriever.chunks if chunk.document_id == "s"]
    assert sorted(now, key=lambda chunk: chunk.id) == sorted(change.added + change.kept, key=lambda chunk: chunk.id)
    noting.texts.clear()
    assert retriever.update(story(*edited)) == Change(kept=tuple(now))
    assert noting.texts == []


@pytest.mark.parametrize("index", ["flat", "hnsw", "ivf"])
def test_after_changes_it_is_as_if_it_had_been_built_so(embedder, index):
    retriever = build([story(*PARAGRAPHS), *DOCUMENTS], embedder, size=80, index=index)
    retriever.search("comet")
    added = retriever.add([story(*PARAGRAPHS[3:5], name="t")]).added
    assert {chunk.document_id for chunk in added} == {"t"}
    removed = retriever.delete("b").removed
    assert [chunk.text for chunk in removed] == [BREAD]
    assert retriever.update(Document("a", "", COMET)).removed[0].text == FERRY
    retriever.update(story(*PARAGRAPHS[6:]))
    documents = [story(*PARAGRAPHS[6:]), Document("a", "", COMET), DOCUMENTS[2], story(*PARAGRAPHS[3:5], name="t")]
    fresh = build(documents, embedder, size=80, index=index)
    assert retriever.chunks == fresh.chunks
    assert retriever.documents == fresh.documents == ["s", "a", "c", "t"]
    for mode in MODES:
        ours, theirs = (one.search("Who saw the comet?", k=3, mode=mode) for one in (retriever, fresh))
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
        assert {hit.chunk.document_id for hit in ours} == {hit.chunk.document_id for hit in theirs}


def test_documents_without_text_stay_with_no_chunks(embedder):
    retriever = build([*DOCUMENTS, Document("empty", "", " ")], embedder)
    assert retriever.documents == ["a", "b", "c", "empty"]
    assert retriever.update(Document("b", "", "")).removed[0].text == BREAD
    assert retriever.documents == ["a", "b", "c", "empty"]
    assert [chunk.text for chunk in retriever.chunks] == [FERRY, COMET]
    assert retriever.update(DOCUMENTS[1]).added[0].text == BREAD
    assert [chunk.text for chunk in retriever.chunks] == [FERRY, BREAD, COMET]


def test_an_update_of_an_unknown_document_adds_it(embedder):
    retriever = build(DOCUMENTS[:2], embedder)
    assert retriever.update(DOCUMENTS[2]).added[0].text == COMET
    assert retriever.documents == ["a", "b", "c"]


def test_all_documents_can_go_and_others_come(embedder):
    retriever = build(DOCUMENTS, embedder)
    for name in "abc":
        retriever.delete(name)
    assert retriever.chunks == retriever.documents == []
    for mode in MODES:
        assert retriever.search("ferry", mode=mode) == []
    retriever.add(DOCUMENTS)
    assert retriever.search("ferry", k=1)[0].chunk.text == FERRY


def test_an_id_that_is_there_and_one_that_is_not_are_refused_by_name(embedder):
    retriever = build(DOCUMENTS, embedder)
    before = state(retriever)
    with pytest.raises(InputError, match=r"'b' is there already.*update"):
        retriever.add([Document("d", "", "new"), DOCUMENTS[1]])
    with pytest.raises(InputError, match="'d' is there already"):
        retriever.add([Document("d", "", "new"), Document("d", "", "newer")])
    with pytest.raises(InputError, match=r"no document 'd' to delete.*has 3"):
        retriever.delete("d")
    with pytest.raises(InputError, match="'a' is there already"):
        build([DOCUMENTS[0], DOCUMENTS[0]], embedder)
    assert state(retriever) == before


def test_a_change_whose_embedding_fails_changes_nothing(embedder, monkeypatch):
    retriever = build([story(*PARAGRAPHS), *DOCUMENTS], embedder, size=80)
    before = state(retriever)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(embedder, "embed", fail)
        for change in (
            lambda: retriever.update(story(*PARAGRAPHS[1:], "New.")),
            lambda: retriever.add([story("New")]),
        ):
            with pytest.raises((RuntimeError, InputError)):
                change()
        with pytest.raises(RuntimeError, match="out of memory"):
            retriever.add([Document("d", "", "new")])
    assert state(retriever) == before
    retriever.add([Document("d", "", "new")])
    assert retriever.documents[-1] == "d"


def test_vectors_of_another_length_change_nothing(embedder, monkeypatch):
    retriever = build(DOCUMENTS, embedder)
    with monkeypatch.context() as patch:
        patch.setattr(embedder, "embed", lambda texts, **options: np.ones((len(texts), 3), np.float32))
        with pytest.raises(InputError, match="do not fit an index of dimension"):
            retriever.add([Document("d", "", "new")])
    assert retriever.documents == ["a", "b", "c"]


@pytest.mark.parametrize("mode", MODES)
def test_a_search_during_updates_sees_a_document_before_or_after_never_in_between(mode):
    versions = [[f"ferry {version} one", f"ferry {version} two"] for version in range(2)]
    documents = [[Document("d", "", "\n\n".join(texts)), Document("e", "", "ferry boat")] for texts in versions]
    retriever = build(documents[0], EqualEmbedder(), size=12, mode=mode)
    assert len(retriever.chunks) > 2
    allowed = [{chunk.text for chunk in build(each, EqualEmbedder(), size=12).chunks} for each in documents]
    faults, done = [], threading.Event()

    def look():
        while not done.is_set():
            seen = {hit.chunk.text for hit in retriever.search("ferry one two boat", k=9)}
            if seen not in allowed:
                faults.append(seen)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(150):
        retriever.update(documents[(turn + 1) % 2][0])
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []


def test_the_real_embedder_searches_while_it_embeds(embedder):
    retriever = build(DOCUMENTS, embedder)
    faults, done = [], threading.Event()

    def look():
        while not done.is_set():
            try:
                if retriever.search("How is bread made?", k=1, mode="dense")[0].chunk.text != BREAD:
                    faults.append("another chunk")
            except Exception as error:  # noqa: BLE001 - whatever it is, the test has to show it
                faults.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for turn in range(8):
        retriever.update(Document("a", "", f"{FERRY} It is trip number {turn}. " * 9))
    done.set()
    thread.join()
    assert faults == []


def test_neighbours_are_the_chunks_before_and_behind(embedder):
    retriever = build([story(*PARAGRAPHS), DOCUMENTS[0]], embedder, size=80)
    chunks = [chunk for chunk in retriever.chunks if chunk.document_id == "s"]
    assert retriever.neighbours(chunks[0]) == [chunks[1]]
    assert retriever.neighbours(chunks[2]) == [chunks[1], chunks[3]]
    assert retriever.neighbours(chunks[-1]) == [chunks[-2]]
    assert retriever.neighbours(retriever.chunks[-1]) == []
    retriever.delete("s")
    assert retriever.neighbours(chunks[2]) == []


def test_values_out_of_range_are_refused(embedder):
    for option, wanted in (
        ({"mode": "fast"}, "'fast'.*hybrid"),
        ({"candidates": 0}, "candidates = 0"),
        ({"size": 0}, "size 0"),
    ):
        with pytest.raises(InputError, match=wanted):
            build(DOCUMENTS, embedder, **option)
    with pytest.raises(InputError, match="'tree'"):
        build(DOCUMENTS, embedder, index="tree")
    with pytest.raises(InputError, match="'fast'"):
        build(DOCUMENTS, embedder).search("ferry", mode="fast")


def test_the_default_embedder_is_the_packaged_model():
    assert Retriever.build(DOCUMENTS, tiny_tokenizer()).search("ferry", k=1)[0].chunk.document_id == "a"


@pytest.mark.parametrize("documents", [[], [Document("a", "a", " \n")]])
def test_documents_without_text_are_refused(documents, embedder):
    with pytest.raises(DocumentError, match="no text"):
        build(documents, embedder)


def test_an_empty_query_and_a_k_below_one_are_refused(embedder):
    retriever = build(DOCUMENTS, embedder)
    with pytest.raises(InputError, match=r"query ' ' is empty"):
        retriever.search(" ")
    with pytest.raises(InputError, match="k = 0"):
        retriever.search("ferry", k=0)


def test_the_public_names_are_listed_and_there():
    for name in chunkcache.retriever.__all__:
        assert hasattr(chunkcache.retriever, name)
