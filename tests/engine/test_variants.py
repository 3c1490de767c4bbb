"""Versions of a chunk: the cheapest is picked, the least worth goes first."""

from __future__ import annotations

import torch

from chunkcache.engine.versions import LEAST_OVERHEAD, Variants
from chunkcache.kv import ChunkKey, ContextAttention

A, B, C = (1, 2), (3, 4), (5, 6)


def context(name):
    return ContextAttention((name,), (1.0,), 1.0, 0.1, 0.1, torch.zeros(2))


def overhead(costs):
    return lambda one: costs[one.chunks[0]]


def names(variants, chunk, candidates):
    """The versions a chunk has, of those whose contexts are named `candidates`."""
    return {
        name
        for name in candidates
        if variants.pick(chunk, lambda one, name=name: 0.0 if one.chunks[0] == name else 0.5)[1] == 0
    }


def test_the_version_of_least_overhead_is_picked():
    variants = Variants()
    assert variants.pick(A, overhead({})) == (None, 1.0)
    for name in "xyz":
        assert variants.add(A, ChunkKey(name), context(name)) == []
    picked, least = variants.pick(A, overhead({"x": 0.5, "y": 0.2, "z": 0.9}))
    assert (picked.key, least) == (ChunkKey("y"), 0.2)
    assert variants.pick(B, overhead({})) == (None, 1.0)


def test_a_use_adds_the_inverse_of_its_overhead():
    variants = Variants()
    variants.add(A, ChunkKey("x"), context("x"))
    picked, _ = variants.pick(A, overhead({"x": 0.5}))
    assert variants.use(picked, 0.5) == 2
    assert variants.use(picked, 0.0) == 1 / LEAST_OVERHEAD
    assert picked.worth == 2 + 1 / LEAST_OVERHEAD


def test_of_too_many_versions_the_one_of_least_worth_goes():
    variants = Variants(versions=2)
    variants.add(A, ChunkKey("x"), context("x"))
    variants.add(A, ChunkKey("y"), context("y"))
    picked, _ = variants.pick(A, overhead({"x": 0.1, "y": 0.5}))
    variants.use(picked, 0.1)
    assert variants.add(A, ChunkKey("z"), context("z")) == [ChunkKey("y")]
    assert names(variants, A, "xyz") == {"x", "z"}


def test_of_too_many_chunks_the_one_used_longest_ago_loses_its_versions():
    variants = Variants(chunks=2)
    variants.add(A, ChunkKey("x"), context("x"))
    variants.add(B, ChunkKey("y"), context("y"))
    variants.pick(A, overhead({"x": 0.1}))
    assert variants.add(C, ChunkKey("z"), context("z")) == [ChunkKey("y")]
    assert names(variants, A, "x") == {"x"}
    assert names(variants, B, "y") == set()


def test_the_same_key_again_replaces_and_a_version_can_be_forgotten():
    variants = Variants(versions=2)
    variants.add(A, ChunkKey("x"), context("x"))
    assert variants.add(A, ChunkKey("x"), context("y")) == []
    assert names(variants, A, "xy") == {"y"}
    variants.forget(A, ChunkKey("x"))
    variants.forget(A, ChunkKey("never there"))
    assert variants.pick(A, overhead({})) == (None, 1.0)
