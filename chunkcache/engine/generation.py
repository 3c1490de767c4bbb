"""Helpers round transformers' `generate()`: the clock of the first token, and a stream that can be left early."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from chunkcache.engine.stats import RequestStats
from chunkcache.errors import PromptError

DEFAULT_NEW_TOKENS = 64

_OURS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "past_key_values", "cache_implementation")


@dataclass(frozen=True)
class Generation:
    """The answer to one question.

    Attributes:
        text: the answer, without special tokens.
        token_ids: its token ids.
        ttft_s: seconds from the call to the first token id.
        stats: what the request did.
        output: what `generate()` itself returned.
    """

    text: str
    token_ids: list[int]
    ttft_s: float
    stats: RequestStats
    output: Any


class FirstTokenClock(StoppingCriteria):
    """Never stops; notes when the first token id was known on the host."""

    def __init__(self) -> None:
        self.first_token_at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note the time once; reading the token waits for the device."""
        if self.first_token_at is None:
            input_ids[0, -1].item()
            self.first_token_at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class StopWhenSet(StoppingCriteria):
    """Stops the generation once its event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Stop every sequence if the event is set."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class TextStream:
    """Pieces of an answer as they are decoded; iterate over it once.

    Attributes:
        result: the whole `Generation`, once the iteration is over.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, run: Callable[[Any, StoppingCriteria], Generation]
    ) -> None:
        self.result: Generation | None = None
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(target=self._work, args=(run,), name="chunkcache-stream", daemon=True)
        _streams.add(self)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        try:
            for piece in self._pieces:
                if piece:
                    yield piece
        finally:  # also when the caller stops listening
            self.close()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the generation, if it still runs, after the token it is at."""
        self._stop.set()
        self._thread.join()

    def _work(self, run: Callable[[Any, StoppingCriteria], Generation]) -> None:
        try:
            self.result = run(self._pieces, StopWhenSet(self._stop))
        except BaseException as error:  # noqa: BLE001 - carried over to the thread that listens
            self._error = error
            self._pieces.end()


_streams: weakref.WeakSet[TextStream] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    # A thread that is inside torch when the interpreter goes away takes the process down with an abort.
    for stream in list(_streams):
        stream.close()


def check_options(options: dict[str, Any]) -> None:
    """Refuse keywords of `generate()` that make no sense here.

    Raises:
        PromptError: the keyword is chunkcache's own to set, or asks for several sequences.
    """
    for name in _OURS:
        if name in options:
            raise PromptError(
                f"{name}= is set by chunkcache; leave it out, or call model.generate(**llm.inputs(...)) yourself"
            )
    config = options.get("generation_config")
    given = {**(config.to_dict() if config is not None else {}), **options}
    if given.get("use_cache") is False:
        raise PromptError("use_cache=False leaves nothing to reuse; leave it out")
    if given.get("cache_implementation") is not None:
        raise PromptError("cache_implementation is chunkcache's own to set; leave it out of the generation config")
    if given.get("prefill_chunk_size") is not None:
        raise PromptError("prefill_chunk_size= splits the prefill that chunkcache shortens; leave it out")
    if (given.get("num_return_sequences") or 1) > 1:
        raise PromptError(
            f"num_return_sequences={given['num_return_sequences']}: chunkcache serves one sequence; "
            "call generate() once for each answer"
        )


def with_length(options: dict[str, Any], max_new_tokens: int | None) -> dict[str, Any]:
    """Return `options` with the length of the answer: as asked, as the generation config says, or 64 tokens."""
    if max_new_tokens is not None:
        return {**options, "max_new_tokens": max_new_tokens}
    config = options.get("generation_config")
    lengths = (
        options.get("max_length"),
        getattr(config, "max_length", None),
        getattr(config, "max_new_tokens", None),
    )
    return options if any(lengths) else {**options, "max_new_tokens": DEFAULT_NEW_TOKENS}


def setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """Return what `generate()` would use for `name`: its keyword, the given generation config, or the model's."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return given if given is not None else getattr(model.generation_config, name, None)


def needs_finished_cache(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Return whether `generate()` prefills several copies of the prompt side by side."""
    return (setting(model, options, "num_beams") or 1) > 1


def is_assisted(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Return whether candidates for the first tokens are verified in the same forward as the prompt."""
    return options.get("assistant_model") is not None or any(
        setting(model, options, name) is not None for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    )
