"""The cost model is its formula, and a fit finds what made the times that it is fitted to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chunkcache.errors import InputError
from chunkcache.eval.costs import MACHINES, SHAPES, Costs, Machine, Reuse, Shape, fit, overlapped_s, predicted

SHAPE = Shape(
    params=1000, head_params=300, layers=2, heads=2, kv_heads=1, head_dim=5, dtype_bytes=2, source="made up"
)
MACHINE = Machine(
    flops=100.0, memory_bandwidth=40.0, hbm_bandwidth=100.0, utilisation=0.5, overhead=1.0, source="made up"
)
FAST = float("inf")


def test_prefill_takes_what_the_formula_says():
    costs = Costs(SHAPE, MACHINE)
    work = 2 * 1000 * 10 + 4 * 2 * 10 * 10 * (3 + 5)  # 10 rows, over 8 tokens on average
    assert costs.prefill_s(10, before=3) == pytest.approx(work / 50 + 2 * 1.0)
    assert costs.full_s(10) == pytest.approx(costs.prefill_s(10) + 2 * 300 / 50)  # the head, on one row
    assert SHAPE.kv_bytes == 40
    assert costs.load_s(3) == 3.0
    assert Costs(SHAPE, MACHINE.times(2)).prefill_s(10, 3) == pytest.approx(work / 100 + 2)


def test_weights_are_read_however_few_the_rows():
    costs = Costs(SHAPE, Machine(1e9, FAST, hbm_bandwidth=10.0, utilisation=1.0, overhead=0.0, source=""))
    assert costs.layer_s(1, 0) == costs.layer_s(5, 0) == 500 * 2 / 10
    assert costs.layer_s(0, 0) == 0
    assert costs.full_s(1) == (1000 + 300) * 2 / 10
    twice = Costs(SHAPE, costs.machine.times(2))
    assert twice.full_s(1) == costs.full_s(1) / 2


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "total", "heads"),
    [
        ("llama-3.1-8b", 4096, 14336, 8.03e9, 2),
        ("llama-3.1-70b", 8192, 28672, 70.55e9, 2),
        ("smollm2-135m", 576, 1536, 134.5e6, 1),  # its head is its embeddings
    ],
)
def test_published_shapes_add_up(name, hidden, intermediate, total, heads):
    shape = SHAPES[name]
    attention = 2 * hidden * hidden + 2 * hidden * shape.kv_heads * shape.head_dim
    assert shape.heads * shape.head_dim == hidden
    assert shape.params == pytest.approx(shape.layers * (attention + 3 * hidden * intermediate), rel=0.002)
    assert shape.params + heads * shape.head_params == pytest.approx(total, rel=0.002)


def test_published_shapes_have_the_kv_that_is_known_of_them():
    assert SHAPES["llama-3.1-8b"].kv_bytes == 128 * 1024
    assert SHAPES["llama-3.1-70b"].kv_bytes == 320 * 1024
    assert MACHINES["h100"].hbm_bandwidth > MACHINES["a100"].hbm_bandwidth > MACHINES["h100"].memory_bandwidth


def test_a_layer_waits_for_its_kv_and_loads_while_others_compute():
    even = [(0, 1.0), (1, 1.0)]
    assert overlapped_s(0, even, 2) == 2
    assert overlapped_s(1, even, 2) == 2.5  # the first half is waited for, the second comes meanwhile
    assert overlapped_s(10, even, 2) == 11
    assert overlapped_s(10, [(0, 1.0), (0, 1.0), (1, 1.0)], 2) == 11  # a scout's step over the first layer


def test_policies_compute_the_rows_that_they_say():
    costs = Costs(replace(SHAPE, head_params=0), Machine(1.0, 1.0, FAST, 1.0, 0.0, ""))

    def work(reuse):
        return sum(seconds for _, seconds in costs.fused_steps(reuse, 0, 100, 10))

    nothing, everything = work(Reuse()), work(Reuse(share=1.0))
    assert everything == pytest.approx(costs.prefill_s(110))
    assert work(Reuse(whole=2)) == everything
    assert nothing == pytest.approx(costs.prefill_s(10, before=100))
    assert nothing < work(Reuse(share=0.1)) < work(Reuse(share=0.1, whole=1)) < everything
    assert work(Reuse(scouts=True)) == pytest.approx(2 * nothing)  # two thirds of two layers are both


def test_a_fit_finds_speed_and_overhead():
    truth = Costs(SHAPES["smollm2-135m"], Machine(5e10, 1e10, 1e10, 1.0, 0.002, "made up"))
    machine = fit(truth.shape, [(n, truth.full_s(n)) for n in (500, 1000, 3000)], 1e10, 1e10, "made up")
    assert machine.flops == pytest.approx(5e10, rel=1e-6)
    assert machine.overhead == pytest.approx(0.002, rel=1e-4)
    assert predicted(Costs(truth.shape, machine), None, 64, 1900, 36) == pytest.approx(truth.full_s(2000))
    with pytest.raises(InputError, match="two or more"):
        fit(truth.shape, [(500, 1.0)], 1e10, 1e10, "one row")
    with pytest.raises(InputError, match="do not grow"):
        fit(truth.shape, [(500, 1.0), (50_000, 0.001)], 1e10, 1e10, "odd rows")
