"""The memory tier: never over its budget, least recently used out first, and counted to the byte."""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.store import SIZE, key, kv, memory_store

from chunkcache.store import MemoryStore


def held(store, tokens=range(10)):
    return [token for token in tokens if key(token) in store]


def filled(max_entries, count):
    store = memory_store(max_entries * SIZE)
    for token in range(count):
        store.put(key(token), kv(token))
    return store


def test_the_least_recently_used_goes_first():
    store = filled(3, 3)
    store.get(key(0), [0])
    store.put(key(3), kv(3))
    assert held(store) == [0, 2, 3]
    store.put(key(0), kv(0))
    store.put(key(4), kv(4))
    assert held(store) == [0, 3, 4]
    assert store.stats().evictions == 2


def test_looking_whether_it_is_there_is_no_use():
    store = filled(3, 3)
    assert key(0) in store
    store.prefetch([key(0)])
    store.stats()
    store.put(key(3), kv(3))
    assert held(store) == [1, 2, 3]


def test_no_more_is_evicted_than_is_needed():
    store = filled(4, 4)
    store.put(key(7, 8), kv(7, 8))
    assert held(store) == [2, 3]
    assert (store.stats().evictions, store.stats().nbytes) == (2, 4 * SIZE)


def test_an_entry_as_large_as_the_budget_fits_alone():
    store = filled(2, 2)
    assert store.put(key(7, 8), kv(7, 8))
    assert held(store) == []
    assert store.get(key(7, 8), [7, 8]) is not None


def test_an_entry_larger_than_the_budget_is_refused_and_nothing_else_lost(caplog):
    store = filled(2, 2)
    with caplog.at_level(logging.WARNING):
        assert not store.put(key(7, 8, 9), kv(7, 8, 9))
        assert not store.put(key(7, 8, 9), kv(7, 8, 9))
    assert held(store) == [0, 1]
    assert (store.stats().refused, store.stats().writes, store.stats().evictions) == (2, 2, 0)
    [record] = caplog.records
    assert record.getMessage().startswith("a chunk KV of 48 bytes is larger than the budget of 32")
    assert "raise max_bytes" in record.getMessage()


def test_replacing_an_entry_makes_room_for_itself_first():
    store = filled(3, 3)
    store.put(key(2), kv(7, 8))  # the same key with larger KV
    assert held(store) == [1, 2]
    assert store.stats().nbytes == 3 * SIZE
    store.put(key(2), kv(2))
    assert store.stats().nbytes == 2 * SIZE
    assert store.stats().evictions == 1


def test_without_a_budget_everything_is_kept():
    store = MemoryStore()
    for token in range(50):
        store.put(key(token), kv(token))
    assert held(store, range(50)) == list(range(50))
    assert store.stats().max_bytes is None


def test_an_entry_in_use_outlives_its_eviction():
    store = filled(1, 1)
    reading = store.get(key(0), [0])
    store.put(key(1), kv(1))
    assert key(0) not in store
    assert torch.equal(reading.layers[1], kv(0).layers[1])


TOKENS = st.integers(0, 7)


class AgainstModel(RuleBasedStateMachine):
    """Any sequence of calls, against a plain ordered dict of sizes."""

    BUDGET = 10

    def __init__(self):
        super().__init__()
        self.store = memory_store(self.BUDGET * SIZE)
        self.model = OrderedDict()

    @rule(token=TOKENS, length=st.integers(1, 12))
    def put(self, token, length):
        taken = self.store.put(key(token), kv(*[token] * length))
        assert taken == (length <= self.BUDGET)
        if taken:
            self.model.pop(token, None)
            while sum(self.model.values()) + length > self.BUDGET:
                self.model.popitem(last=False)
            self.model[token] = length

    @rule(token=TOKENS)
    def get(self, token):
        length = self.model.get(token, 1)
        got = self.store.get(key(token), [token] * length)
        assert (got is not None) == (token in self.model)
        if got is not None:
            self.model.move_to_end(token)

    @rule(token=TOKENS)
    def get_with_other_tokens(self, token):
        assert self.store.get(key(token), [token] * 13) is None
        self.model.pop(token, None)

    @rule(token=TOKENS)
    def delete(self, token):
        assert self.store.delete(key(token)) == (self.model.pop(token, None) is not None)

    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()

    @invariant()
    def agrees(self):
        stats = self.store.stats()
        assert held(self.store, range(8)) == sorted(self.model)
        assert stats.entries == len(self.model)
        assert stats.nbytes == SIZE * sum(self.model.values()) <= stats.max_bytes


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=40, stateful_step_count=30)


def test_a_budget_of_no_bytes_is_refused_by_every_entry():
    store = memory_store(0)
    assert not store.put(key(1), kv(1))
    assert store.stats().entries == 0


def test_by_worth_the_entry_that_saved_least_goes_first():
    store = memory_store(3 * SIZE, evict="cost")
    for token in range(3):
        store.put(key(token), kv(token))
    store.credit(key(0), 2.0)
    store.credit(key(2), 1.5)
    store.credit(key(2), 1.0)
    store.credit(key(9), 99.0)  # not held
    store.get(key(1), [1])  # used last, and worth nothing
    store.put(key(3), kv(3))
    assert held(store) == [0, 2, 3]
    store.credit(key(3), 2.2)
    store.put(key(4), kv(4))
    assert held(store) == [2, 3, 4]


def test_of_equal_worth_the_least_recently_used_goes_first_and_worth_goes_with_its_entry():
    store = memory_store(2 * SIZE, evict="cost")
    store.put(key(0), kv(0))
    store.put(key(1), kv(1))
    store.credit(key(0), 5.0)
    store.delete(key(0))
    store.put(key(0), kv(0))
    store.get(key(1), [1])
    store.put(key(2), kv(2))
    assert held(store) == [1, 2]
