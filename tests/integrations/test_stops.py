"""Stop strings, and white space round an answer: the same whole and in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import InputError
from chunkcache.integrations.stops import cut, listed, stripped, until

FEW = st.text("ab\n ", max_size=12)  # few letters, so that stop strings occur, overlap and almost occur


@pytest.mark.parametrize(
    ("text", "stops", "before"),
    [
        ("one\nQ: two", ["\nQ:"], "one"),
        ("one two", "two", "one "),
        ("one two", [], "one two"),
        ("one two", None, "one two"),
        ("one", ["three"], "one"),
        ("stop", ["stop"], ""),
        ("xabc", ["b", "xabc"], "xa"),  # the one that ends first
        ("xabc", ["c", "abc"], "x"),  # of two that end together the longer
    ],
)
def test_a_text_ends_before_its_first_stop_string(text, stops, before):
    assert cut(text, stops) == before
    assert "".join(until(list(text), stops)) == before


@given(st.lists(FEW, max_size=8), st.lists(st.text("ab\n ", min_size=1, max_size=4), max_size=3))
def test_where_a_text_is_divided_makes_no_difference(pieces, stops):
    ready = list(until(pieces, stops))
    assert "".join(ready) == cut("".join(pieces), stops)
    assert all(ready) or not stops


@given(st.lists(FEW, max_size=8))
def test_stripped_pieces_are_the_stripped_text(pieces):
    ready = list(stripped(pieces))
    assert "".join(ready) == "".join(pieces).strip()
    assert all(ready)


def test_only_what_may_be_a_beginning_is_held_back():
    given_so_far = []

    def pieces():
        for piece in ("The end", " of ", "the", " en", "try"):
            given_so_far.append(piece)
            yield piece

    seen = [(piece, len(given_so_far)) for piece in until(pieces(), ["the end"])]
    assert seen == [("The end", 1), (" of ", 2), ("the entry", 5)]


class Source:
    """An iterator that says whether it was closed, and how far it got."""

    def __init__(self, *pieces):
        self.pieces, self.taken, self.closed = list(pieces), 0, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == len(self.pieces):
            raise StopIteration
        self.taken += 1
        return self.pieces[self.taken - 1]

    def close(self):
        self.closed += 1


def test_at_a_stop_string_the_source_is_closed_and_read_no_further():
    source = Source("a", "STOP", "b")
    assert list(until(source, ["STOP"])) == ["a"]
    assert (source.taken, source.closed) == (2, 1)


def test_who_stops_listening_closes_the_source():
    source = Source("a", "b")
    pieces = until(source, ["STOP"])
    assert next(pieces) == "a"
    pieces.close()
    assert (source.taken, source.closed) == (1, 1)


@pytest.mark.parametrize("stops", ["", ["a", ""], [None], [7]])
def test_an_empty_stop_string_is_refused_at_the_call(stops):
    if stops == "":
        stops = [stops]
    with pytest.raises(InputError, match="a stop string is"):
        listed(stops)
    with pytest.raises(InputError, match="a stop string is"):
        cut("text", stops)
    with pytest.raises(InputError, match="a stop string is"):
        until([], stops)
