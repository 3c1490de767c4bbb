"""The fused cache: stored KV in their places, fresh rows over them, and an ordinary cache afterwards."""

from __future__ import annotations

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span
from transformers import DynamicCache

from chunkcache.blend import Decoder, FusedCache, Plan, SelectivePrefill, layer_kv
from chunkcache.blend.cache import Probed
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.link import Link
from chunkcache.blend.prefix import Prefix
from chunkcache.kv import ChunkKV

HEADS, DIM = 2, 16


def stored(token_ids, position=0, fill=None, dtype=torch.float32):
    """Chunk KV whose layer l holds noise, or `fill + l`."""
    shape = (2, HEADS, len(token_ids), DIM)
    layers = [torch.randn(shape) if fill is None else torch.full(shape, fill + i) for i in range(zoo.LAYERS)]
    return ChunkKV.of(token_ids, position, [layer.to(dtype) for layer in layers])


def fused(plan, name="llama", without_rope=False):
    decoder = Decoder(zoo.build(name))
    return FusedCache(decoder.config, plan, [None] * zoo.LAYERS if without_rope else decoder.rotaries)


def fresh(rows, fill, dtype=torch.float32):
    return torch.full((1, HEADS, rows, DIM), fill, dtype=dtype)


IDS = range(20, 32)
LIKE = torch.empty(1, HEADS, 1, DIM)


def test_what_is_in_memory_needs_no_loader(monkeypatch):
    monkeypatch.setattr("chunkcache.blend.cache.Loader", lambda *_: pytest.fail("a loader was started"))
    cache = fused(Plan.of(IDS, [span(0, stored(IDS[:4]))]))
    assert cache.assemble(0, LIKE).shape == (2, HEADS, len(IDS), DIM)
    cache.stop_loading()
    assert cache.load_s == 0.0


def test_segments_stand_in_their_places_and_parts_of_chunks_are_the_right_parts():
    a, b = stored(IDS[0:3]), stored(range(22, 30))
    plan = Plan.of(IDS, [span(0, a, 0, 3), span(4, b, 2, 5)])
    cache = fused(plan, without_rope=True)
    for index in range(zoo.LAYERS):
        both = cache.assemble(index, LIKE)
        assert both.shape == (2, HEADS, len(IDS), DIM)
        assert torch.equal(both[:, :, 0:3], a.layers[index])
        assert torch.equal(both[:, :, 4:9], b.layers[index][:, :, 2:7])


def test_keys_are_rotated_to_their_positions_and_values_are_not():
    kv = stored(IDS[5:9], position=2)
    cache = fused(Plan.of(IDS, [span(5, kv, 0, 4)]))
    keys, values = cache.assemble(1, LIKE)[:, :, 5:9]
    expected = torch.empty(HEADS, 4, DIM)
    Decoder(zoo.build("llama")).rotaries[1].shift(kv.layers[1][0], 3, expected)
    assert torch.equal(keys, expected)
    assert torch.equal(values, kv.layers[1][1])


@pytest.mark.parametrize("without_rope", [True, False])
def test_stored_kv_of_another_dtype_are_converted(without_rope):
    kv = stored(IDS[5:9], position=2, dtype=torch.bfloat16)
    cache = fused(Plan.of(IDS, [span(5, kv, 0, 4)]), without_rope=without_rope)
    both = cache.assemble(0, LIKE)
    assert both.dtype == torch.float32
    assert torch.equal(both[1, :, 5:9], kv.layers[0][1].float())


def test_stored_kv_are_never_written_to():
    kv = stored(IDS[0:4], fill=1.0)
    cache = fused(Plan.of(IDS, [span(0, kv, 0, 4)]), without_rope=True)
    cache.go_on_with(torch.arange(12))
    cache.update(fresh(12, 9.0), fresh(12, 9.0), 0)
    assert (kv.layers[0] == 1.0).all()


