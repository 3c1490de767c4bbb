"""Compiles the kernels for a GPU of a capability, which need not be there; prints their shared memory in bytes.

Run as a script, in a process in which Triton does not interpret.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from chunkcache.blend.triton import assembly, attention

NUMBERS = "query_head query_row key_head key_token value_head value_token output_row output_head rows"
PLACES = "target_which target_head target_token first_start second_start step"


def shared(capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> int:
    """Compile a kernel; return the bytes of shared memory that a block of it takes."""
    whole = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=whole, constexprs=constants)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


def attend(capability: int, dtype: torch.dtype, name: str, dim: int, heads_each: int) -> int:
    """Compile attention for heads of `dim`."""
    packed, columns = attention.tile_of(dtype, dim)
    tensors = dict.fromkeys(("query", "key", "value", "output"), f"*{name}")
    signature = {**tensors, "intervals": "*i64", **dict.fromkeys(NUMBERS.split(), "i32"), "scaling": "fp32"}
    constants = {"head_dim": dim, "value_dim": dim, "padded_dim": dim, "padded_value": dim, "heads_each": heads_each}
    tile = {"packed": packed, "columns": columns, "widen": False}
    return shared(capability, attention._attend, signature, {**constants, **tile})


def place(capability: int, source: Any, bits: int, pairs: int) -> int:
    """Compile the assembly of heads of 128 from what is stored as `source`."""
    tensors = {"table": "*i64", "tiles": "*i64", "cos": "*fp32", "sin": "*fp32", "target": "*bf16"}
    constants = {"source": source, "bits": bits, "pairs": pairs, "head_dim": 128, "group_tokens": assembly.GROUP}
    tile = {"tokens": assembly.TOKENS, "columns": assembly.COLUMNS, "padded_dim": 128}
    padded = {"padded_pairs": max(1, pairs), "padded_rest": 128}
    signature = {**tensors, **dict.fromkeys(PLACES.split(), "i32")}
    return shared(capability, assembly._place, signature, {**constants, **tile, **padded})


def main(capability: int) -> None:
    """Compile what models meet: bfloat16 and float32 heads, floats and codes, whole, partial and no rotation."""
    print(attend(capability, torch.bfloat16, "bf16", 128, 4))
    print(attend(capability, torch.bfloat16, "bf16", 256, 1))
    print(attend(capability, torch.float16, "fp16", 64, 7))
    print(attend(capability, torch.float32, "fp32", 16, 2))
    print(attend(capability, torch.float32, "fp32", 128, 4))
    for source, bits, pairs in ((tl.bfloat16, 0, 64), (tl.uint8, 8, 16), (tl.uint8, 4, 64), (tl.float16, 0, 0)):
        print(place(capability, source, bits, pairs))


if __name__ == "__main__":
    main(int(sys.argv[1]))
