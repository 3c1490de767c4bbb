"""The offset correction: what the recomputed rows of a chunk add to its other rows.

position  0 1 2 | 3 4 5 6 7 8 | 9 | 10 11 12 13 | 14 15 16 | 17 18
          prefix     chunk a   gap    chunk b     chunk c    question
"""

from __future__ import annotations

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import FusedCache, Plan
from chunkcache.blend.kvshift import KVShift
from chunkcache.blend.query import Query
from chunkcache.blend.shift import Shift, Shifting
from chunkcache.errors import PolicyError
from chunkcache.kv import ChunkKV

IDS = range(40, 59)
HEADS, DIM = 2, 4
A, B, C = range(3, 9), range(10, 14), range(14, 17)


def segment(start, stop, exact=False):
    ids = IDS[start:stop]
    return span(start, ChunkKV.of(ids, 0, [torch.zeros(2, HEADS, len(ids), DIM)]), exact=exact)


PLAN = Plan.of(IDS, [segment(3, 9), segment(10, 14), segment(14, 17)], segment(0, 3, exact=True))
ROWS = torch.tensor([4, 7, 9, 11, 17, 18])  # two of a, one of b, none of c, and what is always computed


def layer(offsets, dtype=torch.float32):
    """One layer's true KV, and the stored: `offsets` off in each chunk, and undefined where nothing is stored."""
    true = torch.randn(2, HEADS, len(IDS), DIM, generator=torch.Generator().manual_seed(3))
    stored = true.clone()
    for chunk, offset in offsets.items():
        stored[:, :, list(chunk)] -= offset
    stored[:, :, [9, 17, 18]] = torch.nan
    return true.to(dtype), stored.to(dtype)


def applied(shift, true, stored, rows=ROWS, noted=False):
    both, shifting = stored.clone(), Shifting(shift, PLAN)
    if noted:
        for noted_rows in (torch.arange(3, 19), rows):  # the second time without those that are left behind
            shifting.note(noted_rows, true[:, :, noted_rows], stored[:, :, noted_rows])
    fresh = true[:, :, rows]
    shifting.apply(both, rows, fresh[:1], fresh[1:])
    return both


def constant(seed):
    return torch.randn(2, HEADS, 1, DIM, generator=torch.Generator().manual_seed(seed))


def others(chunk):
    return [at for at in chunk if at not in ROWS.tolist()]


def same(value, expected):
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("weight", ["one", "evidence"])
def test_an_offset_that_a_chunk_shares_is_restored(weight):
    true, stored = layer({A: constant(1), B: constant(2), C: constant(4)})
    both = applied(Shift(weight=weight), true, stored)
    same(both[:, :, others(A)], true[:, :, others(A)])
    if weight == "one":  # one row is no evidence
        same(both[:, :, others(B)], true[:, :, others(B)])
    else:
        assert torch.equal(both[:, :, list(B)], stored[:, :, list(B)])
    assert torch.equal(both[:, :, list(C)], stored[:, :, list(C)])  # nothing of it was recomputed


def test_nothing_else_is_touched():
    true, stored = layer({A: constant(1), B: constant(2)})
    both = applied(Shift(), true, stored)
    untouched = sorted(set(range(len(IDS))) - set(others(A)) - set(others(B)))
    assert torch.equal(both[:, :, untouched].nan_to_num(9.0), stored[:, :, untouched].nan_to_num(9.0))


def test_the_mean_of_few_rows_is_shrunk():
    true, stored = layer({A: constant(1), B: constant(2)})
    both = applied(Shift(shrink=2.0), true, stored)
    same(both[:, :, others(A)] - stored[:, :, others(A)], (constant(1) * 2 / 4).expand(-1, -1, 4, -1))
    same(both[:, :, others(B)] - stored[:, :, others(B)], (constant(2) * 1 / 3).expand(-1, -1, 3, -1))


