"""A pretend CUDA device: tensors that say they live on cuda:0 (or cuda:1 …) and compute on the CPU.

It needs no GPU, no compiler and no CUDA build of PyTorch. What it does:

- an operation whose tensors live on different devices raises as CUDA would (0-dim CPU tensors, CPU index tensors and
  copies are let through, as there), and is written down as a violation;
- what makes the host wait for the device is counted, with the line of the project that asked for it: `.item()`,
  `.tolist()`, `.cpu()`, `nonzero`, boolean masks, `torch.tensor(..., device=)`, pageable copies …;
- kernel launches are counted, by the line of the project that caused them;
- streams are kept apart: a tensor written on one stream and read on another without an event between is a violation
  (a data race on a GPU), and so is one that is freed while a stream that was not `record_stream`ed may still read it;
- `pin_memory()` is remembered, so that copies are told apart: pinned and asynchronous, pinned and blocking, pageable.

How: a wrapper subclass (`torch.Tensor._make_wrapper_subclass`) over a CPU tensor, whose C++ device is PrivateUse1 with
the Python device guard that torch ships (`_setup_privateuseone_for_python_backend`, torch >= 2.9), and whose `.device`
in Python says `cuda:0`. Factories (`torch.arange(..., device=)`) and `torch.cuda.*` are patched while it is on.

    with PretendDevice() as device:
        model = model.to("cuda:0")
        ...
        with device.watch() as seen:
            llm.prefill(question, chunks)
        print(seen.syncs, seen.launches)
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from pretend_attention import PATCHED, fused
from torch import Tensor

aten = torch.ops.aten

# ---------------------------------------------------------------- what costs nothing, and what costs more than one

_FREE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "select", "slice", "transpose", "permute", "t", "expand",
    "unsqueeze", "squeeze", "as_strided", "detach", "alias", "split", "split_with_sizes", "chunk", "unbind", "diagonal",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "lift", "unfold", "narrow",
    "view_as", "expand_as", "numel", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "movedim", "swapaxes",
    "is_same_size", "_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory",
}  # fmt: skip
_KERNELS = {"sort": 4, "topk": 3, "argsort": 4, "nonzero": 4, "unique2": 8, "_unique2": 8, "unique_dim": 10, "isin": 10,
            "cumsum": 2, "masked_select": 6, "aminmax": 1, "std": 1, "norm": 1}  # fmt: skip
_SYNCING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
            "is_nonzero", "isin", "bincount", "histc", "multinomial_"}  # fmt: skip
_CPU_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPIES = {"copy_", "copy", "_to_copy", "_copy_from"}


class CrossDeviceError(RuntimeError):
    """What CUDA would have raised."""


@dataclass
class Seen:
    """What happened while it watched."""

    launches: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    by_line: Counter[str] = field(default_factory=Counter)  # launches
    sync_lines: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what, where)
    copies: Counter[str] = field(default_factory=Counter)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    copy_lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def syncs(self) -> int:
        """How often the host waited for the device."""
        return sum(self.sync_lines.values())

    def table(self, top: int = 12) -> str:
        """Return the figures as text."""
        lines = [f"launches {self.launches}, host syncs {self.syncs}, copies {dict(self.copies)}"]
        lines += [f"  sync  x{n:<4} {what:34s} {where}" for (what, where), n in self.sync_lines.most_common()]
        lines += [f"  copy  x{n:<4} {what:34s} {where}" for (what, where), n in self.copy_lines.most_common(top)]
        lines += [f"  VIOLATION x{n} {what}  at {where}" for (what, where), n in self.violations.most_common()]
        lines += [f"  launch x{n:<5} {where}" for where, n in self.by_line.most_common(top)]
        return "\n".join(lines)


# ---------------------------------------------------------------- streams


class _Storage:
    """What the pretend device knows of one allocation; shared by all views of it."""

    __slots__ = ("home", "used_on", "writer")

    def __init__(self, home: Stream) -> None:
        self.home = home
        self.writer: tuple[Stream, int] | None = None
        self.used_on: dict[Stream, int] = {}

    def __del__(self) -> None:
        device = _ACTIVE
        if device is None:
            return
        for stream, last in self.used_on.items():
            if stream is not self.home and last > stream.completed and last > self.home.seen.get(stream, 0):
                device.violate("freed while another stream may still use it (no record_stream)", "garbage collection")


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    _count = 0

    def __init__(self, device: Any = None, *_: Any, **__: Any) -> None:
        Stream._count += 1
        self.name = f"stream {Stream._count}"
        self.device = device
        self.seq = self.completed = 0
        self.seen: dict[Stream, int] = {}

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.at = (self, self.seq, dict(self.seen))
        event.time = time.perf_counter()
        return event

    def wait_event(self, event: Event) -> None:
        if event.at is None:
            return
        stream, seq, seen = event.at
        for other, n in {**seen, stream: seq}.items():
            self.seen[other] = max(self.seen.get(other, 0), n)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.completed = self.seq
        if _ACTIVE is not None:
            _ACTIVE.sync("stream.synchronize")

    def query(self) -> bool:
        return self.completed == self.seq


class Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at: tuple[Stream, int, dict[Stream, int]] | None = None
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        (stream or _current()).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _current()).wait_event(self)

    def synchronize(self) -> None:
        if self.at is not None:
            self.at[0].completed = max(self.at[0].completed, self.at[1])
        if _ACTIVE is not None:
            _ACTIVE.sync("event.synchronize")

    def query(self) -> bool:
        return self.at is None or self.at[0].completed >= self.at[1]

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds by the host's clock when they were recorded; both must be past, as on a GPU."""
        if not (self.query() and other.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (other.time - self.time) * 1000


_DEFAULT = Stream()
_DEFAULT.name = "default stream"
_local = threading.local()


def _current(device: Any = None) -> Stream:
    return getattr(_local, "stream", None) or _DEFAULT


@contextlib.contextmanager
def _stream_context(stream: Stream | None) -> Any:
    before = getattr(_local, "stream", None)
    if stream is not None:
        _local.stream = stream
    try:
        yield
    finally:
        _local.stream = before


# ---------------------------------------------------------------- the tensor


class PretendTensor(Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    elem: Tensor
    storage_: _Storage
    index_: int

    @staticmethod
    def __new__(cls, elem: Tensor, index: int = 0, storage: _Storage | None = None) -> PretendTensor:
        out = Tensor._make_wrapper_subclass(
            cls, elem.shape, strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=torch.device("pretend", 0), requires_grad=elem.requires_grad,
        )  # fmt: skip
        out.elem = elem.detach() if elem.requires_grad else elem
        out.index_ = index
        out.storage_ = storage or _Storage(_current())
        return out

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.elem}, device='cuda:{self.index_}')"

    device = property(lambda self: torch.device("cuda", self.index_))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.index_

    def tolist(self) -> Any:
        device = _active()
        device.read(self)
        device.sync("tolist", self)
        return self.elem.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host first")

    def __setitem__(self, index: Any, value: Any) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        basic = all(part is None or part is ... or isinstance(part, (int, slice)) for part in parts)
        if basic and isinstance(value, (bool, int, float)):
            self[index].fill_(value)  # as CUDA does it, with the scalar on the host
        elif basic and isinstance(value, Tensor):
            self[index].copy_(value)
        else:
            super().__setitem__(
                index, torch.tensor(value, dtype=self.dtype) if isinstance(value, (int, float)) else value
            )

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def record_stream(self, stream: Stream) -> None:
        self.storage_.used_on.pop(stream, None)
        self.storage_.home.seen[stream] = 2**62  # the allocator waits for it

    def __reduce_ex__(self, proto: Any) -> Any:
        raise TypeError("a pretend tensor is not pickled")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active().dispatch(func, args, kwargs or {})


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _unwrap(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.elem
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unwrap, value))
    return value


