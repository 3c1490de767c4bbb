"""The kernels in Triton: whether they are right on this device, and how much faster than the torch path."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from chunkcache.blend import Decoder
from chunkcache.blend.assembly import place
from chunkcache.blend.attention import dense_mask, visible_intervals
from chunkcache.blend.rotary import Rotary
from chunkcache.blend.triton import INTERPRETED
from chunkcache.eval.gpu.check import Check, relative_error
from chunkcache.eval.gpu.exactness import FEW_POLICIES, compare, toy, using
from chunkcache.eval.gpu.kernels import SHARE
from chunkcache.kv import ChunkKV, Span
from chunkcache.kv.quantised import QuantisedLayer

TABLE = "Kernels in Triton, ms a layer"
REQUESTS = "Time to first token with kernels in Triton, ms"
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # relative error over the whole tensor
STORES = ("memory://", "memory://?codec=int8", "memory://?codec=int4")


@torch.no_grad()
def triton(check: Check) -> None:
    """Compare the kernels with torch, by themselves and in requests, and time both."""
    missing = find_spec("triton") is None
    if missing or not (check.cuda or INTERPRETED):
        check.report.row(TABLE, what="not installed" if missing else "runs on a GPU, or with TRITON_INTERPRET=1")
        return
    config: Any = check.model().config
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    rotary = Decoder(check.model()).rotaries[0]
    assert rotary is not None
    for count in check.counts:
        if check.has(3, f"kernels in Triton at {count} chunks"):
            with check.step(f"attention in Triton at {count} chunks"):
                _attention(check, count * check.chunk_tokens, heads, kv_heads, head_dim // heads)
            for bits in (0, 8, 4):
                with check.step(f"assembly in Triton at {count} chunks, {bits or 16} bits"):
                    _assembly(check, count, rotary, (kv_heads, head_dim // heads), bits)
    if not check.cuda:
        return  # whole requests take minutes in the interpreter; the tests have them
    for store in STORES:
        if check.has(4, f"requests with kernels in Triton over {store}"):
            compare(check, "toy Llama, Triton", toy, FEW_POLICIES, store, "triton")
    _requests(check)


def _attention(check: Check, length: int, heads: int, kv_heads: int, head_dim: int) -> None:
    from chunkcache.blend.triton.attention import attend

    rows = torch.randperm(length)[: max(4, int(SHARE * length))].sort().values.to(check.device)
    draw: dict[str, Any] = {"device": check.device, "dtype": check.dtype}
    query = torch.randn(1, heads, len(rows), head_dim, **draw)
    key, value = (torch.randn(1, kv_heads, length, head_dim, **draw) for _ in range(2))
    intervals = visible_intervals(rows, None)
    mask = dense_mask(intervals, length)

    def torch_path() -> Tensor:
        grouped = heads != kv_heads
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)

    def kernel() -> Tensor:
        return attend(query, key, value, intervals)

    _row(check, f"attention, {len(rows)} rows of {length}", kernel, torch_path)


def _assembly(check: Check, count: int, rotary: Rotary, heads: tuple[int, int], bits: int) -> None:
    from chunkcache.blend.triton.assembly import Placer

    tokens = check.chunk_tokens
    layers: list[Any] = []
    spans = []
    for number in range(count):
        layer = torch.randn(2, heads[0], tokens, heads[1], device=check.device, dtype=check.dtype)
        kv = ChunkKV.of(range(tokens), 0, [layer])
        spans.append(Span(number * tokens, (number + 1) * tokens, tuple(range(tokens)), 0, kv))
        layers.append(QuantisedLayer.of(layer, bits) if bits else layer)
    placer = Placer(spans)
    shape = (2, heads[0], count * tokens, heads[1])
    target, other = (torch.empty(shape, device=check.device, dtype=check.dtype) for _ in range(2))

    def torch_path() -> Tensor:
        for span, layer in zip(spans, layers, strict=True):
            place(span, layer, rotary, other[:, :, span.start : span.stop])
        return other

    def kernel() -> Tensor:
        placer.place(layers, rotary, target)
        return target

    _row(check, f"assembly, {count} chunks of {tokens}, {bits or 16} bits", kernel, torch_path)


def _row(check: Check, what: str, kernel: Any, torch_path: Any) -> None:
    off = relative_error(kernel(), torch_path())
    times = 1 if check.options.smoke else 10
    ours, reference = (check.each_milliseconds(work, times) for work in (kernel, torch_path))
    check.report.row(TABLE, what=what, triton=ours, torch=reference, error=off)
    if not off < LIMITS[check.dtype]:
        check.report.add_wrong(f"{what} in Triton: relative error {off:.2g}")


def _requests(check: Check) -> None:
    """Time requests with either kernels."""
    with check.wrapped(check.device_store()) as llm:
        for count in check.counts:
            texts = check.texts(count, 400 + count)
            for policy in ("reuse", "query"):
                if not check.has(4, f"{policy} with kernels in Triton at {count} chunks"):
                    continue
                with check.step(f"{policy} with kernels in Triton at {count} chunks"):
                    llm.store.clear()
                    llm.precompute(texts, policy=policy)
                    found = {}
                    for kernels in ("torch", "triton"):
                        with using(kernels):

                            def ask(number: int, texts: list[str] = texts, policy: str = policy) -> Tensor:
                                return llm.prefill(check.question(number), texts[::-1], policy=policy).logits

                            ask(0)
                            found[kernels] = check.milliseconds(lambda ask=ask: ask(1))  # type: ignore[misc]
                    check.report.row(REQUESTS, chunks=count, policy=policy, **found)