@pytest.mark.parametrize(("keys", "values"), [(True, False), (False, True)])
def test_keys_and_values_are_corrected_each_by_itself(keys, values):
    true, stored = layer({A: constant(1)})
    both = applied(Shift(keys=keys, values=values), true, stored)
    for part, wanted in ((0, keys), (1, values)):
        expected = true if wanted else stored
        same(both[part][:, others(A)], expected[part][:, others(A)])


def test_residuals_that_contradict_one_another_are_little_evidence():
    true, stored = layer({})
    residual = torch.randn(2, HEADS, 2, DIM, generator=torch.Generator().manual_seed(5))
    stored[:, :, [4, 7]] -= residual
    both = applied(Shift(weight="evidence"), true, stored)
    for part in range(2):
        mean = residual[part].mean(1, keepdim=True)
        error = ((residual[part] - mean).square().sum() / (2 - 1) / 2).sqrt()
        moved = min(1.0, float(mean.norm() / error)) * mean
        same(both[part][:, others(A)], stored[part][:, others(A)] + moved)
    assert float(mean.norm() / error) < 1


def test_each_token_is_moved_as_far_as_it_deviated_itself():
    true, stored = layer({A: 0.05 * constant(1)})
    stored[:, :, [5]] -= 10 * constant(6)
    both = applied(Shift(weight="deviation"), true, stored, noted=True)
    moved, mean = both - stored, 0.05 * constant(1)
    for part in range(2):
        same(moved[part][:, [5]], mean[part])
        same(moved[part][:, [6]], mean[part] * mean[part].norm())
        assert mean[part].norm() < 1
    unnoted = applied(Shift(weight="deviation"), true, stored)
    assert torch.equal(unnoted[:, :, list(A)], applied(Shift(), true, stored)[:, :, list(A)])


def test_the_rows_may_change_from_layer_to_layer():
    shifting = Shifting(Shift(), PLAN)
    for rows in (torch.arange(3, 19), ROWS, torch.tensor([9, 14, 17, 18])):
        true, stored = layer({A: constant(1), B: constant(2), C: constant(4)})
        both, fresh = stored.clone(), true[:, :, rows]
        shifting.apply(both, rows, fresh[:1], fresh[1:])
        assert torch.equal(both[:, :, 3:9], applied(Shift(), true, stored, rows)[:, :, 3:9])
    same(both[:, :, 15:17], true[:, :, 15:17])


def test_it_counts_in_float32_whatever_the_model_does():
    true, stored = layer({A: 100 * constant(1)}, torch.bfloat16)
    both = applied(Shift(), true, stored)
    assert both.dtype == torch.bfloat16
    torch.testing.assert_close(both[:, :, others(A)], true[:, :, others(A)], atol=2.0, rtol=0)


