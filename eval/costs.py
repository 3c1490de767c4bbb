"""What a request costs on a machine that is not here: a model of prefill and of loading KV, and published figures.

A layer over n rows, that see a context of m tokens on average, takes

    max((2 params n + 4 heads head_dim n m) / (flops utilisation), bytes of its weights / hbm_bandwidth) + overhead

seconds, `params` being its own: however few rows there are, its weights are read. A request ends with the head on
its last row. KV are loaded layer by layer while the layer before is computed, as the product does it. Shapes of
models and figures of accelerators are facts from their publishers; `utilisation`, the share of the peak that prefill
reaches, and `overhead` are assumptions, unless they are fitted to measured requests. Left out: decoding beside
prefills, batched prefills, and what several accelerators lose to talking to one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from chunkcache.errors import InputError, missing_extra

Step = tuple[int, float]  # a layer that is run, and its seconds
SCOUT_DEPTH = 2 / 3  # layers that a question runs through to look at the chunks, before what it picks is recomputed


@dataclass(frozen=True)
class Shape:
    """A model; `params` are those of all its layers, `head_params` those of its head; `source` says where from."""

    params: float
    head_params: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    source: str

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True)
class Machine:
    """What one replica runs on: peak FLOP/s, seconds per layer on top, and bytes/s of two memories.

    KV come at `memory_bandwidth`; weights at `hbm_bandwidth`, from the accelerator's own memory.
    """

    flops: float
    memory_bandwidth: float
    hbm_bandwidth: float
    utilisation: float
    overhead: float
    source: str

    def times(self, count: int) -> Machine:
        """Return `count` of them as one, without what they lose to talking with one another."""
        return replace(
            self,
            flops=count * self.flops,
            memory_bandwidth=count * self.memory_bandwidth,
            hbm_bandwidth=count * self.hbm_bandwidth,
        )


SHAPES = {
    "llama-3.1-8b": Shape(6.98e9, 128256 * 4096, 32, 32, 8, 128, 2, "config.json of meta-llama/Llama-3.1-8B"),
    "llama-3.1-70b": Shape(68.5e9, 128256 * 8192, 80, 64, 8, 128, 2, "config.json of meta-llama/Llama-3.1-70B"),
    "smollm2-135m": Shape(
        106.2e6, 49152 * 576, 30, 9, 3, 64, 4, "config.json of HuggingFaceTB/SmolLM2-135M-Instruct; run in fp32"
    ),
}
MACHINES = {
    "a100": Machine(
        312e12, 32e9, 2.039e12, 0.5, 2e-5,
        "NVIDIA A100 80GB SXM data sheet: 312 TFLOPS bf16, 2,039 GB/s; PCIe 4.0 x16",
    ),
    "h100": Machine(
        989e12, 64e9, 3.35e12, 0.5, 2e-5,
        "NVIDIA H100 SXM data sheet: 989 TFLOPS bf16 dense, 3.35 TB/s; PCIe 5.0 x16",
    ),
}  # fmt: skip
# KV in host memory come over PCIe: 64 and 128 GB/s both ways together, half of it one way


@dataclass(frozen=True)
class Reuse:
    """How much a policy computes of chunks that are stored.

    Attributes:
        share: of their rows, recomputed in every layer but the first `whole`.
        whole: first layers in which all rows are computed.
        scouts: whether the question first runs through two thirds of the layers.
        lead: tokens of lead-in that a chunk is computed behind, besides the prefix.
    """

    share: float = 0.0
    whole: int = 0
    scouts: bool = False
    lead: int = 0


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of requests for one model on one machine."""

    shape: Shape
    machine: Machine

    def layer_s(self, rows: float, context: float) -> float:
        """Return the seconds of one layer for `rows` fresh rows, each over `context` tokens on average."""
        if not rows:
            return 0.0
        params = self.shape.params / self.shape.layers
        attention = 4 * self.shape.heads * self.shape.head_dim * rows * context
        return self._matmul_s(params, 2 * params * rows + attention) + self.machine.overhead

    @property
    def head(self) -> Step:
        """The step of the head on one row, behind the last layer."""
        return self.shape.layers - 1, self._matmul_s(self.shape.head_params, 2 * self.shape.head_params)

    def _matmul_s(self, params: float, work: float) -> float:
        """Return the seconds of `work` FLOPs with so many weights, which are read once."""
        computing = work / (self.machine.flops * self.machine.utilisation)
        return max(computing, params * self.shape.dtype_bytes / self.machine.hbm_bandwidth)

    def prefill_s(self, rows: float, before: float = 0) -> float:
        """Return the seconds of all layers over `rows` tokens behind `before` others."""
        return self.shape.layers * self.layer_s(rows, before + rows / 2)

    def full_s(self, tokens: float) -> float:
        """Return the seconds of a full prefill."""
        return self.prefill_s(tokens) + self.head[1]

    def fused_steps(self, reuse: Reuse, prefix: float, stored: float, question: float) -> list[Step]:
        """Return the steps over a prefix and `stored` chunk tokens, and a question behind them.

        Rows that are recomputed stand evenly among the stored ones; a question sees all of them.
        """
        layers, end = self.shape.layers, prefix + stored + question
        scout = math.ceil(SCOUT_DEPTH * layers) if reuse.scouts else 0
        steps = [(index, self.layer_s(question, end - question / 2)) for index in range(scout)]
        for index in range(layers):
            rows = stored * (1.0 if index < reuse.whole else reuse.share)
            seen = rows * (prefix + stored / 2) + question * (end - question / 2)
            steps.append((index, self.layer_s(rows + question, seen / max(rows + question, 1))))
        return [*steps, self.head]

    def load_s(self, tokens: float) -> float:
        """Return the seconds that KV of `tokens` take from the replica's memory, alone."""
        return tokens * self.shape.kv_bytes / self.machine.memory_bandwidth


def overlapped_s(loading_s: float, steps: Sequence[Step], layers: int) -> float:
    """Return the seconds of steps of which each waits for its layer's KV; all are loaded meanwhile, evenly."""
    done = 0.0
    for index, seconds in steps:
        done = max(done, loading_s * (index + 1) / layers) + seconds
    return done


def fit(
    shape: Shape, requests: Sequence[tuple[float, float]], memory_bandwidth: float, hbm_bandwidth: float, source: str
) -> Machine:
    """Return a machine whose speed and overhead are fitted to full prefills, by least squares of relative errors.

    Args:
        shape: the model that was measured.
        requests: (tokens, seconds) of full prefills.
        memory_bandwidth: bytes/s at which it gets KV; full prefill does not tell it.
        hbm_bandwidth: bytes/s at which it reads weights; nor this.
        source: where the requests are from.

    Raises:
        InputError: there are too few requests to fit anything.
    """
    import numpy as np

    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise missing_extra("eval", "a fit of costs", error) from None

    if len(requests) < 2:
        raise InputError(f"{source} has {len(requests)} rows of full prefill; a fit needs two or more")
    unit = Costs(shape, Machine(1.0, memory_bandwidth, hbm_bandwidth, 1.0, 0.0, source))
    seconds = np.array([second for _, second in requests])
    work = np.array([unit.prefill_s(tokens) for tokens, _ in requests])  # a FLOP takes a second, and weights nothing
    head_s = shape.head_params * shape.dtype_bytes / hbm_bandwidth  # one row: reading its weights is all
    columns = np.stack([work, np.full(len(requests), float(shape.layers))], axis=1)
    (per_flop, overhead), _ = nnls(columns / seconds[:, None], 1 - head_s / seconds)
    if not per_flop > 0 or not math.isfinite(per_flop):
        raise InputError(f"the times of {source} do not grow with the length of the prompts: no speed can be fitted")
    return Machine(1 / per_flop, memory_bandwidth, hbm_bandwidth, 1.0, float(overhead), source)


def predicted(costs: Costs, reuse: Reuse | None, prefix: float, stored: float, question: float) -> float:
    """Return the seconds of a request with all its chunks in memory; None is full prefill."""
    if reuse is None:
        return costs.full_s(prefix + stored + question)
    steps = costs.fused_steps(reuse, prefix, stored, question)
    return overlapped_s(costs.load_s(prefix + stored), steps, costs.shape.layers)
