"""The index: exact scores, a stable order, and refusals that name the shapes."""

from __future__ import annotations

import numpy as np
import pytest

from chunkcache.errors import InputError
from chunkcache.retriever.index import FlatIndex


def filled(vectors):
    index = FlatIndex(len(vectors[0]))
    index.add(np.asarray(vectors, dtype=np.float32))
    return index


def test_scores_are_inner_products_best_first():
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    index = FlatIndex(8)
    index.add(vectors[:20])
    index.add(vectors[20:])
    scores, positions = index.search(queries, 5)
    expected = queries @ vectors.T
    assert len(index) == 50
    np.testing.assert_array_equal(positions, np.argsort(-expected, axis=1)[:, :5])
    np.testing.assert_allclose(scores, np.take_along_axis(expected, positions, axis=1), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_equal_scores_come_in_the_order_of_positions(k):
    index = filled([[1, 0]] * 20 + [[2, 0]] + [[1, 0]] * 20)
    _, positions = index.search(np.array([[1, 0]], dtype=np.float32), k)
    assert positions[0].tolist() == [20, *range(20), *range(21, 41)][:k]


def test_k_is_clipped_to_the_size():
    query = np.ones((2, 3), dtype=np.float32)
    scores, positions = filled([[1, 2, 3]]).search(query, 10)
    assert scores.tolist() == [[6], [6]]
    assert positions.tolist() == [[0], [0]]
    assert [part.shape for part in FlatIndex(3).search(query, 10)] == [(2, 0), (2, 0)]


def test_other_float_types_and_strides_are_taken():
    index = FlatIndex(2)
    index.add(np.array([[1, 0], [0, 1]], dtype=np.float64)[:, ::-1])
    assert index.search(np.array([[1, 0]], dtype=np.float16), 1)[1].tolist() == [[1]]


@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (4,)])
def test_a_dimension_that_does_not_fit_is_refused(shape):
    index = FlatIndex(4)
    with pytest.raises(InputError, match=r"do not fit an index of dimension 4: give \[n, 4\]"):
        index.add(np.zeros(shape, dtype=np.float32))
    with pytest.raises(InputError, match="do not fit an index of dimension 4"):
        index.search(np.zeros(shape, dtype=np.float32), 1)


def test_k_below_one_is_refused():
    with pytest.raises(InputError, match="k = 0"):
        filled([[1.0]]).search(np.ones((1, 1), dtype=np.float32), 0)
