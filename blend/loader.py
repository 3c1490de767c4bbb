"""Layer-wise loading: while layer i computes, a thread loads layer i + 1 of every span (CacheBlend, section 5.2).

Layers that are in memory on the model's device need no loader. Nor is there a thread where the model runs on the CPU
and the layers come out of the page cache: a thread that only copies takes a core from the model, and its other cores
wait for that one. The disk tier lets the system read ahead instead.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from chunkcache.kv import Layer, LazyLayers
from chunkcache.kv.clock import StageClock

LEAST_DEPTH = 2  # layers loaded ahead where loading is the faster of the two: one is in use while the next arrives


class Loader:
    """Loads the layers of several chunk KV, layer by layer, ahead of who takes them.

    It has run on the CPU only; the CUDA stream is untested.

    Args:
        sources: the layers of each chunk KV.
        device: where they are wanted.
        depth: layers loaded ahead at most.

    Attributes:
        clock: times the stage `load`.
    """

    def __init__(self, sources: Sequence[Sequence[Layer]], device: torch.device, depth: int) -> None:
        self._sources = sources
        self._device = device
        self._depth = depth
        self._changed = threading.Condition()
        self._loaded: dict[int, tuple[list[Layer], Any]] = {}
        self._taken = -1
        self._error: BaseException | None = None
        self._closed = False
        self.clock = StageClock(device)
        self._thread: threading.Thread | None = None
        if any(self._worth_a_thread(source) for source in sources):
            self._thread = threading.Thread(target=self._work, name="chunkcache-loader", daemon=True)
            self._thread.start()

    def take(self, index: int) -> list[Layer]:
        """Return layer `index` of each chunk KV; wait for it if need be. Layers are taken in order, each once.

        Raises:
            EntryLostError: one of them is damaged or gone.
        """
        if self._thread is None:
            with self.clock.stage("load"):
                return [source[index] for source in self._sources]
        with self._changed:
            self._taken = index
            self._changed.notify_all()
            self._changed.wait_for(lambda: index in self._loaded or self._error is not None)
            if self._error is not None:
                raise self._error
            layers, arrival = self._loaded.pop(index)
        if arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(arrival)
            for layer in layers:
                for part in (layer,) if isinstance(layer, torch.Tensor) else layer.parts():
                    part.record_stream(torch.cuda.current_stream(self._device))
        return layers

    def _worth_a_thread(self, source: Sequence[Layer]) -> bool:
        return self._device.type != "cpu" or not isinstance(source, LazyLayers) or source.waits

    def close(self) -> None:
        """Stop loading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            stream = _new_stream(self._device) if self._device.type == "cuda" else None
            for index in range(min(map(len, self._sources))):
                with self._changed:
                    while not self._closed and index > self._taken + self._depth:
                        self._changed.wait()
                    if self._closed:
                        return
                with torch.cuda.stream(stream):
                    with self.clock.stage("load"):  # in the stream that copies
                        layers = [source[index].to(self._device, non_blocking=True) for source in self._sources]
                    arrival = stream.record_event() if stream is not None else None
                with self._changed:
                    self._loaded[index] = layers, arrival
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - carried over to who takes
            with self._changed:
                self._error = error
                self._changed.notify_all()


def _new_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)
