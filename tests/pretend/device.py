"""The pretend device itself: it is on inside a `with`, and every operation on its tensors comes by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretend.attention import fused
from pretend.memory import Memory
from pretend.patches import Patches
from pretend.seen import CAT_BATCH, FREE, KERNELS, SYNCING
from pretend.streams import On
from pretend.tensor import PretendTensor, set_up, tensors_in, unwrap

CPU_INDEX = frozenset(["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"])
COPIES = frozenset(["copy_", "copy", "_to_copy", "_copy_from"])
SCALARS = frozenset(
    ["masked_fill", "masked_fill_", "fill_", "where", "lerp", "clamp", "fill"]
)  # take 0-dim tensors of the CPU
UNWRITTEN = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])


class PretendDevice(Memory):
    """Context in which the device exists.

    Args:
        count: how many devices there are.
        kind: their type: `cuda`, `xpu` or `mps`.
        strict: whether an operation across devices raises, as on a GPU; else it is only written down.
        project: as in `Book`.
    """

    def __init__(
        self, count: int = 1, kind: str = "cuda", strict: bool = True, project: tuple[str, ...] = ("/chunkcache/",)
    ) -> None:
        super().__init__(kind, strict, project)
        self.count = count
        self._patches = Patches(self)

    def __enter__(self) -> PretendDevice:
        import torch._dynamo  # noqa: F401 - lists torch's functions when it is imported: before they are patched

        set_up()
        On.device = self
        self._patches.apply()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patches.undo()
        On.device = None

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU tensors behind, check it and count it."""
        name = func._schema.name.partition("::")[2]
        tensors = list(tensors_in((args, tuple(kwargs.values()))))
        ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        for tensor in ours:
            tensor.allocation.read()
        if name in COPIES:
            return self._copy(name, args, kwargs)
        self._check(func, name, args, ours, [t for t in tensors if not isinstance(t, PretendTensor)])
        device = kwargs.get("device")
        to_cpu = device is not None and torch.device(device).type == "cpu"
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        self._count(name, args, ours)
        out = _run(func, name, unwrap(args), {key: unwrap(value) for key, value in kwargs.items()})
        return out if to_cpu else self._wrap(name, out, ours)

    def _copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
        if name == "_to_copy":
            device = kwargs.get("device")
            target = args[0].device if device is None else torch.device(device)
            return self.move(args[0], target, kwargs.get("dtype"), bool(kwargs.get("non_blocking")), copy=True)
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        return self.copy_between(args[0], args[1], bool(non_blocking))

    def _count(self, name: str, args: Any, ours: list[PretendTensor]) -> None:
        """Count the launches of an operation, and whether the host waits for it."""
        if name in CPU_INDEX:
            masks = [t for t in tensors_in(args[1]) if t.dtype in (torch.bool, torch.uint8)]
            if any(isinstance(t, PretendTensor) for t in masks):
                self.sync(f"{name} by a boolean mask (nonzero)")
                self.launched("nonzero", KERNELS["nonzero"] * len(masks))
        if name == "isin" and args[1].numel() >= int(10.0 * args[0].numel() ** 0.145):
            self.sync("isin of many (sorts: unique)")  # few are compared one by one
        elif name in SYNCING:
            self.sync(name)
        if name == "cat":
            parts = sum(part.numel() > 0 for part in args[0])
            self.launched(name, -(-parts // CAT_BATCH))
        elif name not in FREE and not (name == "clone" and not ours):
            self.launched(name, KERNELS.get(name, 1))

    def _wrap(self, name: str, out: Any, ours: list[PretendTensor]) -> Any:
        if isinstance(out, (list, tuple)):
            return type(out)(self._wrap(name, each, ours) for each in out)
        if not isinstance(out, Tensor):
            return out
        for tensor in ours:  # in place, or an out=
            if tensor.elem is out:
                if tuple(tensor.shape) != tuple(out.shape):
                    raise NotImplementedError(f"{name} changed a tensor's shape in place")
                tensor.allocation.written()
                return tensor
        allocation = None
        if out.numel():
            at = out.untyped_storage().data_ptr()
            allocation = next((t.allocation for t in ours if t.elem.untyped_storage().data_ptr() == at), None)
        wrapped = PretendTensor(out, ours[0].index_ if ours else 0, allocation)
        if allocation is None and name not in UNWRITTEN:
            wrapped.allocation.written()
        return wrapped

    def _check(self, func: Any, name: str, args: Any, ours: list[PretendTensor], theirs: list[Tensor]) -> None:
        """Write down, and refuse if strict, an operation across devices."""
        devices = sorted({tensor.index_ for tensor in ours})
        if len(devices) > 1 and name not in CPU_INDEX:
            self.mixed(name, " and ".join(f"{self.kind}:{index}" for index in devices))
        if not ours or not theirs or name in ("record_stream", "is_pinned"):
            return
        if name in CPU_INDEX:
            self._check_index(name, args)
            return
        pointwise = torch.Tag.pointwise in func.tags or name in SCALARS
        into_cpu = name.endswith("_") and not isinstance(args[0], PretendTensor)
        if not pointwise or into_cpu or any(tensor.ndim for tensor in theirs):
            self.mixed(name, f"{self.kind} and cpu")

    def _check_index(self, name: str, args: Any) -> None:
        """An index may be on the CPU, what is indexed and what is put may not."""
        if not isinstance(args[0], PretendTensor):
            self.mixed(name, f"{self.kind} and cpu")
            return
        indices = [t for t in tensors_in(args[1]) if not isinstance(t, PretendTensor)]
        if indices:
            self.copied("H2D implicit, of a CPU index", sum(t.nbytes for t in indices))
            self.sync(f"{name} by a CPU index tensor (implicit H2D)")
        if any(t.ndim for t in tensors_in(args[2:]) if not isinstance(t, PretendTensor)):
            self.mixed(name, f"{self.kind} and cpu")


def _run(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "histc" and not args[0].is_floating_point():  # CUDA counts integers, too
        return func(args[0].float(), *args[1:]).to(args[0].dtype)
    return fused(func)(*args, **kwargs)
