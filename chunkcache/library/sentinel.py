"""Notices that a model is no longer the one it was: other weights, another adapter, a hook, a changed option.

A look costs a fraction of a millisecond, so that every request can take one. It compares which objects the model
consists of, torch's count of writes to each tensor and its address, the modules' plain attributes, and the config. A
write through `.data` is counted by nobody: for that, some bytes of every tensor are compared at each look, and the
whole content in turns of `AUDIT_BYTES`. So a write to a few values of a large model through `.data` is noticed some
looks later.
"""

from __future__ import annotations

import copy
import itertools
import operator
import threading
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from chunkcache.blend.shadow import unwrapped
from chunkcache.library.tensors import model_tensors, raw_bytes

AUDIT_BYTES = 1 << 20  # of weights that a look compares whole
_SMALL = 4 << 20  # bytes of a model that every look compares all of: it has few modules, so that there is time
_BLOCK = 1 << 18
_SAMPLE = 32  # bytes of each tensor that every look compares
_TABLE = 4096  # bytes of a buffer that is compared whole instead: rotary tables are rewritten, alike, at each forward
_MARK = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_PRIVATE = frozenset(("_active_adapter", "_disable_adapters"))  # peft's, of an adapter's layers
_VOLATILE = frozenset(("max_seq_len_cached", "name_or_path", "gradient_checkpointing"))
_version = operator.attrgetter("_version")
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def is_plain(value: Any) -> bool:
    """Return whether `value` consists of numbers, texts and dtypes alone."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN)


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what decides a module's forward beside its tensors: its scale, its epsilon, its adapters and the like."""
    for name, value in vars(module).items():
        public = not name.startswith("_") and name not in _VOLATILE and name != "training"
        if (public or name in _PRIVATE) and is_plain(value):
            yield name, value


class Sentinel:
    """Watches one model; safe to use from several threads.

    Args:
        model: the model.

    Attributes:
        writes: how many of the changes were to the content of tensors, or to which there are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._state = 0
        self.writes = 0
        self._tensors: list[Tensor] = []
        self._take()

    def state(self) -> int:
        """Look at the model; return a number that is another one after each change."""
        with self._lock:
            content = self._same_samples() and self._audit()
            if not (self._same() and content):
                self._state += 1
                tensors, noted = self._tensors, (self._versions, self._pointers)
                self._take()
                stayed = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
                self.writes += not (content and stayed and noted == (self._versions, self._pointers))
            return self._state

    def renew(self) -> None:
        """Take the model for changed, whatever it looks like."""
        with self._lock:
            self._state += 1
            self._take()

    def _take(self) -> None:
        """Note the model as it is."""
        modules = [module for module in self._model.modules() if unwrapped(module) is module]
        self._vars = [vars(module) for module in modules]
        self._sizes = self._count()
        self._parts: list[Any] = [getattr(module, name) for module in modules for name in _MARK]
        self._parts += [nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks]
        self._part_copies = list(map(dict, self._parts))
        named = [(vars(module), name, value) for module in modules for name, value in plain_attributes(module)]
        self._owners, self._names = [owner for owner, _, _ in named], [name for _, name, _ in named]
        self._values = [copy.deepcopy(value) for _, _, value in named]
        self._training = [module.training for module in modules]
        self._config = getattr(self._model, "config", None)
        self._config_copy = copy.deepcopy(vars(self._config)) if self._config is not None else {}
        tensors = {id(tensor): tensor for _, tensor in model_tensors(self._model)}
        self._tensors = [tensor for tensor in tensors.values() if tensor.device.type != "meta"]
        self._tables = {id(buffer) for buffer in self._model.buffers() if buffer.nbytes <= _TABLE}
        self._counted = [t for t in self._tensors if not (t.is_inference() or id(t) in self._tables)]
        self._versions, self._pointers = self._writes()
        self._sample()

    def _same(self) -> bool:
        """Return whether nothing was replaced, and nothing written that torch counts."""
        try:
            return (
                self._parts == self._part_copies  # compares what is in them by identity first
                and self._count() == self._sizes
                and list(map(operator.getitem, self._owners, self._names)) == self._values
                and [own["training"] for own in self._vars] == self._training
                and (self._config is None or vars(self._config) == self._config_copy)
                and self._writes() == (self._versions, self._pointers)
            )
        except Exception:  # noqa: BLE001 - two different tensors, or an attribute that is gone: not the same
            return False

    def _count(self) -> list[int]:
        """Return how many attributes each module has; a `generate` in front of the model's own is not counted."""
        sizes = list(map(len, self._vars))
        sizes[0] -= "generate" in self._vars[0]
        return sizes

    def _writes(self) -> tuple[list[int], list[int]]:
        return list(map(_version, self._counted)), list(map(Tensor.data_ptr, self._tensors))

    # --- content

    def _sample(self) -> None:
        """Note some bytes of each tensor, and divide all of them into blocks."""
        mapped = [tensor for tensor in self._tensors if _is_mapped(tensor)]
        here = [raw_bytes(tensor) for tensor in mapped]
        whole = [id(tensor) in self._tables for tensor in mapped]
        self._samples = [raw if w else raw[len(raw) // 2 :][:_SAMPLE] for raw, w in zip(here, whole, strict=True)]
        self._bytes = b"".join(self._samples)
        self._far: dict[torch.device, list[Tensor]] = {}
        for tensor in self._tensors:
            if tensor.device.type != "cpu" and tensor.numel():
                self._far.setdefault(tensor.device, []).append(_middle(tensor, id(tensor) in self._tables))
        self._far_bytes = [torch.cat(parts) for parts in self._far.values()]
        self._blocks = [raw[at : at + _BLOCK] for raw in here for at in range(0, len(raw), _BLOCK)]
        self._digests: list[int | None] = [None] * len(self._blocks)
        total = sum(map(len, here))
        self._share = total if total <= _SMALL else AUDIT_BYTES
        self._turn = itertools.cycle(range(len(self._blocks)))
        self._audit()

    def _same_samples(self) -> bool:
        if b"".join(self._samples) != self._bytes:
            return False
        found = map(torch.cat, self._far.values())
        return all(map(torch.equal, found, self._far_bytes))

    def _audit(self) -> bool:
        """Compare the next blocks with what they were, where they have been seen; return whether they agree."""
        done = 0
        for index in itertools.islice(self._turn, len(self._blocks)):
            block = self._blocks[index]
            digest = xxhash.xxh3_64_intdigest(block)
            known, self._digests[index] = self._digests[index], digest
            if known is not None and known != digest:
                return False
            done += len(block)
            if done >= self._share:
                break
        return True


def _is_mapped(tensor: Tensor) -> bool:
    """Return whether the bytes of a tensor can be looked at where they are."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.is_contiguous()


def _middle(tensor: Tensor, whole: bool) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    if whole:
        return flat.view(torch.uint8)
    count = max(1, _SAMPLE // flat.element_size())
    return flat[flat.numel() // 2 :][:count].view(torch.uint8)
