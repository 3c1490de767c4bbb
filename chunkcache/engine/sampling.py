"""From logits to the next token, one sequence at a time, by transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from chunkcache.engine.generation import end_ids
from chunkcache.engine.guided import Guide
from chunkcache.errors import InputError


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen.

    Attributes:
        token_id: the token.
        logprob: the logarithm of its probability, before what processors make of it.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    token_id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer, as `generate()` would.

    Args:
        model: the Hugging Face model, whose generation config counts where `options` say nothing.
        options: keywords of `generate()`; `seed` makes sampling repeatable.
        prompt: token ids of the prompt.
        logprobs: how many of the likeliest tokens are told with each; None for no probabilities at all.
        guide: says which tokens may come; None for all.

    Attributes:
        ends: the tokens that end the answer.

    Raises:
        InputError: transformers refuses an option.
    """

    def __init__(
        self,
        model: Any,
        options: dict[str, Any],
        prompt: Sequence[int],
        logprobs: int | None = None,
        guide: Guide | None = None,
    ) -> None:
        options = dict(options)
        seed = options.pop("seed", None)
        given: GenerationConfig | None = options.pop("generation_config", None)
        try:
            config, rest = model._prepare_generation_config(given, **options)
            if config.max_new_tokens is not None:
                config.max_length = len(prompt) + config.max_new_tokens  # as `generate()` does; processors read it
            model._prepare_special_tokens(config, True, device=model.device, batch_size=1)
            self._processors = model._get_logits_processor(config, len(prompt), device=model.device)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"transformers refuses how to sample ({error}); correct the option, or leave it out"
            ) from None
        if rest:
            raise InputError(f"{', '.join(map(repr, rest))}: no option of sampling; leave it out")
        self._sample = bool(config.do_sample)
        self._device, self._ids, self._logprobs, self._guide = model.device, list(prompt), logprobs, guide
        self._generator: torch.Generator | None = None
        if self._sample and seed is not None:
            self._generator = torch.Generator(self._device).manual_seed(int(seed))
        self.ends = frozenset(end_ids(model, {**options, "generation_config": given}))

    def choose(self, logits: Tensor) -> Sampled:
        """Return the token that follows, by its logits `[vocab]`; it waits for the device."""
        scores = logits[None].float()
        if self._guide is not None:
            scores = self._guide.masked(scores)
        if self._processors:
            scores = self._processors(torch.tensor([self._ids], device=self._device), scores.clone())
        if self._sample:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[0]
        else:
            chosen = scores.argmax(-1)
        token_id = int(chosen)
        self._ids.append(token_id)
        if self._guide is not None:
            self._guide.push(token_id)
        if self._logprobs is None:
            return Sampled(token_id)
        log_probs = logits.float().log_softmax(-1)
        values, ids = log_probs.topk(self._logprobs)
        return Sampled(token_id, float(log_probs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
