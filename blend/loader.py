"""Layer-wise loading: while layer i computes, layer i + 1 of every span is loaded (CacheBlend, section 5.2).

Layers in page-locked memory are copied to the device in its copy stream, by whoever takes the layer before: putting a
copy into a stream takes microseconds. Others, such as those of a disk or a server, are loaded in a thread. Layers
that are on the device, or in memory where the model runs on the CPU, need neither. Nor is there a thread where the
model runs on the CPU and the layers come out of the page cache: a thread that only copies takes a core from the
model, and its other cores wait for that one. The disk tier lets the system read ahead instead.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from chunkcache.kv import Layer, LazyLayers
from chunkcache.kv import device as devices
from chunkcache.kv.clock import StageClock
from chunkcache.kv.device import Ready
from chunkcache.kv.transfer import PinnedLayers, WantedLayers, copy_memory, own_memory, parts, place_of

LEAST_DEPTH = 2  # layers loaded ahead where loading is the faster of the two: one is in use while the next arrives


class Loader:
    """Loads the layers of several chunk KV, layer by layer, ahead of who takes them.

    It has run on the CPU and on a pretend device only; it is untested on a GPU.

    Args:
        sources: the layers of each chunk KV.
        device: where they are wanted.
        depth: layers loaded ahead at most.

    Attributes:
        clocks: time the stage `load`: that of who takes, and that of the thread.
    """

    def __init__(self, sources: Sequence[Sequence[Layer]], device: torch.device, depth: int) -> None:
        self._sources = sources
        self._device = device
        self._depth = depth
        self._changed = threading.Condition()
        self._loaded: dict[int, tuple[list[Layer], Ready | None]] = {}
        self._taken = -1
        self._error: BaseException | None = None
        self._closed = False
        self.clocks = StageClock(device), StageClock(device)
        self._copied = {
            n: s for n, s in enumerate(sources) if devices.has_streams(device) and isinstance(s, PinnedLayers)
        }
        self._copies = _Copies(list(self._copied.values()), device, depth) if self._copied else None
        self._in_thread = {n: s for n, s in enumerate(sources) if n not in self._copied and self._worth_a_thread(s)}
        self._thread: threading.Thread | None = None
        if self._in_thread:
            self._thread = threading.Thread(target=self._work, name="chunkcache-loader", daemon=True)
            self._thread.start()

    def take(self, index: int) -> list[Layer]:
        """Return layer `index` of each chunk KV; wait for it if need be. Layers are taken in order, each once.

        They may be used until those `depth` further on are taken; with a depth of 0, until the next are.

        Raises:
            EntryLostError: one of them is damaged or gone.
        """
        found: dict[int, Layer] = {}
        if self._copies is not None:
            found.update(zip(self._copied, self._copies.take(index, self.clocks[0]), strict=True))
        at_hand = [n for n in range(len(self._sources)) if n not in self._copied and n not in self._in_thread]
        if at_hand:
            with self.clocks[0].stage("load"):
                found.update((n, self._at_hand(self._sources[n][index])) for n in at_hand)
        if self._in_thread:
            found.update(zip(self._in_thread, self._from_thread(index), strict=True))
        return [found[n] for n in range(len(self._sources))]

    def close(self) -> None:
        """Stop loading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _worth_a_thread(self, source: Sequence[Layer]) -> bool:
        if isinstance(source, tuple):  # in memory: all that is left is to copy it to a device
            return self._device.type != "cpu" and place_of(source[0]) != self._device
        return self._device.type != "cpu" or not isinstance(source, LazyLayers) or source.waits

    def _at_hand(self, layer: Layer) -> Layer:
        """Return a layer that the CPU is to have in its memory, after a wait; others are on some device already."""
        return layer if self._device.type != "cpu" or place_of(layer) == self._device else layer.to("cpu")

    def _from_thread(self, index: int) -> list[Layer]:
        with self._changed:
            self._taken = index
            self._changed.notify_all()
            self._changed.wait_for(lambda: index in self._loaded or self._error is not None)
            if self._error is not None:
                raise self._error
            layers, arrival = self._loaded.pop(index)
        if arrival is not None:
            devices.wait_for(arrival)
            devices.keep_for(devices.current_stream(self._device), parts(layers))
        return layers

    def _work(self) -> None:
        try:
            streams, not_host = devices.has_streams(self._device), self._device.type != "cpu"
            sources = list(self._in_thread.values())
            for index in range(min(map(len, sources))):
                with self._changed:
                    while not self._closed and index > self._taken + self._depth:
                        self._changed.wait()
                    if self._closed:
                        return
                with devices.working_on(devices.copy_stream(self._device)) if streams else nullcontext():
                    with self.clocks[1].stage("load"):  # in the stream that copies
                        layers = [source[index].to(self._device, non_blocking=not_host) for source in sources]
                    arrival = devices.mark(self._device) if streams else None
                with self._changed:
                    self._loaded[index] = layers, arrival
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - carried over to who takes
            with self._changed:
                self._error = error
                self._changed.notify_all()


