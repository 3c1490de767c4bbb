"""The attention kernels of CUDA that the project calls by name, on the CPU, as strict as they are there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.attention.bias
from torch import Tensor

LOWER_RIGHT = 2  # `custom_mask_type` of a causal bias

attend = torch.nn.functional.scaled_dot_product_attention


def _flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None) -> Tensor:
    """Causal attention to the lower right, which takes grouped heads."""
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return attend(query, key, value, seen, scale=scale, enable_gqa=True)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *_: Any, scale: float | None = None) -> Tensor:
    if not query.shape[1] == key.shape[1] == value.shape[1]:
        raise RuntimeError("the efficient kernel takes as many heads of keys and values as of queries")
    if mask.dtype != query.dtype or any(stride % 8 for stride in mask.stride()[:-1]):
        raise RuntimeError("the mask is of another dtype than the query, or its rows are not aligned")
    return attend(query, key, value, mask, scale=scale)


def _lower_right(
    query: Tensor, key: Tensor, value: Tensor, *others: Any, scale: float | None = None, **_: Any
) -> Tensor:
    """What a causal bias calls, with heads behind rows."""
    if others[6] != LOWER_RIGHT or query.shape[2] != key.shape[2]:
        raise RuntimeError("this kernel is called for causal attention to the lower right, without grouped heads")
    moved = (part.transpose(1, 2) for part in (query, key, value))
    return _flash(*moved, scale=scale).transpose(1, 2)


_KERNELS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _masked,
    "_efficient_attention_forward": _lower_right,
}


def fused(func: Any) -> Any:
    """Return what computes the operator `func` on the CPU: another one where the CPU has none."""
    kernel = _KERNELS.get(func._schema.name.partition("::")[2])
    if kernel is None:
        return func
    kinds = [str(each.type) for each in func._schema.returns[1:]]  # what nobody here asks for

    def call(*args: Any, **kwargs: Any) -> Any:
        return (kernel(*args, **kwargs), *(torch.empty(0) if kind == "Tensor" else 0 for kind in kinds))

    return call


def flash_takes(params: Any, debug: bool = False) -> bool:
    """Stand in for `torch.backends.cuda.can_use_flash_attention`."""
    same = params.query.shape[-1] == params.value.shape[-1] <= 256
    return same and params.query.dtype != torch.float32 and params.attn_mask is None


def efficient_takes(params: Any, debug: bool = False) -> bool:
    """Stand in for `torch.backends.cuda.can_use_efficient_attention`."""
    return params.query.shape[1] == params.key.shape[1]


PATCHED = [
    (owner, name, takes)
    for owner in (torch.backends.cuda, torch.nn.attention.bias)
    for name, takes in (("can_use_flash_attention", flash_takes), ("can_use_efficient_attention", efficient_takes))
]
