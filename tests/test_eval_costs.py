"""The cost model is its formula, and a fit finds what made the times that it is fitted to."""

from __future__ import annotations

import pytest

from chunkcache.errors import InputError
from chunkcache.eval.costs import MACHINES, SHAPES, Costs, Machine, Reuse, Shape, fit, overlapped_s, predicted

SHAPE = Shape(params=1000, layers=2, heads=2, kv_heads=1, head_dim=5, dtype_bytes=2, source="made up")
MACHINE = Machine(flops=100.0, memory_bandwidth=40.0, utilisation=0.5, overhead=1.0, source="made up")


def test_prefill_takes_what_the_formula_says():
    costs = Costs(SHAPE, MACHINE)
    work = 2 * 1000 * 10 + 4 * 2 * 10 * 10 * (3 + 5)  # 10 rows, over 8 tokens on average
    assert costs.prefill_s(10, before=3) == pytest.approx(work / 50 + 2 * 1.0)
    assert SHAPE.kv_bytes == 40
    assert costs.load_s(3) == 3.0
    assert Costs(SHAPE, MACHINE.times(2)).prefill_s(10, 3) == pytest.approx(work / 100 + 2)


def test_published_shapes_have_the_kv_that_is_known_of_them():
    assert SHAPES["llama-3.1-8b"].kv_bytes == 128 * 1024
    assert SHAPES["llama-3.1-70b"].kv_bytes == 320 * 1024
    assert all(each.source for each in (*SHAPES.values(), *MACHINES.values()))


def test_a_layer_waits_for_its_kv_and_loads_while_others_compute():
    even = [(0, 1.0), (1, 1.0)]
    assert overlapped_s(0, even, 2) == 2
    assert overlapped_s(1, even, 2) == 2.5  # the first half is waited for, the second comes meanwhile
    assert overlapped_s(10, even, 2) == 11
    assert overlapped_s(10, [(0, 1.0), (0, 1.0), (1, 1.0)], 2) == 11  # a scout's step over the first layer


def test_policies_compute_the_rows_that_they_say():
    costs = Costs(SHAPE, Machine(1.0, 1.0, 1.0, 0.0, ""))

    def work(reuse):
        return sum(seconds for _, seconds in costs.fused_steps(reuse, 0, 100, 10))

    nothing, everything = work(Reuse()), work(Reuse(share=1.0))
    assert everything == pytest.approx(costs.prefill_s(110))
    assert work(Reuse(whole=2)) == everything
    assert nothing == pytest.approx(costs.prefill_s(10, before=100))
    assert nothing < work(Reuse(share=0.1)) < work(Reuse(share=0.1, whole=1)) < everything
    assert work(Reuse(scouts=True)) == pytest.approx(2 * nothing)  # two thirds of two layers are both


def test_a_fit_finds_speed_and_overhead():
    truth = Costs(SHAPES["smollm2-135m"], Machine(5e10, 1e10, 1.0, 0.002, "made up"))
    machine = fit(truth.shape, [(n, truth.prefill_s(n)) for n in (500, 1000, 3000)], 1e10, "made up")
    assert machine.flops == pytest.approx(5e10, rel=1e-6)
    assert machine.overhead == pytest.approx(0.002, rel=1e-4)
    row = {"policy": "full", "tokens": 2000, "recomputed_share": 1.0}
    assert predicted(Costs(truth.shape, machine), row) == pytest.approx(truth.prefill_s(2000))
    less = {**row, "policy": "query", "recomputed_share": 0.05}
    assert predicted(truth, less) < 0.2 * predicted(truth, row)
    with pytest.raises(InputError, match="two or more"):
        fit(truth.shape, [(500, 1.0)], 1e10, "one row")
    with pytest.raises(InputError, match="do not grow"):
        fit(truth.shape, [(500, 1.0), (50_000, 0.001)], 1e10, "odd rows")
