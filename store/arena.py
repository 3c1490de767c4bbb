"""Page-locked memory in exact slots, cut out of a few large blocks.

Torch rounds every page-locked block up to a power of two: a layer of 2.4 MB of its own would lock 4 MiB. So blocks
are powers of two here, and slots are cut out of them. It ran on a pretend device only; it is untested on a GPU.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from chunkcache.kv import device as devices
from chunkcache.kv.transfer import ALIGNED

BLOCK_BYTES = 2**28  # locked at a time; a slot is no larger


class Arena:
    """Hands out page-locked memory up to a capacity; safe to use from several threads.

    A slot is free again when the last tensor that is a view of it has gone. Copies that are still reading it then are
    in a copy stream, and so is what writes to it next: see `chunkcache.kv.device.order_copies`.

    Args:
        capacity: bytes that are locked at most, rounded up to whole blocks, and one block more: slots leave gaps.
        allocate: returns `[bytes]` of page-locked memory, or None.
        block_bytes: size of a block, a power of two.
    """

    def __init__(
        self,
        capacity: int,
        allocate: Callable[[int], Tensor | None] = devices.page_locked,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._block_bytes = min(block_bytes, 1 << max(capacity - 1, ALIGNED).bit_length())
        self._most = -(-capacity // self._block_bytes) + 1
        self._allocate = allocate
        self._blocks: list[_Block] = []
        self._freed: deque[tuple[_Block, int, int]] = deque()  # appended to by the garbage collector, without a lock
        self._lock = threading.Lock()

    @property
    def locked(self) -> int:
        """Bytes of page-locked memory."""
        return len(self._blocks) * self._block_bytes

    @property
    def free(self) -> int:
        """Bytes of it that no slot has."""
        with self._lock:
            self._take_back()
            return sum(stop - start for block in self._blocks for start, stop in block.gaps)

    def take(self, sizes: Sequence[int]) -> list[Tensor] | None:
        """Return a slot `[bytes]` of each size, undefined; None if they do not all fit."""
        with self._lock:
            self._take_back()
            slots: list[Tensor] = []
            for size in sizes:
                slot = self._take(-(-size // ALIGNED) * ALIGNED)
                if slot is None:
                    return None  # those taken so far are free again
                slots.append(slot[:size])
            return slots

    def _take(self, size: int) -> Tensor | None:
        for block in self._blocks:
            if (start := block.cut(size)) is not None:
                return self._slot(block, start, size)
        if size > self._block_bytes or len(self._blocks) >= self._most:
            return None
        memory = self._allocate(self._block_bytes)
        if memory is None:
            self._most = len(self._blocks)  # there is no more
            return None
        self._blocks.append(block := _Block(memory))
        block.cut(size)
        return self._slot(block, 0, size)

    def _slot(self, block: _Block, start: int, size: int) -> Tensor:
        array = block.bytes[start : start + size]
        freed = weakref.finalize(array, self._freed.append, (block, start, start + size))
        freed.atexit = False
        return torch.from_numpy(array)  # it and all its views keep `array`

    def _take_back(self) -> None:
        while self._freed:
            block, start, stop = self._freed.popleft()
            block.give_back(start, stop)


class _Block:
    """One block of page-locked memory, and its gaps in order: the first that is large enough is used."""

    def __init__(self, memory: Tensor) -> None:
        self.bytes: np.ndarray[tuple[int], np.dtype[np.uint8]] = memory.numpy()
        self.gaps: list[tuple[int, int]] = [(0, len(memory))]

    def cut(self, size: int) -> int | None:
        """Take `size` bytes; return where they start, or None where no gap is that large."""
        for index, (start, stop) in enumerate(self.gaps):
            if stop - start >= size:
                self.gaps[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def give_back(self, start: int, stop: int) -> None:
        """Make a slot a gap again, one with the gaps next to it."""
        at = bisect_left(self.gaps, (start, stop))
        if at < len(self.gaps) and self.gaps[at][0] == stop:
            stop = self.gaps.pop(at)[1]
        if at and self.gaps[at - 1][1] == start:
            start = self.gaps.pop(at - 1)[0]
            at -= 1
        self.gaps.insert(at, (start, stop))
