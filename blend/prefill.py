"""Selective prefill: the first forward of a fused cache computes only the rows a policy selects.

While the context is open, the model's next forward that is handed the fused cache has its input cut to those
rows, with their positions and a mask to match. For a policy with check layers, the rows are cut again at these
layers. Every other forward, also of another thread, passes through untouched; on leaving, no hook remains.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.blend.attention import rows_attention_on
from chunkcache.blend.cache import FusedCache
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.plan import Plan
from chunkcache.blend.policy import Policy
from chunkcache.errors import PromptError


class SelectivePrefill:
    """One selective prefill of `plan` under `policy`; use as a context round `model(...)` or `generate(...)`.

    Args:
        decoder: the model.
        plan: what is reused where.
        policy: what is recomputed.
        on_prefilled: called with the cache when it is complete, before sliding-window layers are trimmed.

    Attributes:
        cache: the `FusedCache` to pass as `past_key_values`; after the prefill, an ordinary cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: Plan,
        policy: Policy,
        on_prefilled: Callable[[FusedCache], None] | None = None,
    ) -> None:
        self._decoder = decoder
        self._plan = plan
        self._policy = policy
        self._on_prefilled = on_prefilled
        self._hooks = ExitStack()  # open as long as the context is
        self._borrowed = ExitStack()  # open while the one forward runs
        self._running = False
        self.cache = FusedCache(decoder.config, plan, decoder.rotaries)

    def __enter__(self) -> SelectivePrefill:
        model = self._decoder.model
        self._hooks.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        self._hooks.callback(model.register_forward_hook(self._after, always_call=True).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._borrowed.close()
        self._hooks.close()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Cut the forward's input to the selected rows."""
        if kwargs.get("past_key_values") is not self.cache or self.cache.prefilled:
            return None
        length = len(self._plan)
        input_ids = kwargs["input_ids"]
        if tuple(input_ids.shape) != (1, length):
            raise PromptError(
                f"the model was given input of shape {tuple(input_ids.shape)} where the plan has one sequence of "
                f"{length} tokens; prefill the cache first and pass it on to this mode of generate()"
            )
        plan, policy, decoder = self._plan, self._policy, self._decoder
        rows = torch.cat((plan.fresh, policy.select(plan))).sort().values
        self.cache.go_on_with(rows)
        self._running = True
        self._borrowed.enter_context(decoder.lock)
        self._borrowed.enter_context(rows_attention_on(decoder.model))
        if policy.check_layers:
            _Narrowing(decoder, plan, policy, self.cache).hook(self._borrowed)
        on_device = self.cache.rows_on(input_ids.device)
        cut = {
            "input_ids": input_ids.index_select(1, on_device),
            "position_ids": on_device[None],
            "attention_mask": decoder.masks(on_device, length),
        }
        return args, {**kwargs, **cut}

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give the model back; the cache is an ordinary one from here on."""
        if self._running:
            self._running = False
            self._borrowed.close()
            if output is not None:  # None: the forward failed
                self._finish()

    def _finish(self) -> None:
        self.cache.prefilled = True
        if self._on_prefilled is not None:
            self._on_prefilled(self.cache)
        self.cache.trim()


class _Narrowing:
    """Hooks that cut the rows again at a policy's check layers, and in every layer above."""

    def __init__(self, decoder: Decoder, plan: Plan, policy: Policy, cache: FusedCache) -> None:
        self._decoder = decoder
        self._plan = plan
        self._policy = policy
        self._cache = cache
        self._kept: Tensor | None = None  # indices into the rows that the model started with
        self._masks: Any = None

    def hook(self, stack: ExitStack) -> None:
        """Register on every layer from the first check layer on, until `stack` closes."""
        for index in range(min(self._policy.check_layers), len(self._decoder.layers)):
            hook = partial(self._before_layer, index)
            stack.callback(self._decoder.layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._kept is not None:  # the model's own loop still passes what fits the rows it started with
            kwargs = self._cut(index, kwargs, self._kept)
        if index in self._policy.check_layers:
            fresh, stored = self._cache.probe(layer, index, args, kwargs)
            keep = self._policy.narrow(self._plan, self._cache.rows_on(fresh.device), fresh, stored)
            self._kept = keep if self._kept is None else self._kept[keep]
            self._cache.go_on_with(self._cache.rows[keep.cpu()])
            self._masks = self._decoder.masks(self._cache.rows_on(keep.device), len(self._plan))
            kwargs = self._cut(index, kwargs, keep)
            if "hidden_states" in kwargs:
                kwargs["hidden_states"] = kwargs["hidden_states"].index_select(1, keep)
            else:
                args = (args[0].index_select(1, keep), *args[1:])
        return args, kwargs

    def _cut(self, index: int, kwargs: dict[str, Any], keep: Tensor) -> dict[str, Any]:
        cos, sin = kwargs["position_embeddings"]
        keep = keep.to(cos.device)
        return {
            **kwargs,
            "position_embeddings": (cos.index_select(1, keep), sin.index_select(1, keep)),
            "position_ids": self._cache.rows_on(cos.device)[None],
            "attention_mask": self._decoder.mask(index, self._masks),
        }
