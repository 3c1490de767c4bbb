"""The tensors of a model, down to plain memory, and their digests.

A quantised weight is a tensor subclass, or a parameter with its scales beside it; both come apart into plain tensors
here, so that codes and scales are hashed alike (torch's `__tensor_flatten__`; bitsandbytes' `quant_state`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import blake3
import torch
from torch import Tensor, nn

from chunkcache.errors import UnsupportedModelError

_PIECE = 1 << 28  # bytes that are brought from an accelerator at a time
_HOLDERS = "bitsandbytes."  # objects of these modules that hang on a parameter or module may hold tensors


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and memory of every parameter and buffer of `model`, buffers that are not saved included.

    A tied weight comes once for each of its names. A quantised one comes as the plain tensors that it consists of.
    """
    for prefix, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield from _plain(f"{prefix}.{name}", tensor)
        for name, value in vars(module).items():
            if type(value).__module__.startswith(_HOLDERS):
                yield from _held(f"{prefix}.{name}", value, set())


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        if type(tensor).__module__.startswith(_HOLDERS):
            yield from _held(name, tensor, set())
        return
    attributes, context = flatten()
    for attribute in attributes:
        yield from _plain(f"{name}.{attribute} of {type(tensor).__name__} {context}", getattr(tensor, attribute))


def _held(name: str, holder: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the attributes of an object, and of objects of the same library below it."""
    seen.add(id(holder))
    for key, value in getattr(holder, "__dict__", {}).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield f"{name}.{key}", value
        elif type(value).__module__.startswith(_HOLDERS) and id(value) not in seen:
            yield from _held(f"{name}.{key}", value, seen)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor on the CPU as bytes, without a copy where it is contiguous.

    Raises:
        UnsupportedModelError: it has no memory that can be read.
    """
    try:
        numpy: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return memoryview(numpy)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(
            f"a weight of type {type(tensor).__name__} and dtype {tensor.dtype} cannot be read as bytes ({error}), "
            "so the model cannot be told from others; load it without this quantisation"
        ) from error


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass
class _Digest:
    tensor: Tensor
    state: tuple[int, int]
    digest: bytes


@dataclass
class TensorDigests:
    """BLAKE3 digests of tensors, each computed once as long as nobody writes to the tensor."""

    _known: dict[int, _Digest] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> bytes:
        """Return the digest of a tensor's memory."""
        known = self._known.get(id(tensor))
        state = (version(tensor), tensor.data_ptr())
        if known is None or known.tensor is not tensor or known.state != state:
            known = self._known[id(tensor)] = _Digest(tensor, state, _digest(tensor))
        return known.digest

    def forget(self) -> None:
        """Forget all: something was written that torch did not count."""
        self._known.clear()

    def keep(self, tensors: list[Tensor]) -> None:
        """Forget all tensors but these."""
        kept = {id(tensor) for tensor in tensors}
        self._known = {key: value for key, value in self._known.items() if key in kept}


def _digest(tensor: Tensor) -> bytes:
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    if tensor.device.type == "cpu":
        hasher.update(raw_bytes(tensor))
    else:
        flat: Any = tensor.detach().contiguous().reshape(-1)
        for piece in flat.split(max(1, _PIECE // tensor.element_size())):
            hasher.update(raw_bytes(piece.cpu()))
    return hasher.digest()
