"""The index: exact scores and a stable order in every kind, growth, removal, files, and refusals that say why."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever import index as module
from chunkcache.retriever.index import VectorIndex

KINDS = ("flat", "hnsw", "ivf")


def unit(count, dim=8, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(vectors, kind="flat", first=0):
    vectors = np.asarray(vectors, dtype=np.float32)
    index = VectorIndex(vectors.shape[1], kind)
    index.add(range(first, first + len(vectors)), vectors)
    return index


def best(vectors, ids, queries, k):
    """Ids and scores by brute force, ties by id."""
    scores = queries @ vectors.T
    order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.asarray(ids)[order]


def agrees(index, vectors, ids, k=5):
    scores, found = index.search(unit(4, seed=9), k)
    expected, wanted = best(vectors, ids, unit(4, seed=9), k)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_inner_products_best_first_under_the_ids_given(kind):
    vectors, ids = unit(60), np.random.default_rng(1).permutation(1000)[:60]
    index = VectorIndex(8, kind)
    index.add(ids[:20], vectors[:20])
    index.add(ids[20:], vectors[20:])
    assert len(index) == 60
    assert index.ids() == set(ids.tolist())
    agrees(index, vectors, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_removed_is_not_found_and_its_id_can_be_used_again(kind):
    vectors, ids = unit(60), np.arange(60)
    index = filled(vectors, kind)
    index.remove(range(0, 60, 5))
    left = ids % 5 > 0
    assert len(index) == 48
    agrees(index, vectors[left], ids[left], k=48)
    index.add([5], vectors[:1])
    agrees(index, np.concatenate([vectors[left], vectors[:1]]), np.append(ids[left], 5))
    index.remove(index.ids())
    assert index.search(vectors[:2], 3)[1].shape == (2, 0)
    index.add([7], vectors[:1])
    assert index.search(vectors[:1], 3)[1].tolist() == [[7]]


def test_a_graph_is_built_again_when_more_than_a_quarter_of_it_is_dead():
    index = filled(unit(80), "hnsw")
    index.remove(range(20))
    assert index._index.ntotal == 80
    index.remove([20])
    assert index._index.ntotal == 59
    agrees(index, unit(80)[21:], np.arange(21, 80))


def test_an_index_becomes_the_kind_that_suits_its_size(monkeypatch):
    monkeypatch.setattr(module, "HNSW_FROM", 20)
    monkeypatch.setattr(module, "IVF_FROM", 50)
    index, vectors, seen = VectorIndex(8), unit(70), []
    for start in range(0, 70, 10):
        index.add(range(start, start + 10), vectors[start : start + 10])
        seen.append(index.kind)
        agrees(index, vectors[: start + 10], np.arange(start + 10))
    assert seen == ["flat", "hnsw", "hnsw", "hnsw", "ivf", "ivf", "ivf"]


def test_cells_are_learnt_again_when_there_are_four_times_as_many_vectors(monkeypatch):
    monkeypatch.setattr(module, "_VECTORS_PER_CELL", 10)
    index = filled(unit(20), "ivf")
    assert index._index.nlist == 2
    index.add(range(20, 80), unit(60, seed=1))
    assert index._index.nlist == 2
    index.add([80], unit(1, seed=2))
    assert index._index.nlist == 8


@pytest.mark.parametrize(("kind", "k"), [*product(KINDS, (1, 3)), ("flat", 40), ("ivf", 40)])  # a graph may miss some
def test_equal_scores_come_in_the_order_of_ids(kind, k):
    index = filled([[1, 0]] * 20 + [[2, 0]] + [[1, 0]] * 20, kind)
    _, ids = index.search(np.array([[1, 0]], dtype=np.float32), k)
    assert ids[0].tolist() == [20, *range(20), *range(21, 41)][:k]


def test_k_is_clipped_to_the_size():
    query = np.ones((2, 3), dtype=np.float32)
    scores, ids = filled([[1, 2, 3]]).search(query, 10)
    assert scores.tolist() == [[6], [6]]
    assert ids.tolist() == [[0], [0]]
    assert [part.shape for part in VectorIndex(3).search(query, 10)] == [(2, 0), (2, 0)]


def test_what_an_approximate_search_misses_is_filled_up(monkeypatch):
    monkeypatch.setattr(module, "_VECTORS_PER_CELL", 10)
    monkeypatch.setattr(module, "_LEAST_PROBED", 1)
    index = filled(np.repeat(np.eye(8, dtype=np.float32), 10, axis=0), "ivf")
    scores, ids = index.search(np.eye(8, dtype=np.float32)[:1], 30)
    assert ids[0].tolist() == [*range(10), *[-1] * 20]
    assert scores[0].tolist() == [1.0] * 10 + [-np.inf] * 20


def test_other_float_types_and_strides_are_taken():
    index = VectorIndex(2)
    index.add([3, 4], np.array([[1, 0], [0, 1]], dtype=np.float64)[:, ::-1])
    assert index.search(np.array([[1, 0]], dtype=np.float16), 1)[1].tolist() == [[4]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_add_that_fails_in_the_middle_adds_nothing(kind, monkeypatch):
    monkeypatch.setattr(module, "_SLICE", 4)
    index = filled(unit(20), kind)
    add, calls = index._index.add_with_ids, []

    def fail_later(vectors, ids):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(vectors, ids)

    monkeypatch.setattr(index._index, "add_with_ids", fail_later)
    with pytest.raises(KeyboardInterrupt):
        index.add(range(20, 40), unit(20, seed=1))
    monkeypatch.undo()
    assert calls == [4, 4, 4]
    assert index.ids() == set(range(20))
    agrees(index, unit(20), np.arange(20))
    index.add(range(20, 40), unit(20, seed=1))
    agrees(index, np.concatenate([unit(20), unit(20, seed=1)]), np.arange(40))


def test_threads_search_while_another_grows_and_shrinks_it(monkeypatch):
    monkeypatch.setattr(module, "HNSW_FROM", 300)
    monkeypatch.setattr(module, "IVF_FROM", 600)
    vectors = unit(900)
    index, faults, done = filled(vectors[:10]), [], threading.Event()

    def look():
        while not done.is_set():
            scores, ids = index.search(vectors[:1], 3)
            if ids[0, 0] != 0 or abs(scores[0, 0] - 1) > 1e-5:
                faults.append((ids, scores))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(10, 890, 20):
        index.add(range(start, start + 20), vectors[start : start + 20])
        index.remove([start, start + 1])
    done.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(index) == 10 + 44 * 18


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_is_the_same_when_it_is_loaded_and_can_change(tmp_path, kind, mmap):
    vectors = unit(60)
    index = filled(vectors, kind)
    index.remove([0, 7])
    facts = json.loads(json.dumps(index.save(tmp_path / "v")))
    before = (tmp_path / "v").read_bytes()
    loaded = VectorIndex.load(tmp_path / "v", facts, mmap)
    alive = np.setdiff1d(np.arange(60), [0, 7])
    assert (loaded.kind, len(loaded), loaded.ids()) == (kind, 58, set(alive.tolist()))
    agrees(loaded, vectors[alive], alive)
    again = loaded.save(tmp_path / "again")
    agrees(VectorIndex.load(tmp_path / "again", again), vectors[alive], alive)
    loaded.add([0], vectors[:1])
    loaded.remove([59])
    now = np.append(alive[:-1], 0)
    agrees(loaded, vectors[now], now)
    assert (tmp_path / "v").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_mapped_index_costs_no_memory_of_its_own(tmp_path):
    facts = {kind: filled(unit(3000, 64), kind).save(tmp_path / kind) for kind in KINDS}
    for kind in KINDS:
        loaded = VectorIndex.load(tmp_path / kind, facts[kind])
        assert str(tmp_path / kind) in Path("/proc/self/maps").read_text()
        loaded.add([9999], unit(1, 64, seed=1))
        assert str(tmp_path / kind) not in Path("/proc/self/maps").read_text()


def test_an_empty_index_is_saved_too(tmp_path):
    for kind in ("auto", *KINDS):
        loaded = VectorIndex.load(tmp_path / kind, VectorIndex(8, kind).save(tmp_path / kind))
        loaded.add(range(60), unit(60))
        agrees(loaded, unit(60), np.arange(60))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "v"
    return path, filled(unit(60), "hnsw").save(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 9},
        {"dim": "8"},
        {"dim": True},
        {"dim": -1},
        {"dim": 10**20},
        {"vectors": 61},
        {"vectors": 59},
        {"vectors": 10**12},
        {"kind": "flat"},
        {"kind": "auto"},
        {"wanted": "tree"},
        {"dead": [99]},
        {"dead": ["x"]},
        {"dead": [10**30]},
        {"sha256": "0" * 64},
        {"bytes": 5},
        {"built_for": None},
    ],
    ids=str,
)
def test_facts_that_do_not_fit_are_refused(saved, wrong):
    path, facts = saved
    with pytest.raises(DocumentError, match="build the index again"):
        VectorIndex.load(path, facts | wrong)
    VectorIndex.load(path, facts)


def test_faiss_is_never_shown_a_file_that_has_changed(saved, tmp_path, monkeypatch):
    path, facts = saved
    copy = tmp_path / "v"
    content = path.read_bytes()
    monkeypatch.setattr(module.faiss, "read_index", lambda *args: pytest.fail("faiss was shown the file"))
    for bad in (b"", content[:-1], content + b"\0", content[:99] + b"\xff" + content[100:]):
        copy.write_bytes(bad)
        with pytest.raises(DocumentError, match="not the file that was saved"):
            VectorIndex.load(copy, facts)
    copy.unlink()
    with pytest.raises(DocumentError, match="No such file"):
        VectorIndex.load(copy, facts)
    with pytest.raises(DocumentError, match=r"'dim'"):
        VectorIndex.load(path, {})


def test_another_kind_of_file_with_matching_facts_is_refused(saved, tmp_path):
    (tmp_path / "v").write_bytes(b"nothing that faiss knows" * 100)
    facts = saved[1] | module.digest(tmp_path / "v")
    with pytest.raises(DocumentError, match="build the index again"):
        VectorIndex.load(tmp_path / "v", facts)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (4,)])
def test_a_dimension_that_does_not_fit_is_refused(shape):
    index = VectorIndex(4)
    with pytest.raises(InputError, match=r"do not fit an index of dimension 4: give \[n, 4\]"):
        index.add([0], np.zeros(shape, dtype=np.float32))
    with pytest.raises(InputError, match="do not fit an index of dimension 4"):
        index.search(np.zeros(shape, dtype=np.float32), 1)


@pytest.mark.parametrize("ids", [[0, 9], [9, 9], [9, -1]])
def test_ids_that_are_not_new_are_refused(ids):
    index = filled(unit(3))
    with pytest.raises(InputError, match="each id has to be new"):
        index.add(ids, unit(2))
    with pytest.raises(InputError, match="1 ids for 2 vectors"):
        index.add([9], unit(2))
    assert index.ids() == {0, 1, 2}


def test_removing_what_is_not_there_is_refused_and_removes_nothing():
    index = filled(unit(3))
    with pytest.raises(InputError, match="no vector 3"):
        index.remove([0, 3])
    assert len(index) == 3


def test_k_below_one_and_an_unknown_kind_are_refused():
    with pytest.raises(InputError, match="k = 0"):
        filled([[1.0]]).search(np.ones((1, 1), dtype=np.float32), 0)
    with pytest.raises(InputError, match=r"'tree'.*auto, flat, hnsw, ivf"):
        VectorIndex(4, "tree")
