"""A layer with room: whatever is done to it, it holds what a layer without room would hold."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from chunkcache.blend.growing import ROOM, GrowingLayer

HEADS, DIM = 2, 4


def tokens(count, batch=1):
    return torch.randn(batch, HEADS, count, DIM), torch.randn(batch, HEADS, count, 2 * DIM)


class Pair:
    """A layer with room and one without, to which the same is done."""

    def __init__(self, count=10):
        self.layers = [GrowingLayer(), DynamicLayer()]
        keys, values = tokens(count)
        for layer in self.layers:
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values

    def step(self, count=1, batch=1):
        fresh = tokens(count, batch)
        got, wanted = (layer.update(*fresh) for layer in self.layers)
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours, theirs)

    def do(self, name, *args):
        for layer in self.layers:
            getattr(layer, name)(*args)
        assert self.layers[0].get_seq_length() == self.layers[1].get_seq_length()

    @property
    def place(self):
        return self.layers[0].keys.data_ptr()


def test_steps_fill_the_room_and_nothing_is_copied():
    pair = Pair()
    pair.step()
    place = pair.place
    for count in (1, 1, 5, 1):
        pair.step(count)
        assert pair.place == place


def test_a_full_room_is_left_for_one_of_twice_the_size():
    pair = Pair()
    pair.step(ROOM)
    first, places = pair.place, set()
    for _ in range(5):
        pair.step(ROOM)
        places.add(pair.place)
    assert len(places - {first}) == 2
    pair.step()


def test_what_is_cropped_is_overwritten_in_its_place():
    pair = Pair()
    pair.step(3)
    place = pair.place
    for _ in range(3):
        pair.do("crop", -2)
        pair.step(4)
        assert pair.place == place


@pytest.mark.parametrize("early", [True, False])
def test_beams_are_reordered_and_grow_on(early):
    pair = Pair()
    if not early:
        pair.step()
    pair.do("batch_repeat_interleave", 3)
    for order in ([0, 0, 2], [2, 1, 0], [1, 1, 1]):
        pair.step(batch=3)
        pair.do("reorder_cache", torch.tensor(order))
    pair.step(batch=3)
    pair.step(batch=3)
    pair.do("batch_select_indices", torch.tensor([1]))
    pair.step()
    pair.step()


def test_a_copy_grows_by_itself():
    pair = Pair()
    pair.step()
    other = copy.deepcopy(pair.layers[0])
    fresh, mine = tokens(1), tokens(1)
    other.update(*fresh)
    keys, _ = pair.layers[0].update(*mine)
    assert torch.equal(keys[:, :, -1:], mine[0])
    assert torch.equal(other.keys[:, :, -1:], fresh[0])


def test_after_a_reset_it_is_empty():
    pair = Pair()
    pair.step()
    pair.do("reset")
    pair.step(4)
    pair.step()
    pair.step()


def test_inference_mode_may_come_and_go():
    with torch.inference_mode():
        pair = Pair()
        pair.step()
    with torch.no_grad():
        pair.step()
        pair.step()
    with torch.inference_mode():
        pair.step()


def test_gradients_go_through():
    pair = Pair()
    pair.step()
    keys, values = tokens(1)
    keys.requires_grad_()
    for _ in range(2):
        pair.layers[0].update(keys, values)
    pair.layers[0].keys.sum().backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2.0))
