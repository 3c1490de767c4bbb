"""Patches `model.generate`, so that a call whose prompt holds known chunks reuses their KV.

While attached, the model instance has a `generate` of ours in front of its own. A call it cannot help (a
batch, beams, a cache of the caller's, nothing found) goes straight through.
"""

from __future__ import annotations

import functools
import time
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkcache.blend import Plan, SelectivePrefill
from chunkcache.engine.engine import Engine
from chunkcache.engine.generation import FirstTokenClock, is_assisted, needs_finished_cache, setting
from chunkcache.engine.padding import padded
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import InputError
from chunkcache.library import ChunkLibrary

if TYPE_CHECKING:
    from typing_extensions import Self  # mypy has it; typing's own is of Python 3.11


class Attachment:
    """Puts a chunk-reusing `generate` in front of a model's own, and takes it away again.

    Args:
        engine: serves the model.

    Attributes:
        active: whether it is attached.
        last_stats: what the last call did; a call that went straight through counts as a fallback.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._model = engine.model
        self.active = False
        self._shadowed: Any = None  # another instance-level generate, if there was one
        self.last_stats: RequestStats | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach for a while, and leave it as it was."""
        already = self.active
        self.attach()
        try:
            yield
        finally:
            if not already:
                self.detach()

    def attach(self) -> None:
        """Start; does nothing if it is attached already."""
        if self.active:
            return
        model = self._model
        self._shadowed = model.__dict__.get("generate")
        own: Any = model.generate

        @functools.wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return self._generate(own, args, kwargs) if self.active else own(*args, **kwargs)

        vars(generate)["chunkcache"] = self
        model.__dict__["generate"] = generate
        self.active = True

    def detach(self) -> None:
        """Stop; does nothing if it is not attached. Of several attachments any may leave first."""
        self.active = False
        model = self._model
        while True:  # take away ours, and those below it that left earlier
            front = getattr(model.__dict__.get("generate"), "chunkcache", None)
            if front is None or front.active:
                return
            if front._shadowed is None:
                del model.__dict__["generate"]
            else:
                model.__dict__["generate"] = front._shadowed

    def _generate(self, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = self._padded(args, kwargs)
        policy = self._engine.resolve_policy(None)
        self.last_stats = stats = RequestStats(str(policy))
        input_ids = self._single_prompt(args, kwargs) if policy.reuses else None
        if input_ids is not None:
            served = self._engine.served.current()
            plan = self._match(served.library, input_ids, stats)
        if input_ids is None or plan is None:
            stats.fallbacks = 1
            return own(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("inputs", "input_ids")}
        kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        prefill = SelectivePrefill(served.decoder, plan, policy, select=served.tuning.selection(policy))
        output = prefill.generate(input_ids, *args[1:], **kwargs)
        stats.take(plan, prefill)
        return output

    def _padded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return keywords by which the call's first token is held back, if it is to be.

        Raises:
            InputError: what has to be changed for that is given by position.
        """
        if self._engine.pad is not None and len(args) > 1:
            raise InputError("with pad=, pass everything but the prompt to the attached generate() by name")
        return padded(kwargs, FirstTokenClock(), time.perf_counter(), self._engine.pad)

    def _single_prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the call's `[1, tokens]` prompt, or None if the call is not one plain sequence."""
        model = self._model
        input_ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        mask = kwargs.get("attention_mask")
        if len(args) > 1:
            kwargs = {**kwargs, "generation_config": args[1]}
        plain = (
            isinstance(input_ids, Tensor)
            and input_ids.ndim == 2
            and input_ids.shape[0] == 1
            and 1 < input_ids.shape[1] <= self._engine.decoder.max_tokens
            and not torch.is_autocast_enabled(input_ids.device.type)  # KV are in the model's own dtype
            and (mask is None or bool(mask.all()))
            and all(kwargs.get(name) is None for name in ("past_key_values", "inputs_embeds"))
            and all(setting(model, kwargs, name) is None for name in ("cache_implementation", "prefill_chunk_size"))
            and setting(model, kwargs, "use_cache") is not False
            and (setting(model, kwargs, "num_return_sequences") or 1) == 1
            and not needs_finished_cache(model, kwargs)
            and not is_assisted(model, kwargs)
        )
        return input_ids if plain else None

    @staticmethod
    def _match(library: ChunkLibrary, input_ids: Tensor, stats: RequestStats) -> Plan | None:
        """Return a plan of the known chunks in the prompt, or None if there is none in it."""
        ids = tuple(input_ids[0].tolist())
        spans = library.find(ids)
        chunks = [span for span in spans if span.kv is not None]
        stats.misses, stats.hits = len(spans) - len(chunks), len(chunks)
        stats.chunks = stats.hits
        return Plan.of(ids, chunks) if chunks else None


class AttachMethods(ABC):
    """The part of `CachedLLM` that lets the model's own `generate()` reuse chunks.

    Attributes:
        attachment: does it.
    """

    attachment: Attachment

    @contextmanager
    def attached(self) -> Iterator[Self]:
        """Let the model's own `generate()` find and reuse precomputed chunks in any prompt, inside of the `with`.

        What was found is in `last_stats`.
        """
        with self.attachment.attached():
            yield self

    def attach(self) -> Self:
        """Let it do so until `detach`."""
        self.attachment.attach()
        return self

    def detach(self) -> None:
        """Give the model its own `generate()` back."""
        self.attachment.detach()

    @property
    def last_stats(self) -> RequestStats | None:
        """What the last `generate()` of the attached model did; None before the first."""
        return self.attachment.last_stats
