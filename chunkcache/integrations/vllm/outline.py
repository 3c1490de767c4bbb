"""What the library has to know of a model whose weights vLLM holds: its shape and its rotary functions.

A Hugging Face model of the same config is built without weights. Only its rotary modules are real.
"""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from chunkcache.blend import Decoder
from chunkcache.blend.selfcheck import (
    DELTA,
    GROWTH,
    MOST,
    ROTATION_TOLERANCE,
    UNROTATED,
    judge,
    relative_error,
    tolerance_of,
)
from chunkcache.errors import SelfCheckError
from chunkcache.integrations.vllm.paged import PagedModel, Run, runs_of

TOKENS = 48  # of the self-check's prompt


class Outline(Decoder):
    """A decoder without weights.

    Args:
        config: the model's config, as transformers has it.
        dtype: of keys and values.
        heads: (kv_heads, head_dim) of each layer, of this rank.
        device: where the model runs.

    Raises:
        UnsupportedModelError: the architecture cannot be served right.
    """

    def __init__(self, config: Any, dtype: torch.dtype, heads: list[tuple[int, int]], device: torch.device) -> None:
        config = copy.deepcopy(config.get_text_config(decoder=True))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        for name, module in list(model.named_modules()):
            if name.endswith(("rotary_emb", "rotary_pos_emb")):  # their buffers are in no checkpoint
                model.set_submodule(name, type(module)(config=model.config.get_text_config(decoder=True)))
        super().__init__(model.eval())
        self.heads = heads
        self._device = device

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return self._device

    def _refuse_hidden(self, name: str) -> None:
        """Refuse nothing: the weights are elsewhere."""


class _Prefill:
    """One prefill of the self-check: the KV of all layers, and the last hidden states.

    Args:
        paged: runs.
        ids: token ids `[tokens]`.
    """

    def __init__(self, paged: PagedModel, ids: Tensor) -> None:
        self._paged, self._ids = paged, ids
        blocks = -(-len(ids) // paged.block)
        self._table = torch.arange(blocks)
        self._blocks = blocks
        self.layers: list[Tensor] = []
        self.hidden = torch.empty(0)

    def run(self, runs: list[Run], shift: int = 0, stored: list[Tensor] | None = None) -> _Prefill:
        """Compute the rows of `runs`, over stored KV `[2, kv_heads, tokens, head_dim]` per layer."""
        rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        every = torch.arange(len(self._ids))
        others = runs_of(every[~torch.isin(every, rows)], self._table)

        def see(index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
            fresh = torch.stack((key, value)).transpose(1, 2)
            whole = fresh.clone() if stored is None else stored[index].clone()
            whole[:, :, rows if stored is not None else slice(None)] = fresh
            for run in others if stored is not None else ():
                self._paged.write(index, self._table, run.start, whole[:, :, run.start : run.stop])
            self.layers.append(whole)

        sees = {index: partial(see, index) for index in range(len(self._paged.heads))}
        with self._paged.scratch(self._blocks):
            self.hidden = self._paged.forward(self._ids[rows], runs, shift=shift, see=sees).clone()
        return self

    @property
    def table(self) -> Tensor:
        """The block ids of its scratch cache."""
        return self._table


@torch.inference_mode()
def check(paged: PagedModel, outline: Outline, vocabulary: int) -> dict[str, float]:
    """Compare selective prefill with the engine's own, and re-rotated keys with those computed in place.

    Layers whose keys do not depend on the position are told to `outline`.

    Returns:
        the errors, relative.

    Raises:
        SelfCheckError: one is too large; nothing of this model may be reused.
    """
    ids = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(0))
    tolerance = tolerance_of(outline)

    def prefill(rows: Tensor, shift: int = 0, stored: list[Tensor] | None = None) -> _Prefill:
        made = _Prefill(paged, ids)
        return made.run(runs_of(rows, made.table), shift, stored)

    every = torch.arange(TOKENS)
    own, there = prefill(every), prefill(every, DELTA)
    half = torch.arange(TOKENS // 2, TOKENS)
    again = prefill(half, stored=own.layers)
    noise = max(relative_error(again.hidden, own.hidden[half]), 0.0)
    wrong = [layer.neg() for layer in own.layers]
    made = _Prefill(paged, ids)
    steps = [0, 1, 4, 5, 13, 14, 30, TOKENS]
    runs = [Run(made.table, start, stop) for start, stop in itertools.pairwise(steps)]
    everything = made.run(runs, stored=wrong)
    some = torch.tensor([0, 3, 4, 5, 11, 20, 21, 22, TOKENS - 2, TOKENS - 1])
    selective = prefill(some, stored=own.layers)
    errors = {
        "all_rows": relative_error(everything.hidden, own.hidden),
        "some_rows": relative_error(selective.hidden, own.hidden[some]),
        "rotation": 0.0,
    }
    for name in ("all_rows", "some_rows"):
        judged = judge(errors[name], noise, tolerance)
        if not judged.passed:
            raise SelfCheckError(
                f"selective prefill ({name}) has an error of {judged.error:.2g}, over {judged.limit:.2g}"
            )
    errors["rotation"] = _check_rotation(outline, own.layers, there.layers, tolerance)
    return errors


def _check_rotation(outline: Outline, here: list[Tensor], there: list[Tensor], tolerance: float) -> float:
    """Return the largest error of re-rotated keys; see `blend.selfcheck`."""
    below, worst = 0.0, 0.0
    for index, (own, wanted) in enumerate(zip(here, there, strict=True)):
        noise = relative_error(own[1], wanted[1])
        if not noise < min(max(tolerance, GROWTH * below), MOST):
            raise SelfCheckError(f"values of layer {index} depend on the position, by {noise:.2g}")
        below = max(below, noise)
        rotary, otherwise = outline.rotaries[index], relative_error(own[0], wanted[0])
        error = math.inf
        if rotary is not None:
            rotary.shift(own[0], DELTA, moved := torch.empty_like(own[0]))
            error = relative_error(moved, wanted[0])
        if otherwise < error:
            outline.rotaries[index] = None
            error, otherwise = otherwise, error
        judged = judge(error, noise, min(tolerance, ROTATION_TOLERANCE))
        if not (judged.passed and error <= UNROTATED * otherwise):
            raise SelfCheckError(
                f"re-rotated keys of layer {index} have an error of {error:.2g}, over {judged.limit:.2g}"
            )
        worst = max(worst, error)
    return worst
