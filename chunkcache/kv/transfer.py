"""Chunk KV between host and accelerator: who waits for whom, and layers in page-locked memory.

What one stream makes and another reads carries an event (`ChunkKV.ready`). The reader's stream waits for it; the host
does not. It ran on a pretend device only; it is untested on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from chunkcache.kv import device as devices
from chunkcache.kv.chunk import ChunkKV, Layer, LazyLayers
from chunkcache.kv.device import Ready
from chunkcache.kv.quantised import QuantisedLayer

ALIGNED = 256  # bytes that each tensor starts at a multiple of
RUN_BYTES = 2**20  # layers that are smaller are copied several at a time: smaller copies do not fill the bus


def parts(layers: Sequence[Layer]) -> Iterator[Tensor]:
    """Yield the tensors of layers that are in memory."""
    return chain.from_iterable((layer,) if isinstance(layer, Tensor) else layer.parts() for layer in layers)


def place_of(layer: Layer) -> torch.device:
    """Return the device that a layer is on."""
    return layer.device if isinstance(layer, Tensor) else layer.codes.device


# --- what is made on one stream, and read on another


def made(layers: Sequence[Layer]) -> tuple[Ready, ...]:
    """Return when layers are made that this thread has just put into its streams; () where there are no streams."""
    if not isinstance(layers, tuple):
        return ()
    places = dict.fromkeys(map(place_of, layers))
    return tuple(devices.mark(place) for place in places if devices.has_streams(place))


def marked(kv: ChunkKV) -> ChunkKV:
    """Return `kv` with `ready`; KV without it were put into this thread's streams just now, or on the CPU."""
    ready = () if kv.ready else made(kv.layers)
    return replace(kv, ready=ready) if ready else kv


def join(kv: ChunkKV) -> ChunkKV:
    """Let this thread's streams wait until `kv` are made, and keep their memory until these have used it."""
    for ready in kv.ready:
        stream = devices.current_stream(ready.device)
        if stream != ready.stream:
            devices.keep_for(stream, (part for part in parts(kv.layers) if part.device == ready.device))
        devices.wait_for(ready)
    return kv


def to_host(kv: ChunkKV) -> ChunkKV:
    """Return KV in the host's memory; those of an accelerator are copied in its copy stream, and waited for."""
    if not kv.ready:
        return kv
    _let_copies_wait(kv)
    layers = []
    for layer in kv.layers:
        if devices.has_streams(place := place_of(layer)):
            with devices.working_on(devices.copy_stream(place)):
                layer = layer.to("cpu")
        layers.append(layer)
    return kv.of_layers(tuple(layers))


def to_device(kv: ChunkKV, place: Callable[[int], torch.device]) -> ChunkKV:
    """Return KV with layer i on the device `place(i)`; what is in page-locked memory comes by the copy stream.

    The host waits only for copies to the CPU, and from memory that is not page-locked.
    """
    join(kv)
    if isinstance(kv.layers, PinnedLayers) and all(devices.has_streams(place(i)) for i in range(len(kv.layers))):
        layers, ready = _unpinned(kv.layers, place)
    else:
        there = [place(index) for index in range(len(kv.layers))]
        moved = (layer.to(to, non_blocking=to.type != "cpu") for layer, to in zip(kv.layers, there, strict=True))
        layers = tuple(moved)
        ready = made(layers)
    return replace(kv.of_layers(layers), ready=ready)


def _unpinned(
    pinned: PinnedLayers, place: Callable[[int], torch.device]
) -> tuple[tuple[Layer, ...], tuple[Ready, ...]]:
    layers: list[Layer] = []
    ready: dict[torch.device, Ready] = {}
    for run in pinned.runs:
        there = place(run.first)
        [data] = own_memory([len(run.data)], there)
        with devices.working_on(devices.copy_stream(there)):
            pinned.let_copies_wait(there)
            run.copy_to(data)
            layers += run.views(data)
            arrived = devices.mark(there)
        ready[there] = arrived._replace(stream=devices.current_stream(there))  # of all runs: copies are in order
    return tuple(layers), tuple(ready.values())


def own_memory(sizes: Sequence[int], place: torch.device) -> list[Tensor]:
    """Return memory `[bytes]` of the stream that this thread works on, which the copy stream may write."""
    memory = [torch.empty(size, dtype=torch.uint8, device=place) for size in sizes]
    copies = devices.copy_stream(place)
    copies.wait_stream(devices.current_stream(place))  # which may still use what was there before
    devices.keep_for(copies, memory)
    return memory


def copy_memory(sizes: Sequence[int], place: torch.device) -> list[Tensor]:
    """Return memory `[bytes]` of the copy stream, which the stream that this thread works on may use."""
    with devices.working_on(devices.copy_stream(place)):
        memory = [torch.empty(size, dtype=torch.uint8, device=place) for size in sizes]
    devices.keep_for(devices.current_stream(place), memory)
    return memory


def _let_copies_wait(kv: ChunkKV) -> None:
    """Let copy streams wait until `kv` are made, and keep their memory until it is copied."""
    for ready in kv.ready:
        with devices.working_on(devices.copy_stream(ready.device)):
            join(replace(kv, ready=(ready,)))


# --- layers in page-locked memory


@dataclass(frozen=True)
class Form:
    """How one layer lies in a run of bytes.

    Attributes:
        bits: of its codes; 0 for a tensor.
        dtype: of the layer.
        tensors: of each of its tensors the first byte, dtype and shape.
        stop: where the next layer may start.
    """

    bits: int
    dtype: torch.dtype
    tensors: tuple[tuple[int, torch.dtype, tuple[int, ...]], ...]
    stop: int

    @classmethod
    def of(cls, layer: Layer, start: int) -> Form:
        """Return how `layer` lies from the byte `start` on."""
        tensors = []
        for part in parts((layer,)):
            tensors.append((start, part.dtype, tuple(part.shape)))
            start += -(-part.nbytes // ALIGNED) * ALIGNED
        return cls(0 if isinstance(layer, Tensor) else layer.bits, layer.dtype, tuple(tensors), start)

    def view(self, data: Tensor) -> Layer:
        """Return the layer in `data`, `[bytes]` of the whole run."""
        views = []
        for start, dtype, shape in self.tensors:
            count = dtype.itemsize * torch.Size(shape).numel()
            views.append(data[start : start + count].view(dtype).view(shape))
        return views[0] if self.bits == 0 else QuantisedLayer(self.bits, self.dtype, *views)


@dataclass(frozen=True, eq=False)
class Run:
    """Layers one behind another in one piece of page-locked memory, which are copied together.

    Attributes:
        first: index of the first of them.
        forms: how each of them lies in it.
        data: `[bytes]`.
    """

    first: int
    forms: tuple[Form, ...]
    data: Tensor

    def views(self, data: Tensor) -> list[Layer]:
        """Return its layers in a copy of `data`."""
        return [form.view(data) for form in self.forms]

    def copy_to(self, into: Tensor) -> None:
        """Copy it to a device in the stream that this thread works on, which is the copy stream; the host goes on.

        Args:
            into: `[at least its bytes]`, which the stream may write.
        """
        into[: len(self.data)].copy_(self.data, non_blocking=True)


class PinnedLayers(LazyLayers):
    """Layers in page-locked memory, which may still be on their way there.

    Who reads a layer on the host waits until all have arrived. Who copies them to a device needs not: `runs`.

    Args:
        shapes: of each layer.
        runs: all layers, in order.
        arrival: when they are there, of each device that they come from.
    """

    in_memory = True

    def __init__(self, shapes: tuple[tuple[int, ...], ...], runs: Sequence[Run], arrival: Sequence[Ready]) -> None:
        super().__init__(shapes, waits=False)
        self.runs = tuple(runs)
        self.arrival = tuple(arrival)
        self._where = [(run, form) for run in runs for form in run.forms]
        self._arrived = False

    def let_copies_wait(self, place: torch.device) -> None:
        """Let the copies of a device wait until all have arrived; those that came from it are in order anyway."""
        for ready in self.arrival:
            if ready.device != place:
                devices.copy_stream(place).wait_event(ready.event)

    def read(self, index: int) -> Layer:
        """Return layer `index`, once all have arrived."""
        if not self._arrived:
            for ready in self.arrival:
                ready.event.synchronize()
            self._arrived = True
        run, form = self._where[index]
        return form.view(run.data)


def pin(kv: ChunkKV, take: Callable[[Sequence[int]], list[Tensor] | None]) -> ChunkKV | None:
    """Return KV of an accelerator in page-locked memory; they are copied in copy streams, the host does not wait.

    Args:
        kv: its layers are on devices that have streams.
        take: returns `[bytes]` of page-locked memory for each of some sizes, or None.

    Returns:
        None where there is no memory for it.
    """
    planned = list(_runs(kv.layers))
    slots = take([forms[-1].stop for _, forms in planned])
    if slots is None:
        return None
    _let_copies_wait(kv)
    runs = [Run(first, forms, slot) for (first, forms), slot in zip(planned, slots, strict=True)]
    for place in {ready.device for ready in kv.ready}:
        devices.order_copies(place)
    arrival: dict[torch.device, Ready] = {}
    for run in runs:
        place = place_of(kv.layers[run.first])
        with devices.working_on(devices.copy_stream(place)):
            for index, layer in enumerate(run.views(run.data), run.first):
                for mine, theirs in zip(parts((layer,)), parts((kv.layers[index],)), strict=True):
                    mine.copy_(theirs, non_blocking=True)
            arrival[place] = devices.mark(place)
    layers = PinnedLayers(kv.shapes, runs, tuple(arrival.values()))
    return replace(kv, layers=layers, nbytes=sum(layer.nbytes for layer in kv.layers), ready=())


def _runs(layers: Sequence[Layer]) -> Iterator[tuple[int, tuple[Form, ...]]]:
    """Yield index of the first, and forms, of layers that are copied together: on one device, and not too many."""
    forms: list[Form] = []
    for index, layer in enumerate(layers):
        full = forms and (forms[-1].stop >= RUN_BYTES or place_of(layer) != place_of(layers[index - 1]))
        if full:
            yield index - len(forms), tuple(forms)
            forms = []
        forms.append(Form.of(layer, forms[-1].stop if forms else 0))
    yield len(layers) - len(forms), tuple(forms)


class WantedLayers(PinnedLayers):
    """Page-locked layers of which a copy on a device, once it is made, is wanted.

    Args:
        pinned: the layers.
        on_copied: called with the copy, and when it is there.
    """

    def __init__(
        self, pinned: PinnedLayers, on_copied: Callable[[tuple[Layer, ...], tuple[Ready, ...]], None]
    ) -> None:
        super().__init__(pinned.shapes, pinned.runs, pinned.arrival)
        self.on_copied = on_copied
