"""The tensor of a pretend device: a CPU tensor that says it is elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretend.streams import Allocation, On, Stream

if TYPE_CHECKING:
    from pretend.device import PretendDevice

_library: Any = None


def active() -> PretendDevice:
    """Return the pretend device that is on."""
    if On.device is None:
        raise RuntimeError("a pretend tensor is used while no pretend device is on")
    return On.device


class PretendTensor(Tensor):
    """A CPU tensor that says it is on another device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    elem: Tensor
    allocation: Allocation
    index_: int
    kind: str

    @staticmethod
    def __new__(cls, elem: Tensor, index: int = 0, allocation: Allocation | None = None) -> PretendTensor:
        kind = active().kind
        if kind == "mps" and elem.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64. Please use float32 instead.")
        out = Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=torch.device("pretend", 0),
            requires_grad=elem.requires_grad,
        )
        out.elem = elem.detach() if elem.requires_grad else elem
        out.index_ = index
        out.kind = kind
        out.allocation = allocation or Allocation()
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.elem}, device='{self.device}')"

    device = property(lambda self: torch.device(self.kind, self.index_))  # type: ignore[assignment]
    is_cuda = property(lambda self: self.kind == "cuda")  # type: ignore[assignment]
    is_mps = property(lambda self: self.kind == "mps")  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.index_

    def tolist(self) -> Any:
        self.allocation.read()
        active().sync("tolist")
        return self.elem.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it to host first"
        )

    def __setitem__(self, index: Any, value: Any) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        basic = all(part is None or part is ... or isinstance(part, (int, slice)) for part in parts)
        if basic and isinstance(value, (bool, int, float)):
            self[index].fill_(value)  # as CUDA does it, with the scalar on the host
        elif basic and isinstance(value, Tensor):
            self[index].copy_(value)
        else:
            scalar = isinstance(value, (int, float))
            super().__setitem__(index, torch.tensor(value, dtype=self.dtype) if scalar else value)

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def record_stream(self, stream: Stream) -> None:
        self.allocation.record_stream(stream)

    def __reduce_ex__(self, proto: Any) -> Any:
        raise TypeError("a pretend tensor is not pickled")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().dispatch(func, args, kwargs or {})


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def unwrap(value: Any) -> Any:
    """Return nested lists and tuples with the CPU tensors behind pretend ones."""
    if isinstance(value, PretendTensor):
        return value.elem
    if isinstance(value, (list, tuple)):
        return type(value)(map(unwrap, value))
    return value


def set_up() -> None:
    """Register the device and the factories that C++ calls by itself; once in a process."""
    global _library
    if _library is not None:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("pretend")
    _library = torch.library.Library("aten", "IMPL")

    def empty(
        size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
        memory_format: Any = None,
    ) -> Tensor:  # fmt: skip
        return PretendTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype()))

    def empty_strided(
        size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
    ) -> Tensor:
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))

    _library.impl("empty.memory_format", empty, "PrivateUse1")
    _library.impl("empty_strided", empty_strided, "PrivateUse1")
