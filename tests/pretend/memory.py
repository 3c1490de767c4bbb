"""Copies between host and pretend device, and page-locked memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretend.book import Book
from pretend.tensor import PretendTensor, unwrap


class Memory(Book):
    """Moves tensors and remembers which memory is page-locked.

    Args:
        kind: type of the device.
        strict: as in `Book`.
        project: as in `Book`.
    """

    def __init__(self, kind: str, strict: bool, project: tuple[str, ...]) -> None:
        super().__init__(strict, project)
        self.kind = kind
        self._pinned: list[Tensor] = []  # kept alive, so that no other tensor gets their address
        self._pinned_at: set[int] = set()

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and unwrap(tensor).untyped_storage().data_ptr() in self._pinned_at

    def pin(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in page-locked memory, copied there if it is not."""
        if isinstance(tensor, PretendTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if self.is_pinned(tensor):
            return tensor
        copy = self.note_pinned(tensor.clone(memory_format=torch.contiguous_format))
        self.copied("host copy into pinned memory", copy.nbytes)
        return copy

    def note_pinned(self, tensor: Tensor) -> Tensor:
        """Take the memory of `tensor` for page-locked from here on."""
        if self.kind == "mps":
            raise RuntimeError("Cannot access accelerator device when none is available.")
        with self._lock:
            self._pinned.append(tensor)
            if tensor.numel():
                self._pinned_at.add(tensor.untyped_storage().data_ptr())
        return tensor

    def move(self, source: Tensor, target: torch.device, dtype: Any, non_blocking: bool, copy: bool) -> Tensor:
        """`Tensor.to`, of a pretend tensor or onto a pretend device."""
        dtype = dtype or source.dtype
        if isinstance(source, PretendTensor):
            if target.type == "pretend":  # out of C++, which knows it by that name: the same device
                target = source.device
            if target.type == self.kind:
                return self._within(source, target.index or 0, dtype, copy)
            source.allocation.read()
            if target.type == "cpu":
                if dtype != source.dtype or not source.elem.is_contiguous():
                    self.launched("_to_copy", 1)
                self._to_host(source, non_blocking)
            return source.elem.to(target, dtype, copy=True)
        self._to_device(source, non_blocking)
        if dtype != source.dtype:
            self.launched("_to_copy", 1)
        return self._fresh(source.detach().to(dtype, copy=True), target.index or 0)

    def copy_between(self, destination: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        """`Tensor.copy_`, one of the two being a pretend tensor."""
        if not isinstance(destination, PretendTensor):
            assert isinstance(source, PretendTensor)
            self._to_host(source, non_blocking, destination)
            destination.copy_(source.elem)
            return destination
        if isinstance(source, PretendTensor):
            if source.index_ != destination.index_:
                self.copied("D2D between devices", source.elem.nbytes)
            self.launched("copy_", 1)
        else:
            self._to_device(source, non_blocking)
            if source.dtype != destination.dtype or not destination.elem.is_contiguous():
                self.launched("copy_", 1)
        destination.elem.copy_(unwrap(source))
        destination.allocation.written()
        return destination

    def _within(self, source: PretendTensor, index: int, dtype: torch.dtype, copy: bool) -> Tensor:
        same = index == source.index_
        if same and dtype == source.dtype and not copy:
            return source
        source.allocation.read()
        if same:
            self.launched("_to_copy", 1)
        else:
            self.copied("D2D between devices", source.elem.nbytes)
        return self._fresh(source.elem.to(dtype, copy=True), index)

    def _fresh(self, elem: Tensor, index: int) -> Tensor:
        out = PretendTensor(elem, index)
        out.allocation.written()
        return out

    def _to_device(self, source: Tensor, non_blocking: bool) -> None:
        if not source.numel():
            return  # nothing is copied, and nothing waited for
        pinned = self.is_pinned(source)
        if not non_blocking:
            self.copied("H2D pinned, blocking" if pinned else "H2D pageable", source.nbytes)
            self.sync("copy to the device, blocking")
        else:
            self.copied("H2D pinned, async" if pinned else "H2D pageable", source.nbytes)

    def _to_host(self, source: PretendTensor, non_blocking: bool, destination: Tensor | None = None) -> None:
        if not source.numel():
            return
        if non_blocking and destination is None:  # makes pinned memory itself
            self.copied("D2H async", source.elem.nbytes)
            self.violate('`.to("cpu", non_blocking=True)`: the host may read it before it has come')
        elif non_blocking and destination is not None and self.is_pinned(destination):
            self.copied("D2H async", source.elem.nbytes)
        else:  # into pageable memory CUDA waits, non_blocking or not
            self.copied("D2H", source.elem.nbytes)
            self.sync("copy to the host")
