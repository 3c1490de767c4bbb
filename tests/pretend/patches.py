"""What is patched while a pretend device is on: factories, moves, attention, and the device's module in torch."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from pretend.attention import PATCHED
from pretend.streams import DEFAULT, Event, Stream, current_stream, stream_context
from pretend.tensor import PretendTensor, unwrap

if TYPE_CHECKING:
    from pretend.device import PretendDevice

MISSING = object()
MEMORY = 80 << 30
MAKERS = [
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "linspace",
    "empty_strided",
    "scalar_tensor",
]
UPLOADS = ("tensor", "as_tensor")  # make it on the host, and copy it
LIKES = ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"]


class Patches:
    """The patches of one pretend device; global, so that they hold in every thread."""

    def __init__(self, device: PretendDevice) -> None:
        self._device = device
        self._undo: list[tuple[Any, str, Any]] = []

    def apply(self) -> None:
        for name in (*MAKERS, *UPLOADS):
            self._set(torch, name, self._factory(name, getattr(torch, name)))
        for name in LIKES:
            self._set(torch, name, self._like(name, getattr(torch, name)))
        self._patch_moves()
        functional = torch.nn.functional
        attend = self._attention(functional.scaled_dot_product_attention)
        self._set(functional, "scaled_dot_product_attention", attend)
        for owner, name, value in PATCHED:
            self._set(owner, name, value)
        kind = self._device.kind
        self._set(torch, "Event", Event)
        self._set(torch.accelerator, "is_available", lambda *_: True)
        self._set(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(kind))
        if kind == "mps":
            self._patch_mps()
        else:
            self._patch_module(getattr(torch, kind))

    def undo(self) -> None:
        for owner, name, value in reversed(self._undo):
            if value is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._undo.clear()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, owner.__dict__.get(name, MISSING)))
        setattr(owner, name, value)

    def _ours(self, where: Any) -> torch.device | None:
        """Return a device as such, if it is the pretend one."""
        where = torch.device(self._device.kind, where) if isinstance(where, int) else where
        if where is None or torch.device(where).type != self._device.kind:
            return None
        return torch.device(where)

    def _patch_moves(self) -> None:
        device, own = self._device, Tensor.to

        @functools.wraps(own)
        def to(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            copy = kwargs.pop("copy", False)
            kwargs.pop("memory_format", None)
            if args and isinstance(args[0], Tensor):
                target, dtype, non_blocking = args[0].device, args[0].dtype, kwargs.get("non_blocking", False)
            else:
                if args and isinstance(args[0], int) and not isinstance(args[0], bool):
                    args = (torch.device(device.kind, args[0]), *args[1:])
                target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            target = self.device if target is None else target
            if isinstance(self, PretendTensor) or target.type == device.kind:
                return device.move(self, target, dtype, bool(non_blocking), copy)
            return own(self, target, dtype or self.dtype, bool(non_blocking), copy)

        def cuda(self: Tensor, where: Any = None, non_blocking: bool = False, **_: Any) -> Any:
            target = torch.device("cuda", where) if isinstance(where, int) else torch.device(where or "cuda:0")
            return self.to(target, non_blocking=non_blocking)

        self._set(Tensor, "to", to)
        self._set(Tensor, "cuda", cuda)
        self._set(Tensor, "cpu", lambda tensor, *_, **__: tensor.to(torch.device("cpu")))
        self._set(Tensor, "pin_memory", lambda tensor, *_: device.pin(tensor))
        self._set(Tensor, "is_pinned", lambda tensor, *_: device.is_pinned(tensor))

    def _attention(self, own: Any) -> Any:
        device = self._device

        @functools.wraps(own)
        def attend(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            if isinstance(attn_mask, CausalBias) and isinstance(query, PretendTensor):
                return CausalBias._dispatch(query, key, value, attn_mask, *args, **kwargs)  # calls kernels by name
            mask = attn_mask._materialize(query.device) if isinstance(attn_mask, CausalBias) else attn_mask
            given = [tensor for tensor in (query, key, value, mask) if tensor is not None]
            ours = [tensor for tensor in given if isinstance(tensor, PretendTensor)]
            if not ours:
                return own(query, key, value, mask, *args, **kwargs)
            if len(ours) != len(given) or len({tensor.index_ for tensor in ours}) > 1:
                device.mixed("scaled_dot_product_attention", " and ".join(sorted({str(t.device) for t in given})))
            for tensor in ours:
                tensor.allocation.read()
            if mask is not None and mask.dtype not in (torch.bool, query.dtype, torch.float32):
                raise RuntimeError(
                    f"Expected attn_mask dtype to be bool or float or to match query dtype, but got {mask.dtype}"
                )
            out = PretendTensor(own(*map(unwrap, (query, key, value, mask)), *args, **kwargs), ours[0].index_)
            device.launched("sdpa" if mask is None else "sdpa with a mask", 1 if mask is None else 3)  # bias, pad
            out.allocation.written()
            return out

        return attend

    def _factory(self, name: str, make: Any) -> Any:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            target = self._ours(kwargs.get("device"))
            if target is not None:
                return self._make_there(name, make, target, args, kwargs)
            if name == "as_tensor" and kwargs.get("device") is None and args and isinstance(args[0], PretendTensor):
                return args[0]
            if kwargs.pop("pin_memory", False):
                return self._device.note_pinned(make(*args, **kwargs))
            return make(*args, **kwargs)

        return made

    def _make_there(self, name: str, make: Any, target: torch.device, args: Any, kwargs: Any) -> Tensor:
        device = self._device
        if name == "as_tensor" and args and isinstance(args[0], Tensor):
            return args[0].to(target, kwargs.get("dtype"))
        if (target.index or 0) >= device.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        elem = make(*args, **{**kwargs, "device": torch.device("cpu")})
        if name in UPLOADS and elem.numel():
            device.copied("H2D pageable", elem.nbytes)
            device.sync(f"torch.{name}(..., device={target.type})")
        return self._wrapped(name, elem, target)

    def _like(self, name: str, make: Any) -> Any:
        @functools.wraps(make)
        def made(like: Tensor, *args: Any, **kwargs: Any) -> Any:
            target = self._ours(kwargs.pop("device", like.device))
            elem = make(unwrap(like), *args, **kwargs)
            return elem if target is None else self._wrapped(name, elem, target)

        return made

    def _wrapped(self, name: str, elem: Tensor, target: torch.device) -> Tensor:
        out = PretendTensor(elem, target.index or 0)
        if not name.startswith("empty"):
            self._device.launched(name, 0 if name in UPLOADS else 1)
            out.allocation.written()
        return out

    def _patch_module(self, module: Any) -> None:
        """Patch `torch.cuda` or `torch.xpu`."""
        count = self._device.count
        properties = SimpleNamespace(name="pretend", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132)
        answers: dict[str, Any] = {
            "is_available": True,
            "is_initialized": True,
            "device_count": count,
            "current_device": 0,
            "default_stream": DEFAULT,
            "get_device_name": "pretend H100",
            "get_device_capability": (9, 0),
            "get_device_properties": properties,
            "mem_get_info": (MEMORY, MEMORY),
            "is_bf16_supported": True,
            "is_current_stream_capturing": False,
        }
        answers |= dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), 0)
        answers |= dict.fromkeys(("_lazy_init", "set_device", "reset_peak_memory_stats", "empty_cache"))
        answers |= dict.fromkeys(("manual_seed", "manual_seed_all", "set_sync_debug_mode"))
        for name, answer in answers.items():
            self._set(module, name, _always(answer))
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": stream_context,
            "current_stream": current_stream,
            "synchronize": lambda *_: current_stream().synchronize(),
        }.items():
            self._set(module, name, value)

    def _patch_mps(self) -> None:
        self._set(torch.backends.mps, "is_available", _always(True))
        self._set(torch.mps, "is_available", _always(True))
        self._set(torch.mps, "device_count", _always(1))
        self._set(torch.mps, "Event", Event)
        self._set(torch, "Event", Event)
        self._set(torch.mps, "synchronize", lambda *_: current_stream().synchronize())
        self._set(torch.mps, "current_allocated_memory", _always(0))
        self._set(torch.mps, "driver_allocated_memory", _always(0))
        self._set(torch.mps, "recommended_max_memory", _always(MEMORY))


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer
