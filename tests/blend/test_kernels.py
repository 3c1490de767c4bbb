"""The kernels in Triton against the torch path, in Triton's interpreter; and how they are asked for.

`make test-triton` runs all of it, in an environment that has Triton.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support.blend import decoder
from support.llm import QUESTION, TEXTS, tiny_model, wrapped
from torch import Tensor

from chunkcache.blend.assembly import place
from chunkcache.blend.attention import dense_mask, visible_intervals
from chunkcache.blend.triton import check_kernels, serve
from chunkcache.errors import InputError
from chunkcache.kv import ChunkKV, Span
from chunkcache.kv.quantised import QuantisedLayer

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1",  # which Triton reads when it is imported
    reason="Triton's interpreter is not there: make test-triton has it",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(value: Tensor, reference: Tensor) -> None:
    """Check to 1e-5 in float32, and else to the rounding of the dtype."""
    rounding = 1e-5 if value.dtype == torch.float32 else torch.finfo(value.dtype).eps
    torch.testing.assert_close(value.float(), reference.float(), atol=rounding, rtol=rounding)


# --- how they are asked for


def test_the_torch_path_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKCACHE_KERNELS", raising=False)
    assert check_kernels() == "torch"
    assert not serve(torch.device("cuda"))


def test_unknown_kernels_are_refused_at_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_KERNELS", "cutlass")
    with pytest.raises(InputError, match="'cutlass' is unknown: set it to torch or triton"):
        wrapped()


@pytest.mark.skipif(HAS_TRITON, reason="Triton is installed")
def test_kernels_without_triton_are_refused_at_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_KERNELS", "triton")
    with pytest.raises(InputError, match=r"pip install 'chunkcache\[triton\]'"):
        wrapped()


def test_kernels_run_on_accelerators_and_in_the_interpreter_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_KERNELS", "triton")
    monkeypatch.setattr("chunkcache.blend.triton.INTERPRETED", False)
    assert serve(torch.device("cuda:1"))
    assert not serve(torch.device("cpu"))
    monkeypatch.setattr("chunkcache.blend.triton.INTERPRETED", True)
    assert serve(torch.device("cpu"))


def test_nothing_imports_triton_unasked() -> None:
    code = "import sys, chunkcache.blend, chunkcache.llm; sys.exit('chunkcache.blend.triton.assembly' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# --- attention


def attended(
    heads: tuple[int, int], rows: Tensor, length: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return what the kernel and what SDPA in float32 make of random queries, keys and values."""
    from chunkcache.blend.triton.attention import attend

    draw = torch.Generator().manual_seed(length)
    query = torch.randn(1, heads[0], len(rows), head_dim, generator=draw).to(dtype)
    key, value = (torch.randn(1, heads[1], length, head_dim, generator=draw).to(dtype) for _ in range(2))
    intervals = visible_intervals(rows, window)
    wanted = F.scaled_dot_product_attention(
        query.float(),
        key.float(),
        value.float(),
        attn_mask=dense_mask(intervals, length),
        scale=0.3,
        enable_gqa=heads[0] != heads[1],
    )
    return attend(query, key, value, intervals, 0.3), wanted.transpose(1, 2)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize(
    ("heads", "length", "head_dim"),
    [((4, 2), 97, 16), ((7, 1), 130, 24), ((4, 4), 64, 64), ((6, 2), 33, 80), ((2, 1), 1, 8)],
)
def test_attention_of_scattered_rows(
    heads: tuple[int, int], length: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    rows = torch.randperm(length, generator=torch.Generator().manual_seed(1))[: max(1, length // 3)].sort().values
    close(*attended(heads, rows, length, head_dim, dtype, window))


@needs_triton
def test_attention_of_rows_that_lie_far_apart() -> None:
    close(*attended((4, 2), torch.tensor([0, 1, 150, 299]), 300, 32, torch.float32, window=5))


@needs_triton
def test_attention_reads_strided_keys_and_scales_by_the_head_size() -> None:
    from chunkcache.blend.triton.attention import attend

    query, wide = torch.randn(1, 4, 5, 16), torch.randn(2, 2, 60, 16)
    key, value = wide[:1, :, 10:50], wide[1:, :, 10:50]
    intervals = visible_intervals(torch.tensor([3, 9, 20, 21, 39]), None)
    wanted = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(intervals, 40), enable_gqa=True
    ).transpose(1, 2)
    close(attend(query, key, value, intervals), wanted)


@needs_triton
def test_attention_skips_what_no_row_of_a_tile_sees() -> None:
    from chunkcache.blend.triton.attention import attend

    query, key, value = (torch.randn(1, 2, size, 16) for size in (3, 300, 300))
    value[:, :, :64], value[:, :, 256:] = torch.nan, torch.nan  # not seen, and nothing comes of them
    intervals = visible_intervals(torch.tensor([130, 200, 250]), 60)
    assert attend(query, key, value, intervals).isfinite().all()


# --- assembly

FAMILIES = [
    "llama",
    "phi",
    "stablelm",
    "glm",
    "cohere",
    "gpt-neox",
    "llama-yarn",
]  # halves, neighbours, partly turned


def spans_of(layers_dim: tuple[int, int], dtype: torch.dtype, codecs: list[int]) -> tuple[list[Span], list[Any]]:
    """Return spans over chunks of odd lengths, some from the middle of their chunk, and the layer of each."""
    kv_heads, head_dim = layers_dim
    draw = torch.Generator().manual_seed(5)
    spans, layers, start = [], [], 3
    for number, (tokens, offset, position) in enumerate(
        ((40, 0, 0), (131, 0, 7), (77, 13, 100), (1, 0, 2), (64, 0, 400))
    ):
        dense = torch.randn(2, kv_heads, tokens, head_dim, generator=draw).to(dtype)
        bits = codecs[number % len(codecs)]
        layers.append(QuantisedLayer.of(dense, bits) if bits else dense)
        kv = ChunkKV.of(range(tokens), position, [dense])
        spans.append(Span(start, start + tokens - offset, tuple(range(tokens)), offset, kv))
        start += tokens - offset + number
    return spans, layers


def assembled(
    name: str, dtype: torch.dtype, codecs: list[int], target_dtype: torch.dtype | None = None, turned: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what the kernel and what the torch path make of these chunks, zero where there is none."""
    from chunkcache.blend.triton.assembly import Placer

    served = decoder(name)
    assert served.heads is not None
    rotary = served.rotaries[0] if turned else None
    spans, layers = spans_of(served.heads[0], dtype, codecs)
    kv_heads, head_dim = served.heads[0]
    got, wanted = (torch.zeros(2, kv_heads, spans[-1].stop + 9, head_dim, dtype=target_dtype or dtype) for _ in "12")
    Placer(spans).place(layers, rotary, got)
    for span, layer in zip(spans, layers, strict=True):
        place(span, layer, rotary, wanted[:, :, span.start : span.stop])
    return got, wanted


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_assembly_rotates_keys_to_their_places(name: str, dtype: torch.dtype) -> None:
    got, wanted = assembled(name, dtype, [0])
    close(got, wanted)
    assert torch.equal(got[1], wanted[1])


@needs_triton
@pytest.mark.parametrize("codecs", [[8], [4], [0, 8, 4]], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_assembly_dequantises_while_it_places(name: str, codecs: list[int]) -> None:
    close(*assembled(name, torch.float32, codecs))


@needs_triton
def test_assembly_of_quantised_bfloat16_rounds_once_where_torch_rounds_twice() -> None:
    got, wanted = assembled("llama", torch.bfloat16, [8, 4])
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(got.float(), wanted.float(), atol=2 * eps, rtol=2 * eps)


@needs_triton
@pytest.mark.parametrize("codecs", [[0], [8]], ids=str)
def test_assembly_without_rotation_copies(codecs: list[int]) -> None:
    close(*assembled("llama", torch.float32, codecs, turned=False))


@needs_triton
def test_assembly_into_another_dtype() -> None:
    close(*assembled("llama", torch.float16, [0], target_dtype=torch.float32))


@needs_triton
def test_assembly_reads_and_writes_strided_tensors() -> None:
    from chunkcache.blend.triton.assembly import Placer

    wide = torch.randn(2, 2, 90, 16)
    span = Span(2, 52, tuple(range(50)), 0, ChunkKV.of(range(50), 9, [wide[:, :, 20:70]]))
    room = torch.zeros(2, 2, 100, 16)
    Placer([span]).place([wide[:, :, 20:70]], None, room[:, :, 10:70])
    assert torch.equal(room[:, :, 12:62], wide[:, :, 20:70])
    assert int((room == 0).all(dim=-1).sum()) == 4 * 50


# --- what a GPU would be given


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: make test-triton has it")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(capability: int) -> None:
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)],
        cwd=script.parents[2], env=environment | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 9
    assert max(shared) <= 99 * 1024  # bytes that a block has on any GPU from Ampere on


# --- a whole request


@needs_triton
@pytest.mark.parametrize("store", ["memory://", "memory://?codec=int8", "memory://?codec=int4"])
@pytest.mark.parametrize("policy", ["reuse", "link:k=4", "query:ratio=0.2", "cacheblend:ratio=0.2"])
def test_a_request_gives_the_logits_of_the_torch_path(
    policy: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = {}
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("CHUNKCACHE_KERNELS", kernels)
        with wrapped(tiny_model(), store=store) as llm:
            llm.precompute(TEXTS, policy=policy)
            logits[kernels] = llm.prefill(QUESTION, TEXTS[::-1], policy=policy).logits
    torch.testing.assert_close(logits["triton"], logits["torch"], atol=1e-4, rtol=1e-4)
