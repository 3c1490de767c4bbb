"""Single kernels: attention of scattered rows, the assembly of a layer, and a forward as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chunkcache.blend import Decoder
from chunkcache.blend.rotary import Rotary
from chunkcache.eval.gpu.check import Check

ATTENTION = "Attention of scattered rows, ms a layer"
ASSEMBLY = "Assembly of a layer, ms"
GRAPH = "A forward without a cache, ms"
SHARE = 0.03  # of the tokens are recomputed


@torch.no_grad()
def kernels(check: Check) -> None:
    """Time each by itself."""
    config: Any = check.model().config
    heads = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    rotary = Decoder(check.model()).rotaries[0]
    assert rotary is not None
    for count in check.counts:
        if check.has(4, f"kernels at {count} chunks"):
            with check.step(f"attention at {count} chunks"):
                _attention(check, count * check.chunk_tokens, *heads)
            with check.step(f"assembly at {count} chunks"):
                _assembly(check, count, rotary, heads[1], heads[2])
    for rows in (8,) if check.options.smoke else (32, 128, 512):
        if check.has(3, f"graph of {rows} rows"):
            with check.step(f"graph of {rows} rows"):
                _graph(check, rows)


def _attention(check: Check, length: int, heads: int, kv_heads: int, head_dim: int) -> None:
    rows = max(4, int(SHARE * length))
    draw: dict[str, Any] = {"device": check.device, "dtype": check.dtype}
    query = torch.randn(1, heads, rows, head_dim, **draw)
    key, value = (torch.randn(1, kv_heads, length, head_dim, **draw) for _ in range(2))
    columns = torch.arange(length, device=check.device)
    positions = torch.randperm(length, device=check.device)[:rows].sort().values
    mask = (columns <= positions[:, None])[None, None]
    wide = [part.repeat_interleave(heads // kv_heads, 1) for part in (key, value)]

    def repeated() -> list[Tensor]:
        return [part.repeat_interleave(heads // kv_heads, 1) for part in (key, value)]

    def masked(attended: Tensor = mask) -> Tensor:
        return F.scaled_dot_product_attention(query, wide[0], wide[1], attn_mask=attended)

    def unmasked() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    ways: list[tuple[str, SDPBackend | None, Callable[[], object]]] = [
        ("the mask", None, lambda: (columns <= positions[:, None])[None, None]),
        ("heads repeated", None, repeated),
        ("math", SDPBackend.MATH, masked),
    ]
    if check.cuda:
        ways[2:] = [
            ("cudnn", SDPBackend.CUDNN_ATTENTION, masked),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION, masked),
            ("flash, no mask, grouped", SDPBackend.FLASH_ATTENTION, unmasked),
        ]
    for name, backend, work in ways:
        with check.step(f"attention with {name}"), _backend(backend):
            first = check.each_milliseconds(work, 1, warm_up=False)  # a plan is made, where the kernel has one
            each = check.each_milliseconds(work)
            check.report.row(ATTENTION, tokens=length, rows=rows, way=name, ms=each, first_call=first)


@contextmanager
def _backend(backend: SDPBackend | None) -> Iterator[None]:
    if backend is None:
        yield
    else:
        with sdpa_kernel(backend):
            yield


def _assembly(check: Check, count: int, rotary: Rotary, kv_heads: int, head_dim: int) -> None:
    tokens = check.chunk_tokens
    shape = (2, kv_heads, tokens, head_dim)
    stored = [torch.randn(shape, device=check.device, dtype=check.dtype) for _ in range(count)]
    target = torch.empty(2, kv_heads, count * tokens, head_dim, device=check.device, dtype=check.dtype)
    angles = [rotary.rotation(number + 1) for number in range(count)]
    cos, sin = (torch.stack(part).to(check.device).repeat_interleave(tokens, 0) for part in zip(*angles, strict=True))

    def one_by_one() -> None:
        for number, layer in enumerate(stored):
            part = target[:, :, number * tokens : (number + 1) * tokens]
            part[1].copy_(layer[1])
            rotary.shift(layer[0], number + 1, part[0])

    def at_once() -> None:
        both = torch.cat(stored, dim=2)
        first, second = both[0].float().chunk(2, dim=-1)
        both[0].copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))

    for name, work in {"one by one": one_by_one, "at once": at_once}.items():
        check.report.row(ASSEMBLY, chunks=count, tokens=count * tokens, way=name, ms=check.each_milliseconds(work))


def _graph(check: Check, rows: int) -> None:
    ids = torch.randint(4, 500, (1, rows), device=check.device)
    body: Any = check.model().base_model

    def run() -> object:
        return body(input_ids=ids, use_cache=False)

    check.report.row(GRAPH, rows=rows, way="eager", ms=check.each_milliseconds(run))
    if not check.cuda:
        return
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    check.report.row(GRAPH, rows=rows, way="graph", ms=check.each_milliseconds(graph.replay))
