"""The arena: slots never overlap, take what they are asked for, and come back when nobody sees them any more."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chunkcache.store.arena import Arena

KIB = 2**10


def plain_memory(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)


def arena(capacity, block_bytes=64 * KIB):
    return Arena(capacity, plain_memory, block_bytes)


def test_slots_are_exact_and_cut_out_of_few_blocks():
    asked = []
    made = Arena(256 * KIB, lambda nbytes: asked.append(nbytes) or plain_memory(nbytes), 64 * KIB)
    slots = [made.take([2460])[0] for _ in range(50)]
    assert {len(slot) for slot in slots} == {2460}
    assert asked == [64 * KIB] * 2  # torch would lock 50 x 4 KiB: more than three
    assert made.locked - made.free == 50 * 2560


def test_a_slot_is_taken_back_when_its_last_view_has_gone():
    made = arena(64 * KIB)
    [slot] = made.take([4 * KIB])
    view = slot[100:200].view(torch.float32)
    del slot
    assert made.free == made.locked - 4 * KIB
    view.fill_(1.0)
    del view
    assert made.free == made.locked


def test_gaps_next_to_each_other_become_one():
    made = arena(64 * KIB)
    slots = [made.take([16 * KIB])[0] for _ in range(4)]
    slots[1] = slots[2] = None
    [both] = made.take([32 * KIB])
    assert made.locked == 64 * KIB
    assert (len(both), made.free) == (32 * KIB, 0)


def test_what_does_not_fit_takes_nothing():
    made = arena(64 * KIB)
    assert made.take([60 * KIB, 60 * KIB, 60 * KIB]) is None  # two blocks: the capacity, and one more
    assert made.free == made.locked == 128 * KIB
    assert made.take([65 * KIB]) is None  # larger than a block


def test_a_small_capacity_locks_a_small_block():
    made = Arena(1000, plain_memory)
    assert made.take([1000]) is not None
    assert made.locked == 1024


def test_where_the_system_gives_no_memory_it_is_not_asked_again():
    asked = []
    made = Arena(256 * KIB, asked.append, 64 * KIB)
    assert made.take([1]) is None
    assert made.take([1]) is None
    assert len(asked) == 1


class Slots(RuleBasedStateMachine):
    """Slots taken and let go in any order keep what was written to them."""

    def __init__(self):
        super().__init__()
        self.arena = arena(128 * KIB, 32 * KIB)
        self.slots = []

    @rule(sizes=st.lists(st.integers(1, 20 * KIB), min_size=1, max_size=4))
    def take(self, sizes):
        taken = self.arena.take(sizes)
        for slot in taken or ():
            fill = len(self.slots) % 251
            slot.fill_(fill)
            self.slots.append((slot, fill))

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def let_go(self, data):
        self.slots.pop(data.draw(st.integers(0, len(self.slots) - 1)))

    @invariant()
    def what_was_written_is_there(self):
        assert all(bool((slot == fill).all()) for slot, fill in self.slots)

    @invariant()
    def nothing_is_lost(self):
        held = sum(-(-len(slot) // 256) * 256 for slot, _ in self.slots)
        assert self.arena.locked - self.arena.free == held

    def teardown(self):
        self.slots.clear()
        assert self.arena.free == self.arena.locked
        assert all(len(block.gaps) == 1 for block in self.arena._blocks)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=40, stateful_step_count=30)
