"""Chunks are found in any prompt by their token ids, whole, without overlap, and never on a hash's word alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.kv import ChunkKey
from chunkcache.library.finder import _BASE, WINDOW, Finder, Known, Match, _window_hashes

quick = settings(deadline=None, max_examples=150)
outside = st.lists(st.integers(0, 20), max_size=60)
few_tokens = st.lists(st.integers(0, 2), max_size=120)


def known(*token_ids: int) -> Known:
    return Known(ChunkKey.of("model", (), token_ids), token_ids, ())


def named(name: str, token_ids: tuple[int, ...], *context: int) -> Known:
    return Known(ChunkKey.of("model", context, token_ids), token_ids, context, name)


def finder(*chunks: Known) -> Finder:
    index = Finder()
    for chunk in chunks:
        index.add(chunk)
    return index


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(100, 100_000), count))


@quick
@given(before=outside, after=outside, chunk=st.lists(st.integers(100, 103), min_size=WINDOW, max_size=90))
def test_a_planted_chunk_is_found_whole(before, after, chunk):
    planted = known(*chunk)
    expected = [Match(planted, len(before), 0, len(chunk))]
    assert finder(planted).find([*before, *chunk, *after]) == expected


@quick
@given(before=outside, after=outside, seed=st.integers(0, 999), cut=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_a_chunk_with_other_edges_is_found_as_far_as_it_agrees(before, after, seed, cut):
    chunk, (first, last) = tokens(seed, 95), cut  # what is left always holds a whole anchor
    inner = chunk[first : len(chunk) - last]
    matches = finder(known(*chunk)).find([*before, *inner, *after])
    assert matches == [Match(known(*chunk), len(before), first, len(inner))]


@quick
@given(prompt=few_tokens, chunks=st.lists(few_tokens, max_size=4))
def test_matches_agree_with_the_ids_and_never_overlap(prompt, chunks):
    end = 0
    for match in finder(*(known(*chunk) for chunk in chunks)).find(prompt):
        stop = match.start + match.length
        assert match.start >= end
        assert match.length >= WINDOW
        assert tuple(prompt[match.start : stop]) == match.known.token_ids[match.first : match.first + match.length]
        end = stop


@quick
@given(order=st.permutations(range(4)), gaps=st.lists(outside, min_size=5, max_size=5))
def test_chunks_are_found_in_any_order(order, gaps):
    chunks = [known(*tokens(seed, 20 + seed)) for seed in range(4)]
    prompt, expected = list(gaps[0]), []
    for number, gap in zip(order, gaps[1:], strict=True):
        expected.append(Match(chunks[number], len(prompt), 0, len(chunks[number].token_ids)))
        prompt += [*chunks[number].token_ids, *gap]
    # tokens of different chunks may coincide, but never a window of them
    assert finder(*chunks).find(prompt) == expected


def test_a_chunk_is_found_as_often_as_it_stands_there():
    chunk = known(*tokens(0, 40))
    matches = finder(chunk).find([*chunk.token_ids, 1, *chunk.token_ids, *chunk.token_ids])
    assert [match.start for match in matches] == [0, 41, 81]


def test_the_longest_of_several_is_taken():
    start, end = tokens(0, 30), tokens(1, 30)
    short, long = known(*start), known(*start, *end)
    for index in (finder(short, long), finder(long, short)):
        assert index.find([7, *start, *end, 7]) == [Match(long, 1, 0, 60)]


def test_a_match_does_not_grow_back_into_the_one_before():
    shared, more = tokens(0, 60), tokens(1, 50)
    first, second = known(*shared), known(*shared[40:], *more)
    matches = finder(first, second).find([*shared, *more])
    assert matches == [Match(first, 0, 0, 60), Match(second, 60, 20, 50)]


@pytest.mark.parametrize(("length", "found"), [(WINDOW - 1, 0), (WINDOW, 1)])
def test_a_window_is_the_shortest_match(length, found):
    chunk = known(*tokens(0, length))
    assert len(finder(chunk).find(chunk.token_ids)) == found


@pytest.mark.parametrize("prompt", [(), (1,), tokens(5, 200)])
def test_nothing_is_found_where_nothing_is(prompt):
    assert finder(known(*tokens(0, 40))).find(prompt) == []
    assert Finder().find(prompt) == []


def test_adding_twice_changes_nothing():
    chunk = known(*tokens(0, 40))
    assert finder(chunk, chunk).find(chunk.token_ids) == finder(chunk).find(chunk.token_ids)


def colliding(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return other ids with the hash of the first window: + BASE^1 * BASE there is - BASE^2 here."""
    return (token_ids[0] + _BASE, token_ids[1] - 1, *token_ids[2:])


def test_a_forgotten_chunk_is_not_found_in_any_context():
    ids = tokens(1, 40)
    other = named("other", tokens(2, 40))
    index = finder(named("one", ids), named("one", ids, 7), other)
    index.forget("one")
    index.forget("never known")
    assert index.find([*ids, *other.token_ids]) == [Match(other, 40, 0, 40)]
    index.clear()
    assert index.find(other.token_ids) == []
    index.add(other)
    assert index.find(other.token_ids) == [Match(other, 0, 0, 40)]


def test_a_colliding_prompt_is_no_match():
    chunk = known(*range(50, 50 + WINDOW))
    prompt = colliding(chunk.token_ids)
    assert _window_hashes(prompt).tolist() == _window_hashes(chunk.token_ids).tolist()
    assert finder(chunk).find(prompt) == []


def test_a_colliding_chunk_does_not_hide_the_right_one():
    right = known(*range(50, 50 + WINDOW))
    wrong = Known(ChunkKey("0" * 64), colliding(right.token_ids), ())
    for index in (finder(wrong, right), finder(right, wrong)):
        assert index.find(right.token_ids) == [Match(right, 0, 0, WINDOW)]


@quick
@given(st.lists(st.integers(0, 200_000), min_size=WINDOW, max_size=60))
def test_the_hash_of_a_window_does_not_depend_on_its_place(ids):
    rolled = _window_hashes(ids).tolist()
    assert rolled == [_window_hashes(ids[i : i + WINDOW]).tolist()[0] for i in range(len(rolled))]
