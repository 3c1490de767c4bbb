"""Where requests go: most of their chunks decide, then the load."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from chunkcache.serve.placement import CHUNKS, ranked, weights_of

IDLE = {"a": 0, "b": 0, "c": 0}


def best(loads=IDLE, who="", **asked):
    return ranked(weights_of(json.dumps(asked).encode(), who), loads)[0]


def test_the_same_chunks_go_to_the_same_replica_in_any_order_and_request():
    for number in range(20):
        documents = [f"{number} {name}" for name in "pqr"]
        first = best(documents=documents, messages=[{"role": "user", "content": "one"}])
        assert best(documents=documents[::-1], messages=[{"role": "user", "content": "another"}]) == first
        assert best(documents=documents, stream=True, temperature=0) == first


def test_chunks_are_spread_and_stay_when_a_replica_goes():
    owners = {number: best(documents=[f"document {number}"]) for number in range(300)}
    counts = Counter(owners.values())
    assert min(counts.values()) > 60
    left = {"a": 0, "b": 0}
    for number, owner in owners.items():
        if owner != "c":
            assert best(left, documents=[f"document {number}"]) == owner


def test_most_of_the_text_decides():
    long, short = "x" * 500, "y" * 10
    owner = best(documents=[long])
    other = next(text for text in (f"{short}{n}" for n in range(100)) if best(documents=[text]) != owner)
    assert best(documents=[other, long]) == owner


def test_tenants_and_salts_are_apart():
    documents = ["the same"]
    assert len({best(documents=documents, cache_salt=str(n)) for n in range(40)}) == 3
    assert len({best(documents=documents, who=str(n)) for n in range(40)}) == 3


def test_parts_with_a_breakpoint_and_indices_are_chunks():
    def said(text, mark, question):
        part = {"type": "text", "text": text, **({"prompt_cache_breakpoint": {}} if mark else {})}
        return weights_of(json.dumps({"messages": [{"role": "user", "content": [part, question]}]}).encode())

    assert said("a chunk", True, "one?") == said("a chunk", True, "another?")
    assert said("a chunk", False, "one?") != said("a chunk", False, "another?")
    rag = [{"rag": {"index": "docs", "k": 3}, "messages": [{"content": text}]} for text in ("one", "another")]
    assert weights_of(json.dumps(rag[0]).encode()) == weights_of(json.dumps(rag[1]).encode())


def test_without_chunks_the_beginning_of_the_text_decides():
    prefix = "p" * 2000
    assert best(prompt=prefix + "one") == best(prompt=prefix + "another")
    assert len({best(prompt=f"{number} {prefix}") for number in range(40)}) == 3


def test_load_decides_where_nothing_else_does_and_bounds_what_does():
    assert ranked({}, {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]
    owner = best(documents=["popular"])
    others = {name: 0 for name in IDLE if name != owner}
    assert best({owner: 1, **others}, documents=["popular"]) == owner
    assert best({owner: 50, **others}, documents=["popular"]) != owner
    assert ranked({b"1": 1}, {}) == []


def test_what_cannot_be_read_is_left_to_the_replica():
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"documents": 3, "messages": [4, {"content": [5]}], "rag": 1}',
        b"\xff",
        b"[" * 100_000,
        b'{"documents": [' + b"[" * 100_000,
    ):
        assert ranked(weights_of(body), IDLE)


@pytest.mark.parametrize("field", ["documents", "cache_salt", "prompt"])
def test_a_body_of_any_depth_is_placed(field):
    for depth in (100, 900, 2_000, 5_000, 20_000, 100_000):  # the deepest are not read, those before not written
        nested = "[" * depth + "]" * depth
        asked = f'{{"{field}": [{nested}]}}' if field == "documents" else f'{{"{field}": {nested}}}'
        assert sorted(ranked(weights_of(asked.encode()), IDLE)) == sorted(IDLE)


def test_a_request_of_very_many_chunks_is_placed_by_the_first_of_them():
    texts = [str(number) for number in range(2 * CHUNKS)]
    weights = weights_of(json.dumps({"documents": texts}).encode())
    assert len(weights) == CHUNKS
    assert weights == weights_of(json.dumps({"documents": texts[:CHUNKS]}).encode())
