"""The store of a model that no other was named for: by what memory its devices and the machine have free."""

from __future__ import annotations

import torch

from chunkcache.kv import device as devices

ON_CPU = "memory://?max_bytes=2GiB"
SHARE = 4  # of what is free, the tier takes one part in so many
_LEAST = 2**26


def default_store(places: set[torch.device]) -> str:
    """Return the URL of the store for a model whose weights are on `places`.

    On CUDA that is a device tier of a quarter of the memory that is free there now, with a memory tier of a quarter
    of the free RAM below it; elsewhere, and where the system does not say how much is free, 2 GiB of memory. That it
    fits is untested on a GPU.
    """
    free_ram = devices.free_ram()
    if not free_ram or not all(map(devices.has_streams, places)):
        return ON_CPU
    there = _size(sum(map(devices.free_bytes, places)))
    where = f"device={next(iter(places))}&" if len(places) == 1 else ""  # of several, each keeps its own
    return f"tiered:device://?{where}max_bytes={there}|memory://?max_bytes={_size(free_ram)}"


def _size(free: int) -> str:
    return f"{max(free // SHARE, _LEAST) >> 20}MiB"
