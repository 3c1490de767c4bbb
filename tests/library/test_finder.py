"""Chunks are found in any prompt by their token ids, whole, without overlap, and never on a hash's word alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.library.finder import BASE, SEED, SHORT, WINDOW, Match, TokenIndex, window_hashes

quick = settings(deadline=None, max_examples=150)
outside = st.lists(st.integers(0, 20), max_size=60)
few_tokens = st.lists(st.integers(0, 2), max_size=120)


def name_of(token_ids) -> str:
    return str(list(token_ids))


def index_of(*chunks) -> TokenIndex:
    index = TokenIndex()
    for chunk in chunks:
        index.add(name_of(chunk), chunk)
    return index


def match(chunk, start: int, first: int, length: int) -> Match:
    return Match(name_of(chunk), start, first, length)


def hashes(token_ids) -> list[int]:
    return window_hashes(np.asarray(token_ids, dtype=np.uint64)).tolist()


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(100, 100_000), count))


@quick
@given(before=outside, after=outside, chunk=st.lists(st.integers(100, 103), min_size=WINDOW, max_size=90))
def test_a_planted_chunk_is_found_whole(before, after, chunk):
    expected = [match(chunk, len(before), 0, len(chunk))]
    assert index_of(chunk).find([*before, *chunk, *after]) == expected


@quick
@given(before=outside, after=outside, seed=st.integers(0, 999), cut=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_a_chunk_with_other_edges_is_found_as_far_as_it_agrees(before, after, seed, cut):
    chunk, (first, last) = tokens(seed, 95), cut  # what is left always holds a whole anchor
    inner = chunk[first : len(chunk) - last]
    matches = index_of(chunk).find([*before, *inner, *after])
    assert matches == [match(chunk, len(before), first, len(inner))]


@quick
@given(before=outside, after=outside, data=st.data())
def test_every_run_that_is_long_enough_is_found_wherever_in_a_chunk_it_begins(before, after, data):
    length = data.draw(st.integers(WINDOW, 2 * SHORT))
    chunk, least = tokens(length, length), WINDOW if length <= SHORT else WINDOW + SEED
    run = data.draw(st.integers(least, length))
    first = data.draw(st.integers(0, length - run))
    matches = index_of(chunk).find([*before, *chunk[first : first + run], *after])
    assert matches == [match(chunk, len(before), first, run)]


@quick
@given(prompt=few_tokens, chunks=st.lists(few_tokens, max_size=4))
def test_matches_agree_with_the_ids_and_never_overlap(prompt, chunks):
    by_name, end = {name_of(chunk): chunk for chunk in chunks}, 0
    for one in index_of(*chunks).find(prompt):
        stop = one.start + one.length
        assert one.start >= end
        assert one.length >= WINDOW
        assert prompt[one.start : stop] == by_name[one.name][one.first : one.first + one.length]
        end = stop


@quick
@given(order=st.permutations(range(4)), gaps=st.lists(outside, min_size=5, max_size=5))
def test_chunks_are_found_in_any_order(order, gaps):
    chunks = [tokens(seed, 20 + seed) for seed in range(4)]
    prompt, expected = list(gaps[0]), []
    for number, gap in zip(order, gaps[1:], strict=True):
        expected.append(match(chunks[number], len(prompt), 0, len(chunks[number])))
        prompt += [*chunks[number], *gap]
    # tokens of different chunks may coincide, but never a window of them
    assert index_of(*chunks).find(prompt) == expected


def test_a_chunk_is_found_as_often_as_it_stands_there():
    chunk = tokens(0, 40)
    matches = index_of(chunk).find([*chunk, 1, *chunk, *chunk])
    assert [one.start for one in matches] == [0, 41, 81]


def test_the_longest_of_several_is_taken():
    start, end = tokens(0, 30), tokens(1, 30)
    short, long = start, (*start, *end)
    for index in (index_of(short, long), index_of(long, short)):
        assert index.find([7, *start, *end, 7]) == [match(long, 1, 0, 60)]


def test_a_match_does_not_grow_back_into_the_one_before():
    shared, more = tokens(0, 60), tokens(1, 50)
    first, second = shared, (*shared[40:], *more)
    matches = index_of(first, second).find([*shared, *more])
    assert matches == [match(first, 0, 0, 60), match(second, 60, 20, 50)]


@pytest.mark.parametrize(("length", "found"), [(WINDOW - 1, 0), (WINDOW, 1)])
def test_a_window_is_the_shortest_match(length, found):
    chunk = tokens(0, length)
    assert len(index_of(chunk).find(chunk)) == found


@pytest.mark.parametrize("prompt", [(), (1,), tokens(5, 200)])
def test_nothing_is_found_where_nothing_is(prompt):
    assert index_of(tokens(0, 40)).find(prompt) == []
    assert TokenIndex().find(prompt) == []


def test_adding_twice_changes_nothing():
    chunk = tokens(0, 40)
    assert index_of(chunk, chunk).find(chunk) == index_of(chunk).find(chunk)


def colliding(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return other ids with the hash of the first window: + BASE^1 * BASE there is - BASE^2 here."""
    return (token_ids[0] + BASE, token_ids[1] - 1, *token_ids[2:])


def test_a_removed_chunk_is_not_found():
    chunk, other = tokens(1, 40), tokens(2, 40)
    index = index_of(chunk, other)
    index.remove(name_of(chunk))
    index.remove("never known")
    assert index.find([*chunk, *other]) == [match(other, 40, 0, 40)]
    index.add(name_of(chunk), chunk)
    assert index.find(chunk) == [match(chunk, 0, 0, 40)]


def test_a_colliding_prompt_is_no_match():
    chunk = tuple(range(50, 50 + WINDOW))
    prompt = colliding(chunk)
    assert hashes(prompt) == hashes(chunk)
    assert index_of(chunk).find(prompt) == []


def test_a_colliding_chunk_does_not_hide_the_right_one():
    right = tuple(range(50, 50 + WINDOW))
    wrong = colliding(right)
    for index in (index_of(wrong, right), index_of(right, wrong)):
        assert index.find(right) == [match(right, 0, 0, WINDOW)]


@quick
@given(st.lists(st.integers(0, 200_000), min_size=WINDOW, max_size=60))
def test_the_hash_of_a_window_does_not_depend_on_its_place(ids):
    rolled = hashes(ids)
    assert rolled == [hashes(ids[i : i + WINDOW])[0] for i in range(len(rolled))]
