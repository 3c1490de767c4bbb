"""The pretend device refuses and counts what a GPU would: else the tests that stand on it show nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pretend import CrossDeviceError, Event, PretendDevice, Stream
from torch.nn.attention.bias import causal_lower_right


@pytest.fixture
def device():
    with PretendDevice() as on:
        yield on


def test_tensors_say_where_they_are_and_compute_as_on_the_cpu(device):
    a = torch.arange(6, device="cuda:0").view(2, 3)
    assert str(a.device) == "cuda:0"
    assert a.is_cuda
    assert (a.float() @ torch.ones(3, device="cuda")).tolist() == [3.0, 12.0]
    assert torch.nn.Linear(2, 2).to("cuda").weight.device.type == "cuda"


def test_it_refuses_an_index_on_the_wrong_device(device):
    with pytest.raises(CrossDeviceError):
        torch.arange(4, device="cuda:0").index_select(0, torch.tensor([1]))
    assert device.total.violations


def test_it_refuses_two_devices_and_one_that_there_is_not():
    with PretendDevice(count=2):
        a, b = (torch.ones(2, device=f"cuda:{index}") for index in range(2))
        with pytest.raises(CrossDeviceError):
            a + b
        assert (a + b.to("cuda:0")).tolist() == [2.0, 2.0]
        with pytest.raises(RuntimeError, match="invalid device"):
            torch.ones(2, device="cuda:2")


def test_a_scalar_of_the_cpu_is_let_through(device):
    assert (torch.ones(2, device="cuda") * torch.tensor(3.0)).tolist() == [3.0, 3.0]
    assert not device.total.violations


@pytest.mark.parametrize(
    ("waits", "what"),
    [
        (1, lambda t: t.sum().item()),
        (1, lambda t: t.tolist()),
        (1, lambda t: t.cpu()),
        (1, lambda t: t.nonzero()),
        (1, lambda t: t[t > 0]),
        (1, lambda t: torch.tensor([1, 2], device="cuda")),
        (1, lambda t: torch.tensor([1, 2]).to("cuda")),
        (0, lambda t: torch.tensor([1, 2]).to("cuda", non_blocking=True)),
        (0, lambda t: torch.arange(3, device="cuda")),
        (0, lambda t: t.topk(1)),
    ],
)
def test_waits_of_the_host_are_counted(device, waits, what):
    tensor = torch.ones(3, device="cuda")
    with device.watch() as seen:
        what(tensor)
    assert seen.syncs == waits, seen.table()


def test_launches_are_counted_and_views_are_none(device):
    tensor = torch.ones(4, 6, device="cuda")
    with device.watch() as seen:
        tensor.view(24)[:3].transpose(0, 0).add_(1)
        torch.cat([tensor, tensor])
    assert seen.launches == 2
    assert any("test_pretend.py" in line for line in seen.by_line)
    with device.watch() as seen:
        torch.cat([tensor] * 100)
    assert seen.launches == 2


def test_copies_are_told_apart(device):
    pinned = torch.empty(8, pin_memory=True)
    with device.watch() as seen:
        pinned[2:4].to("cuda", non_blocking=True)
        pinned.to("cuda")
        torch.ones(8).to("cuda", non_blocking=True)
        pinned.copy_(torch.ones(8, device="cuda"), non_blocking=True)
    assert seen.copies == {"H2D pinned, async": 1, "H2D pinned, blocking": 1, "H2D pageable": 1, "D2H async": 1}
    assert seen.syncs == 1
    assert not device.total.violations


def test_a_copy_to_the_host_that_nobody_waits_for_is_a_violation(device):
    torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert 'to("cpu", non_blocking=True)' in str(device.total.violations)


def test_streams_race_unless_there_is_an_event_between(device):
    def read_on_another(wait):
        side, tensor = Stream(), None
        with torch.cuda.stream(side):
            tensor = torch.ones(3, device="cuda")
            event = side.record_event()
        if wait:
            torch.cuda.current_stream().wait_event(event)
        tensor.record_stream(torch.cuda.current_stream())
        return tensor + 1

    read_on_another(wait=True)
    assert not device.total.violations
    read_on_another(wait=False)
    assert "no event between" in str(device.total.violations)


def test_memory_freed_under_another_stream_is_a_violation(device):
    for record in (True, False):
        side, tensor = Stream(), torch.ones(3, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            tensor + 1
        if record:
            tensor.record_stream(side)
        del tensor
        assert bool(device.total.violations) is not record


def test_an_event_has_passed_when_the_device_is_not_busy(device):
    start, end = Event(enable_timing=True), Event(enable_timing=True)
    start.record()
    torch.ones(3, device="cuda")
    end.record()
    device.busy = True
    assert not end.query()
    with pytest.raises(RuntimeError, match="completed"):
        start.elapsed_time(end)
    device.busy = False
    assert end.query()
    assert start.elapsed_time(end) >= 0


def test_attention_with_a_mask_costs_more_than_causal_attention(device):
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    bias = causal_lower_right(3, 5)
    there = [tensor.to("cuda") for tensor in (query, key)]
    with device.watch() as causal:
        out = F.scaled_dot_product_attention(there[0], there[1], there[1], bias)
    with device.watch() as masked:
        mask = torch.ones(3, 5, dtype=torch.bool, device="cuda").tril(2)
        same = F.scaled_dot_product_attention(there[0], there[1], there[1], mask)
    assert causal.launches < masked.launches
    torch.testing.assert_close(out.cpu(), same.cpu())
    torch.testing.assert_close(out.cpu(), F.scaled_dot_product_attention(query, key, key, bias))


def test_as_mps_it_has_no_float64_no_pinned_memory_and_no_streams():
    with PretendDevice(kind="mps") as device:
        tensor = torch.ones(3, device="mps")
        assert str(tensor.device) == "mps:0"
        with pytest.raises(TypeError, match="float64"):
            tensor.double()
        with pytest.raises(RuntimeError):
            torch.ones(3).pin_memory()
        assert not torch.cuda.is_available()
        assert torch.accelerator.current_accelerator().type == "mps"
        with pytest.raises(CrossDeviceError):
            tensor + torch.ones(3)
        assert device.kind == "mps"


def test_all_is_as_it_was_afterwards():
    before = torch.arange, torch.Tensor.to, torch.cuda.Stream, torch.cuda.is_available()
    with PretendDevice():
        pass
    assert before == (torch.arange, torch.Tensor.to, torch.cuda.Stream, torch.cuda.is_available())