@pytest.mark.parametrize("rows", [[0, 1, 2, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
def test_update_puts_fresh_rows_over_stored_ones_and_returns_the_whole_prompt(rows):
    kv = stored(IDS[0:8], fill=1.0)
    cache = fused(Plan.of(IDS, [span(0, kv, 0, 8)]), without_rope=True)
    cache.go_on_with(torch.tensor(rows))
    keys, values = cache.update(fresh(len(rows), 5.0), fresh(len(rows), 6.0), 2)
    for tensor, new in ((keys, 5.0), (values, 6.0)):
        expected = [new if position in rows else 3.0 for position in range(12)]
        assert tensor.shape == (1, HEADS, 12, DIM)
        assert tensor[0, 1, :, 7].tolist() == expected
    assert cache.computed == len(rows)


def test_it_is_empty_to_the_outside_until_it_is_prefilled():
    plan = Plan.of(IDS, [span(0, stored(IDS[:4]), 0, 4)])
    cache = fused(plan)
    assert cache.get_seq_length() == 0
    assert not cache.prefilled
    prefill = SelectivePrefill(Decoder(zoo.build("llama")), plan, Link())
    prefill.run()
    assert prefill.cache.prefilled
    assert prefill.cache.get_seq_length() == len(plan)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
def test_afterwards_it_is_like_the_cache_that_the_model_itself_would_have(name):
    model, ids = zoo.build(name), h.random_ids(30)
    own = DynamicCache(config=model.config)
    h.own_prefill(model, ids, cache=own)
    cache = h.Selective(h.decoder(name), Plan.of(ids), Prefix()).cache
    for token in (7, 8, 9):
        h.own_prefill(model, [token], start=own.get_seq_length(), cache=own)
        h.own_prefill(model, [token], start=cache.get_seq_length(), cache=cache)
        for index in range(zoo.LAYERS):
            assert cache.get_seq_length(index) == own.get_seq_length(index)
            assert cache.get_mask_sizes(1, index) == own.get_mask_sizes(1, index)
            torch.testing.assert_close(layer_kv(cache, index), layer_kv(own, index), atol=1e-4, rtol=0)


def test_sliding_window_layers_hold_no_more_than_their_window_afterwards():
    cache = h.Selective(h.decoder("gemma3"), Plan.of(h.random_ids(30)), Prefix()).cache
    lengths = [layer_kv(cache, index)[0].shape[2] for index in range(zoo.LAYERS)]
    assert lengths == [zoo.WINDOW - 1, 30, zoo.WINDOW - 1, 30]


def test_a_prompt_shorter_than_the_window_is_kept_whole():
    cache = h.Selective(h.decoder("mistral-sliding"), Plan.of(h.random_ids(5)), Prefix()).cache
    assert [layer_kv(cache, index)[1].shape[2] for index in range(zoo.LAYERS)] == [5] * zoo.LAYERS


def test_computed_counts_every_row_of_every_layer():
    decoder, ids = h.decoder("llama"), h.random_ids()
    plan = h.chunk_plan(decoder.model, ids)
    always, choice = len(plan.fresh), len(plan.inexact)
    for policy, expected in (
        (Prefix(), 4 * (always + choice)),
        (Link(k=5), 4 * (always + 2 * 5)),
        (CacheBlend(ratio=0.5, layer=2), 2 * (always + choice) + 2 * (always + choice // 2)),
    ):
        assert h.Selective(decoder, plan, policy).cache.computed == expected


def test_time_spent_assembling_is_counted():
    plan = Plan.of(IDS, [span(0, stored(IDS[:4], position=3), 0, 4)])
    cache = fused(plan)
    assert cache.assemble_s == 0
    cache.assemble(0, LIKE)
    assert cache.assemble_s > 0


def test_a_layer_is_loaded_once_per_prefill():
    """A tier may stream its layers: each is indexed when its turn comes, and only then."""

    class Streamed(list):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    loaded = []
    decoder, ids = h.decoder("llama"), h.random_ids(30)
    kv = h.alone(decoder.model, ids[:20])
    streamed = ChunkKV(kv.token_ids, kv.position, Streamed(kv.layers), kv.nbytes)
    h.Selective(decoder, Plan.of(ids, [span(0, streamed, 0, 20)]), CacheBlend())
    assert loaded == [0, 1, 2, 3]


def test_probe_gives_fresh_and_stored_kv_of_the_rows_and_keeps_the_fresh():
    kv = stored(IDS[0:8], fill=1.0)
    cache = fused(Plan.of(IDS, [span(0, kv, 0, 8)]), without_rope=True)
    rows = torch.tensor([1, 4, 6, 11])
    cache.go_on_with(rows)

    class Layer:
        def forward(self, new):
            cache.update(new, 2 * new, 1)
            raise AssertionError("the layer went on to attention")

    new, old = cache.probe(Layer(), 1, (fresh(4, 7.0),), {})
    assert (new[0] == 7.0).all()
    assert (new[1] == 14.0).all()
    assert (old[:, :, :3] == 2.0).all()
    kept = cache.assemble(1, LIKE)[1, 0, :, 0]
    assert kept[rows].tolist() == [14.0] * 4
    assert kept[[0, 2, 3, 5, 7]].tolist() == [2.0] * 5


def test_a_failure_inside_a_probe_is_passed_on_and_ends_the_probe():
    cache = fused(Plan.of(IDS))

    class Layer:
        def forward(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.probe(Layer(), 1, (), {})
    cache.go_on_with(torch.arange(12))
    cache.update(fresh(12, 1.0), fresh(12, 1.0), 1)  # would raise Probed


def test_probed_carries_keys_and_values():
    probed = Probed(fresh(3, 1.0), fresh(3, 2.0))
    assert probed.fresh.shape == (2, HEADS, 3, DIM)