# ---------------------------------------------------------------- factories that C++ calls by itself

_library: Any = None


def _register_factories() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        return PretendTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype()))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))

    _library.impl(
        "empty.memory_format",
        lambda size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None: empty(size, dtype),
        "PrivateUse1",
    )
    _library.impl(
        "empty_strided",
        lambda size, stride, *, dtype=None, layout=None, device=None, pin_memory=None: empty_strided(
            size, stride, dtype
        ),
        "PrivateUse1",
    )


# ---------------------------------------------------------------- the device

_ACTIVE: PretendDevice | None = None
_set_up = False


def _active() -> PretendDevice:
    if _ACTIVE is None:
        raise RuntimeError("a pretend tensor is used while no pretend device is on")
    return _ACTIVE


class PretendDevice:
    """Context in which `cuda:0` … exist. `strict` raises on a violation; else it is only written down.

    Args:
        count: how many devices there are.
        strict: whether an operation across devices raises, as on a GPU.
        project: only lines of files below these folders are named; others count for the line that called them.
    """

    def __init__(self, count: int = 1, strict: bool = True, project: tuple[str, ...] = ("/chunkcache/",)) -> None:
        self.count, self.strict, self.project = count, strict, project
        self._watching: list[Seen] = []
        self._pinned: list[Tensor] = []  # kept alive, so that no other tensor gets their address
        self._pinned_at: set[int] = set()
        self._undo: list[tuple[Any, str, Any]] = []
        self._lock = threading.RLock()
        self.total = Seen()

    # --- on and off

    def __enter__(self) -> PretendDevice:
        global _ACTIVE, _set_up
        import torch._dynamo  # noqa: F401 - it makes a list of torch's functions when it is imported: before they are patched

        if not _set_up:
            from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

            _setup_privateuseone_for_python_backend("pretend")
            _register_factories()
            _set_up = True
        _ACTIVE = self
        self._patch()
        return self

    def __exit__(self, *_: Any) -> None:
        global _ACTIVE
        for owner, name, value in reversed(self._undo):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._undo.clear()
        _ACTIVE = None

    @contextlib.contextmanager
    def watch(self) -> Any:
        """Count what happens inside."""
        seen = Seen()
        self._watching.append(seen)
        try:
            yield seen
        finally:
            self._watching.remove(seen)

    # --- writing down

    def _all(self) -> list[Seen]:
        return [self.total, *self._watching]

    def where(self) -> str:
        frame: Any = sys._getframe(1)
        outermost = "?"
        while frame is not None:
            name = frame.f_code.co_filename
            if "pretend_device" not in name and "/site-packages/" not in name and "/lib/python" not in name:
                short = "/".join(name.split("/")[-2:])
                here = f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
                if any(part in os.path.realpath(name) for part in self.project):
                    return here
                outermost = here
            frame = frame.f_back
        return f"({outermost})"

    def violate(self, what: str, where: str | None = None) -> None:
        where = where or self.where()
        with self._lock:
            for seen in self._all():
                seen.violations[(what, where)] += 1

    def sync(self, what: str, tensor: PretendTensor | None = None) -> None:
        """The host waits for the current stream."""
        stream = _current()
        stream.completed = stream.seq
        where = self.where()
        with self._lock:
            for seen in self._all():
                seen.sync_lines[(what, where)] += 1

    def copied(self, what: str, nbytes: int) -> None:
        where = self.where()
        with self._lock:
            for seen in self._all():
                seen.copies[what] += 1
                seen.copied_bytes[what] += nbytes
                seen.copy_lines[(what, where)] += 1

    def launched(self, name: str, kernels: int) -> None:
        if not kernels:
            return
        where = self.where()
        with self._lock:
            for seen in self._all():
                seen.launches += kernels
                seen.ops[name] += kernels
                seen.by_line[where] += kernels

    # --- streams

    def read(self, tensor: PretendTensor) -> None:
        stream, storage = _current(), tensor.storage_
        storage.used_on[stream] = stream.seq + 1
        if storage.writer is None:
            return
        writer, seq = storage.writer
        if writer is not stream and seq > writer.completed and stream.seen.get(writer, 0) < seq:
            self.violate(f"read on the {stream.name} what the {writer.name} wrote, with no event between")

    def written(self, tensor: PretendTensor) -> None:
        stream = _current()
        stream.seq += 1
        tensor.storage_.writer = (stream, stream.seq)
        tensor.storage_.used_on[stream] = stream.seq

    # --- operations

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        ours = [t for t in tensors if isinstance(t, PretendTensor)]
        theirs = [t for t in tensors if not isinstance(t, PretendTensor)]
        for tensor in ours:
            self.read(tensor)
        if name in _COPIES:
            return self._copy(func, name, args, kwargs)
        index = ours[0].index_ if ours else 0
        self._check(func, name, args, ours, theirs)
        device = kwargs.get("device")
        to_cpu = device is not None and torch.device(device).type == "cpu"
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        if name in _CPU_INDEX:
            masks = [t for t in _tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
            if any(isinstance(t, PretendTensor) for t in masks):
                self.sync(f"{name} by a boolean mask (nonzero)")
                self.launched("nonzero", _KERNELS["nonzero"] * len(masks))
        if name == "isin":  # few elements to look for are compared one by one, many are sorted: `unique`
            few = args[1].numel() < int(10.0 * args[0].numel() ** 0.145)
            if not few:
                self.sync("isin of many (sorts: unique)")
            kwargs = dict(kwargs)
        elif name in _SYNCING:
            self.sync(name)
        plain = _unwrap(args)
        if name == "histc" and not plain[0].is_floating_point():  # CUDA counts integers, too
            out = func(plain[0].float(), *plain[1:]).to(plain[0].dtype)
        else:
            out = fused(func)(*plain, **{key: _unwrap(value) for key, value in kwargs.items()})
        free = name in _FREE or (name == "clone" and not ours)
        self.launched(name, 0 if free else _KERNELS.get(name, 1))
        if to_cpu:
            return out
        return self._wrap(func, name, out, ours, index, free)

    def _wrap(self, func: Any, name: str, out: Any, ours: list[PretendTensor], index: int, free: bool) -> Any:
        if isinstance(out, (list, tuple)):
            return type(out)(self._wrap(func, name, each, ours, index, free) for each in out)
        if not isinstance(out, Tensor):
            return out
        for tensor in ours:  # in place, or an out=
            if tensor.elem is out:
                if tuple(tensor.shape) != tuple(out.shape):
                    raise NotImplementedError(f"{name} changed a tensor's shape in place")
                self.written(tensor)
                return tensor
        storage = None
        if out.numel():
            at = out.untyped_storage().data_ptr()
            storage = next((t.storage_ for t in ours if t.elem.untyped_storage().data_ptr() == at), None)
        wrapped = PretendTensor(out, index, storage)
        if storage is None and name not in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            self.written(wrapped)
        return wrapped

    def _check(self, func: Any, name: str, args: Any, ours: list[PretendTensor], theirs: list[Tensor]) -> None:
        devices = {t.index_ for t in ours}
        if len(devices) > 1 and name not in _CPU_INDEX:
            scalars = [t for t in ours if t.ndim == 0]
            if {t.index_ for t in ours if t.ndim} and not scalars:
                self._mixed(name, "cuda:" + " and cuda:".join(map(str, sorted(devices))))
            else:
                self._mixed(name, "two cuda devices")
        if not ours or not theirs:
            return
        pointwise = torch.Tag.pointwise in func.tags or name in ("masked_fill", "masked_fill_", "fill_", "where",
                                                                  "lerp", "clamp", "fill")  # fmt: skip
        if name in _CPU_INDEX:
            if isinstance(args[0], PretendTensor):
                indices = [t for t in _tensors(args[1]) if not isinstance(t, PretendTensor)]
                if indices:
                    self.copied("H2D implicit, of a CPU index", sum(t.nbytes for t in indices))
                    self.sync(f"{name} by a CPU index tensor (implicit H2D)")
                values = [t for t in _tensors(args[2:]) if not isinstance(t, PretendTensor) and t.ndim]
                if not values:
                    return
            self._mixed(name, "cuda and cpu")
            return
        if pointwise and all(t.ndim == 0 for t in theirs):
            inplace = name.endswith("_") and not isinstance(args[0], PretendTensor)
            if not inplace:
                return
        if name in ("record_stream", "is_pinned"):
            return
        self._mixed(name, "cuda and cpu")

    def _mixed(self, name: str, devices: str) -> None:
        self.violate(f"{name} of tensors on {devices}")
        if self.strict:
            raise CrossDeviceError(
                f"Expected all tensors to be on the same device, but found at least two devices, {devices}! ({name})"
            )

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in self._pinned_at

    def pin(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, PretendTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if self.is_pinned(tensor):
            return tensor
        copy = tensor.clone(memory_format=torch.contiguous_format)
        with self._lock:
            self._pinned.append(copy)
            if copy.numel():
                self._pinned_at.add(copy.untyped_storage().data_ptr())
        self.copied("host copy into pinned memory", copy.nbytes)
        return copy

    def _copy(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "_to_copy":
            source = args[0]
            device = kwargs.get("device")
            target = source.device if device is None else torch.device(device)
            non_blocking = bool(kwargs.get("non_blocking"))
            dtype = kwargs.get("dtype")
            return self.move(source, target, dtype, non_blocking, True)
        destination, source = args[0], args[1]
        non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        if isinstance(destination, PretendTensor):
            if not isinstance(source, PretendTensor):
                self._h2d(source, non_blocking)
                if source.dtype != destination.dtype or not destination.elem.is_contiguous():
                    self.launched("copy_", 1)
            else:
                if source.index_ != destination.index_:
                    self.copied("D2D between devices", source.elem.nbytes)
                self.launched("copy_", 1)
            destination.elem.copy_(_unwrap(source))
            self.written(destination)
            return destination
        self._d2h(source, non_blocking, destination)
        destination.copy_(source.elem)
        return destination

    def _h2d(self, source: Tensor, non_blocking: bool) -> None:
        if not source.numel():
            return  # nothing is copied, and nothing waited for
        if self.is_pinned(source):
            self.copied("H2D pinned, async" if non_blocking else "H2D pinned, blocking", source.nbytes)
            if not non_blocking:
                self.sync("copy to the device, blocking")
        else:
            self.copied("H2D pageable", source.nbytes)
            if not non_blocking:
                self.sync("copy to the device, blocking")

    def _d2h(self, source: PretendTensor, non_blocking: bool, destination: Tensor | None = None) -> None:
        if not source.numel():
            return
        pinned = destination is not None and self.is_pinned(destination)
        if non_blocking and (
            pinned or destination is None
        ):  # `.to("cpu", non_blocking=True)` makes pinned memory itself
            self.copied("D2H async", source.elem.nbytes)
            if destination is None:
                self.violate('`.to("cpu", non_blocking=True)`: the host may read it before it has come')
            return
        self.copied("D2H", source.elem.nbytes)  # into pageable memory CUDA waits, non_blocking or not
        self.sync("copy to the host")

    def move(self, source: Any, target: torch.device, dtype: Any, non_blocking: bool, copy: bool) -> Any:
        """`Tensor.to`."""
        if isinstance(source, PretendTensor):
            if target.type == "pretend":  # out of C++, which knows it by that name: the same device
                target = source.device
            index = 0 if target.index is None else target.index
            if target.type == "cuda" and index == source.index_:
                if dtype in (None, source.dtype) and not copy:
                    return source
                self.read(source)
                out = PretendTensor(source.elem.to(dtype or source.dtype, copy=True), index)
                self.launched("_to_copy", 1)
                self.written(out)
                return out
            self.read(source)
            if target.type == "cuda":
                self.copied("D2D between devices", source.elem.nbytes)
                out = PretendTensor(source.elem.to(dtype or source.dtype, copy=True), index)
                self.written(out)
                return out
            if target.type == "cpu":
                if dtype not in (None, source.dtype) or not source.elem.is_contiguous():
                    self.launched("_to_copy", 1)
                self._d2h(source, non_blocking)
                return source.elem.to(dtype or source.dtype, copy=True)
            return source.elem.to(target, dtype or source.dtype)
        if target.type == "cuda":
            self._h2d(source, non_blocking)
            if dtype not in (None, source.dtype):
                self.launched("_to_copy", 1)
            out = PretendTensor(
                source.detach().to(dtype or source.dtype, copy=True), 0 if target.index is None else target.index
            )
            self.written(out)
            return out
        raise AssertionError("not ours")

    # --- patches

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.append((owner, name, owner.__dict__.get(name, _MISSING)))
        setattr(owner, name, value)

    def _patch(self) -> None:
        device = self
        for name, syncs in {
            "empty": 0, "zeros": 0, "ones": 0, "full": 0, "arange": 0, "eye": 0, "rand": 0, "randn": 0, "randint": 0,
            "randperm": 0, "linspace": 0, "empty_strided": 0, "tensor": 1, "as_tensor": 1, "scalar_tensor": 0,
        }.items():  # fmt: skip
            self._set(torch, name, self._factory(name, getattr(torch, name), bool(syncs)))
        for name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
            self._set(torch, name, self._like(name, getattr(torch, name)))

        to = Tensor.to

        @functools.wraps(to)
        def patched_to(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            copy = kwargs.pop("copy", False)
            kwargs.pop("memory_format", None)
            args = tuple(args)
            if args and isinstance(args[0], Tensor):
                target, dtype, non_blocking = args[0].device, args[0].dtype, kwargs.get("non_blocking", False)
            else:
                if args and isinstance(args[0], (int,)) and not isinstance(args[0], bool):
                    args = (torch.device("cuda", args[0]), *args[1:])
                target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            mine = isinstance(self, PretendTensor)
            if target is None:
                target = self.device
            if mine or target.type == "cuda":
                return device.move(self, target, dtype, bool(non_blocking), copy)
            return to(self, target, dtype or self.dtype, bool(non_blocking), copy)

        self._set(Tensor, "to", patched_to)
        self._set(
            Tensor,
            "cuda",
            lambda t, d=None, non_blocking=False, **_: t.to(
                torch.device("cuda", d) if isinstance(d, int) else torch.device(d or "cuda:0"),
                non_blocking=non_blocking,
            ),
        )
        self._set(Tensor, "pin_memory", lambda t, *_: device.pin(t))
        self._set(Tensor, "is_pinned", lambda t, *_: device.is_pinned(t))
        self._set(Tensor, "cpu", lambda t, *_, **__: t.to(torch.device("cpu")))

        attend = torch.nn.functional.scaled_dot_product_attention

        @functools.wraps(attend)
        def patched_sdpa(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            bias = torch.nn.attention.bias.CausalBias
            if isinstance(attn_mask, bias):
                return bias._dispatch(query, key, value, attn_mask, *args, **kwargs)
            given = [t for t in (query, key, value, attn_mask) if t is not None]
            ours = [t for t in given if isinstance(t, PretendTensor)]
            if not ours:
                return attend(query, key, value, attn_mask, *args, **kwargs)
            if len(ours) != len(given) or len({t.index_ for t in ours}) > 1:
                device._mixed("scaled_dot_product_attention", "cuda and cpu")
            for tensor in ours:
                device.read(tensor)
            if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
                raise RuntimeError(
                    f"Expected attn_mask dtype to be bool or float or to match query dtype, but got {attn_mask.dtype}"
                )
            out = attend(*(None if t is None else t.elem for t in (query, key, value, attn_mask)), *args, **kwargs)
            wrapped = PretendTensor(out, ours[0].index_)
            masked = attn_mask is not None
            device.launched(
                "sdpa with a mask" if masked else "sdpa", 3 if masked else 1
            )  # bool to bias, pad, attention
            device.written(wrapped)
            return wrapped

        self._set(torch.nn.functional, "scaled_dot_product_attention", patched_sdpa)

        for owner, name, value in PATCHED:
            self._set(owner, name, value)
        nothing = lambda *_, **__: None  # noqa: E731
        cuda = torch.cuda
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: device.count, "_lazy_init": nothing,
            "is_initialized": lambda: True, "current_device": lambda: 0, "set_device": nothing,
            "Stream": Stream, "Event": Event, "stream": _stream_context, "current_stream": _current,
            "default_stream": lambda *_: _DEFAULT,
            "synchronize": lambda *_: (_current().synchronize(), None)[1],
            "get_device_name": lambda *_: "pretend H100", "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda *_: SimpleNamespace(name="pretend", total_memory=80 << 30, major=9, minor=0),
            "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": nothing,
            "memory_reserved": lambda *_: 0, "empty_cache": nothing, "mem_get_info": lambda *_: (80 << 30, 80 << 30),
            "manual_seed": nothing, "manual_seed_all": nothing, "is_bf16_supported": lambda *_, **__: True,
        }.items():  # fmt: skip
            self._set(cuda, name, value)
        self._set(torch.accelerator, "is_available", lambda *_: True)
        self._set(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))

    def _factory(self, name: str, make: Any, syncs: bool) -> Any:
        device = self

        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            where = kwargs.get("device")
            where = torch.device("cuda", where) if isinstance(where, int) else where
            if where is None or torch.device(where).type != "cuda":
                if where is None and name == "as_tensor" and args and isinstance(args[0], PretendTensor):
                    return args[0]
                return make(*args, **kwargs)
            if name == "as_tensor" and args and isinstance(args[0], Tensor):
                return args[0].to(where, kwargs.get("dtype"))
            target = torch.device(where)
            if (target.index or 0) >= device.count:
                raise RuntimeError("CUDA error: invalid device ordinal")
            kwargs = {**kwargs, "device": torch.device("cpu")}
            pinned = kwargs.pop("pin_memory", False)
            out = make(*args, **kwargs)
            if pinned:
                return device.pin(out)
            wrapped = PretendTensor(out, target.index or 0)
            if syncs and not out.numel():
                pass
            elif syncs:
                device.copied("H2D pageable", out.nbytes)
                device.sync(f"torch.{name}(..., device=cuda)")
            else:
                device.launched(name, 0 if name.startswith("empty") else 1)
            if not name.startswith("empty"):
                device.written(wrapped)
            return wrapped

        return made

    def _like(self, name: str, make: Any) -> Any:
        device = self

        @functools.wraps(make)
        def made(like: Tensor, *args: Any, **kwargs: Any) -> Any:
            where = kwargs.pop("device", None)
            target = like.device if where is None else torch.device(where)
            if target.type != "cuda":
                out = make(_unwrap(like), *args, **kwargs)
                return out
            out = make(_unwrap(like), *args, **kwargs)
            wrapped = PretendTensor(out, target.index or 0)
            device.launched(name, 0 if name.startswith("empty") else 1)
            if not name.startswith("empty"):
                device.written(wrapped)
            return wrapped

        return made


_MISSING = object()