class _Copies:
    """Copies page-locked layers to a device, as many ahead as they are to be.

    The memory that they are copied to is used again for later layers, so that it does not grow with the model.
    """

    def __init__(self, sources: Sequence[PinnedLayers], device: torch.device, depth: int) -> None:
        self._device, self._depth = device, depth
        self._count = min(map(len, sources))
        self._tracks = [_Track(source, device, depth) for source in sources]
        self._arrivals: list[Ready] = []  # of each layer whose copy is enqueued
        for source in sources:
            source.let_copies_wait(device)

    def take(self, index: int, clock: StageClock) -> list[Layer]:
        """Return layer `index` of each source, once the copies of what comes next are enqueued."""
        stream = devices.copy_stream(self._device)
        first, stop = len(self._arrivals), min(index + self._depth + 1, self._count)
        if index and any(track.overwrites(layer) for track in self._tracks for layer in range(first, stop)):
            stream.wait_event(devices.mark(self._device).event)  # what was there has been used by then
        with devices.working_on(stream), clock.stage("load"):
            for layer in range(first, stop):
                started = [track.start(layer) for track in self._tracks]
                self._arrivals.append(devices.mark(self._device) if any(started) else self._arrivals[-1])
        devices.wait_for(self._arrivals[index])
        if index == self._count - 1:
            for track in self._tracks:
                track.hand_over(self._arrivals[index])
        return [track.layers[index] for track in self._tracks]


class _Track:
    """Where the runs of one chunk KV are copied to.

    Attributes:
        layers: on the device, by index, those whose copy is enqueued.
    """

    def __init__(self, source: PinnedLayers, device: torch.device, depth: int) -> None:
        self._source = source
        self._runs = {run.first: (number, run) for number, run in enumerate(source.runs)}
        self.layers: dict[int, Layer] = {}
        sizes = [len(run.data) for run in source.runs]
        if isinstance(source, WantedLayers):
            self._memory = own_memory(sizes, device)
        else:
            most = depth + max(depth, 1)  # layers that are ahead, and those that may still be used
            self._memory = copy_memory([max(sizes)] * min(most, len(sizes)), device)

    def overwrites(self, layer: int) -> bool:
        """Return whether copying begins with `layer`, to where other layers are."""
        number, _ = self._runs.get(layer, (0, None))
        return number >= len(self._memory)

    def start(self, layer: int) -> bool:
        """Enqueue the copy of the run that begins with `layer`, in the copy stream; False if none does."""
        if layer not in self._runs:
            return False
        number, run = self._runs[layer]
        into = self._memory[number % len(self._memory)]
        run.copy_to(into)
        self.layers.update(enumerate(run.views(into), run.first))
        return True

    def hand_over(self, arrival: Ready) -> None:
        """Hand the copy over to whoever wants it, when all layers are enqueued."""
        if isinstance(self._source, WantedLayers):
            own = arrival._replace(stream=devices.current_stream(arrival.device))
            self._source.on_copied(tuple(self.layers[index] for index in range(len(self.layers))), (own,))