@pytest.mark.parametrize("plan", [Plan.of(IDS), Plan.of(IDS, [segment(0, 9, exact=True)])], ids=["none", "exact"])
def test_without_a_chunk_there_is_nothing_to_correct(plan):
    both = torch.randn(2, HEADS, len(IDS), DIM)
    before, fresh = both.clone(), torch.randn(1, HEADS, 2, DIM)
    Shifting(Shift(), plan).apply(both, torch.tensor([17, 18]), fresh, fresh)
    assert torch.equal(both, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": -1.0}, r"shrink=-1\.0"),
        ({"shrink": float("nan")}, "shrink=nan"),
        ({"weight": "two"}, "weight='two' is none of one, evidence, deviation"),
        ({"keys": False, "values": False}, "neither keys nor values"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(PolicyError, match=message):
        Shift(**options)


def test_nothing_is_corrected_while_scouting():
    decoder = h.decoder("llama")
    plan = h.chunk_plan(decoder.model, ids := h.random_ids())
    cache = FusedCache(decoder.config, plan, decoder.rotaries, shift=Shift())
    stored = cache.assemble(2, plan.reused[0].kv.layers[2][:1]).clone()
    fresh = torch.randn(1, 2, 3, 16)
    cache.scouting = True
    cache.go_on_with(torch.tensor([10, 50, len(ids) - 1]))
    keys, values = cache.update(fresh, fresh, 2)
    rest = [at for at in plan.inexact.tolist() if at not in (10, 50)]
    assert torch.equal(torch.cat((keys, values))[:, :, rest], stored[:, :, rest])
    cache.scouting = False
    keys, values = cache.update(fresh + 1, fresh + 1, 2)
    assert not torch.isclose(torch.cat((keys, values))[:, :, rest], stored[:, :, rest]).all(dim=-1).any()


class ShiftedCache(h.FrozenCache):
    """The reference: every row is computed; all but `rows_at` get the stored KV, moved chunk by chunk as by hand."""

    def __init__(self, frozen, rows_at, even):
        super().__init__(frozen, rows_at)
        self._even = even
        self._own = None

    def update(self, key, value, layer_idx, *args, **kwargs):
        rows, fresh = self._rows_at[layer_idx].tolist(), torch.cat((key, value))
        stored = self._frozen[layer_idx].clone()
        if not self._even and layer_idx == 1:
            self._own = (fresh - stored).norm(dim=(1, 3)).clamp(max=1)
        for start, stop in h.CHUNKS:
            probes = [at for at in range(start, stop) if at in rows]
            rest = [at for at in range(start, stop) if at not in rows]
            for part in range(2):
                residual = fresh[part][:, probes] - self._frozen[layer_idx][part][:, probes]
                mean = residual.mean(1, keepdim=True)
                if self._even:
                    error = ((residual - mean).square().sum() / (len(probes) - 1) / len(probes)).sqrt()
                    weight = (mean.norm() / error.clamp(min=1e-30)).clamp(max=1)
                else:
                    weight = 1.0 if self._own is None else self._own[part][rest][None, :, None]
                stored[part][:, rest] += weight * mean
        self._frozen[layer_idx] = stored
        return super().update(key, value, layer_idx, *args, **kwargs)


@pytest.mark.parametrize(("name", "attention"), [*zoo.SERVED])
@pytest.mark.parametrize("policy", [KVShift(ratio=0.2, probes="even"), KVShift(ratio=0.2)], ids=["even", "top"])
def test_kvshift_is_a_forward_whose_kv_are_moved_by_hand(name, attention, policy):
    model, ids = zoo.build(name, attention), h.random_ids()
    plan = h.chunk_plan(model, ids)
    prefill = h.Selective(h.decoder(name, attention), plan, policy)
    assert len(prefill.rows) == 2 * 6 + 4 + 20  # probes, the gap, the question
    frozen = [torch.zeros_like(layer) for layer in prefill.layers]
    for start, end in ((0, h.PREFIX), *h.CHUNKS):
        for layer_, stored in zip(frozen, h.alone(model, ids[start:end], start).layers, strict=True):
            layer_[:, :, start:end] = stored
    cache = ShiftedCache(frozen, prefill.rows_at, policy.probes == "even")
    logits, reference = h.own_prefill(model, ids, cache=cache)
    torch.testing.assert_close(prefill.logits, logits[prefill.rows], atol=1e-4, rtol=0)
    for layer_, wanted in zip(prefill.layers, h.layers_of(reference), strict=True):
        torch.testing.assert_close(layer_, wanted, atol=1e-4, rtol=0)


def test_a_policy_that_looks_may_also_correct():
    class Shifted(Query):
        def shift(self):
            return Shift()

    decoder, ids = h.decoder("llama"), h.random_ids()
    plan = h.chunk_plan(decoder.model, ids)
    plain, shifted = (h.Selective(decoder, plan, kind(ratio=0.2)) for kind in (Query, Shifted))
    assert plain.rows.tolist() == shifted.rows.tolist()
    rest = [at for at in plan.inexact.tolist() if at not in plain.rows.tolist()]
    assert torch.equal(plain.layers[-1][:, :, : h.PREFIX], shifted.layers[-1][:, :, : h.PREFIX])
    assert not torch.equal(plain.layers[1][:, :, rest], shifted.layers[1][:, :, rest])
    torch.testing.assert_close(plain.layers[0], shifted.layers[0], atol=1e-5, rtol=0)  # layer 0 has no error
