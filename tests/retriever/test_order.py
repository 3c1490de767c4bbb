"""The order of chunks: as near to one served before as the tolerance allows, and no nearer."""

from __future__ import annotations

import threading
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.errors import InputError
from chunkcache.retriever.order import ServedOrders, distinct

NAMES = st.lists(st.sampled_from("abcdef"), max_size=6)


def agreement(order, served):
    """Return how many names two sequences begin alike with."""
    same = 0
    for one, other in zip(order, served, strict=False):
        if one != other:
            break
        same += 1
    return same


def by_brute_force(names, served, tolerance):
    allowed = [
        order
        for order in permutations(range(len(names)))
        if all(abs(place - index) <= tolerance for place, index in enumerate(order))
    ]
    return min(
        allowed,
        key=lambda order: (-max((agreement([names[i] for i in order], each) for each in served), default=0), order),
    )


@settings(max_examples=400)
@given(names=NAMES, served=st.lists(NAMES, max_size=6), tolerance=st.integers(0, 6))
def test_it_is_the_order_that_agrees_longest_within_the_tolerance(names, served, tolerance):
    orders = ServedOrders()
    for each in served:
        orders.record(each)
    arranged = orders.arrange(names, tolerance)
    expected = by_brute_force(names, served, tolerance) if tolerance else tuple(range(len(names)))
    assert tuple(arranged) == expected


@settings(max_examples=100)
@given(names=st.permutations(range(30)), served=st.permutations(range(30)), tolerance=st.integers(0, 30))
def test_long_lists_stay_within_the_tolerance_too(names, served, tolerance):
    orders = ServedOrders()
    orders.record(served)
    arranged = orders.arrange(names, tolerance)
    assert sorted(arranged) == list(range(30))
    assert all(abs(place - index) <= tolerance for place, index in enumerate(arranged))
    if tolerance == 30:
        assert [names[i] for i in arranged] == served


def test_an_order_served_before_is_taken_up_again():
    orders = ServedOrders()
    orders.record(["a", "b", "c"])
    assert orders.arrange(["b", "a", "d", "c"], 0) == [0, 1, 2, 3]
    assert orders.arrange(["b", "a", "d", "c"], 1) == [1, 0, 3, 2]
    assert orders.arrange(["d", "b", "a", "c"], 1) == [0, 1, 2, 3]  # "a" would have to move two places
    assert orders.arrange(["d", "b", "a", "c"], 2) == [2, 1, 0, 3]
    assert orders.arrange(["x", "y"], 5) == [0, 1]
    assert orders.arrange([], 5) == []


def test_repeats_keep_their_order():
    orders = ServedOrders()
    orders.record(["a", "a", "b"])
    assert orders.arrange(["b", "a", "a"], 2) == [1, 2, 0]


def test_orders_behind_something_else_are_others():
    orders = ServedOrders()
    orders.record(["a", "b"], behind="one system prompt")
    assert orders.arrange(["b", "a"], 1) == [0, 1]
    assert orders.arrange(["b", "a"], 1, behind="another") == [0, 1]
    assert orders.arrange(["b", "a"], 1, behind="one system prompt") == [1, 0]


def nodes(node):
    return 1 + sum(map(nodes, node.children.values()))


@settings(max_examples=100)
@given(served=st.lists(NAMES, max_size=30), limit=st.integers(1, 4))
def test_what_was_served_longest_ago_is_forgotten_without_a_trace(served, limit):
    orders, last = ServedOrders(limit), ServedOrders()
    kept = []
    for each in filter(None, served):
        orders.record(each)
        kept = [*(other for other in kept if other != each), each][-limit:]
    for each in kept:
        last.record(each)
    assert len(orders) == len(kept)
    assert nodes(orders._root) == nodes(last._root)
    for each in kept:
        names = sorted(each)
        assert orders.arrange(names, 6) == last.arrange(names, 6)


def test_threads_may_record_and_arrange_at_once():
    orders = ServedOrders(limit=8)
    failed = []

    def work(seed):
        try:
            for i in range(300):
                names = [f"{(seed * i + j) % 11}" for j in range(5)]
                orders.record(names)
                assert sorted(orders.arrange(names[::-1], 4)) == [0, 1, 2, 3, 4]
        except Exception as error:  # noqa: BLE001 - whatever it is, the test has to see it
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(orders) == 8


def test_values_out_of_range_are_refused():
    with pytest.raises(InputError, match="limit=0"):
        ServedOrders(limit=0)
    with pytest.raises(InputError, match="tolerance=-1"):
        ServedOrders().arrange(["a"], -1)


def test_what_repeats_or_is_contained_is_left_out():
    assert distinct(["a b", "c"]) == [0, 1]
    assert distinct([" a b ", "a b", "c"]) == [0, 2]
    assert distinct(["b", "a b c", "x"]) == [1, 2]
    assert distinct(["", "a", " "]) == [0, 1]
    assert distinct([]) == []


@settings(max_examples=200)
@given(texts=st.lists(st.text("ab ", max_size=4), max_size=7))
def test_nothing_is_lost_by_leaving_out(texts):
    kept = distinct(texts)
    assert kept == sorted(kept)
    left = [texts[i].strip() for i in kept]
    assert len(set(left)) == len(left)
    assert all(any(text.strip() in other for other in left) for text in texts)
    assert not any(one and one != other and one in other for one in left for other in left)
