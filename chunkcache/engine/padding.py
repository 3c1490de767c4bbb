"""Holding back the first token, so that its time does not tell whether chunks were in the store.

With a padding of `pad` seconds, whoever sends a request sees its first token after a whole multiple of `pad` since
the request came: requests of the same multiple look alike, whether their chunks were reused or computed. It is
constant where `pad` is longer than any request takes to its first token.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chunkcache.engine.generation import FirstTokenClock
from chunkcache.errors import InputError


def check_pad(pad: float | None) -> float | None:
    """Return `pad` if it is None or a positive, finite number of seconds.

    Raises:
        InputError: it is not.
    """
    if pad is None:
        return None
    if isinstance(pad, bool) or not isinstance(pad, (int, float)) or not 0 < pad < math.inf:
        raise InputError(f"pad={pad!r} is no time to hold a first token back to; pass seconds, such as 0.5, or None")
    return float(pad)


def hold_back(started: float, pad: float | None) -> None:
    """Sleep until a whole multiple of `pad` seconds since `started`, by `time.perf_counter`; not at all for None."""
    if pad is not None:
        time.sleep(left(time.perf_counter() - started, pad))


def left(elapsed: float, pad: float) -> float:
    """Return the seconds from `elapsed` to the next multiple of `pad`, 0 at one."""
    return -elapsed % pad


def padded(options: dict[str, Any], clock: FirstTokenClock, started: float, pad: float | None) -> dict[str, Any]:
    """Return keywords of `generate()` by which nobody sees its first token before a multiple of `pad`.

    Args:
        options: keywords of `generate()`.
        clock: notes when the first token was there, not when it was seen.
        started: when the request came, by `time.perf_counter`.
        pad: in seconds; None changes nothing.
    """
    if pad is None:
        return options
    hold = _Hold(clock, started, pad)
    criteria = StoppingCriteriaList([*(options.get("stopping_criteria") or []), hold])
    options = {**options, "stopping_criteria": criteria}
    if options.get("streamer") is not None:
        options["streamer"] = _HeldStreamer(options["streamer"], hold)
    return options


class _Hold(StoppingCriteria):
    """Never stops; waits once, when the first token is there."""

    def __init__(self, clock: FirstTokenClock, started: float, pad: float) -> None:
        self._clock, self._started, self._pad = clock, started, pad
        self._waited = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.wait(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def wait(self, token_ids: Tensor) -> None:
        """Wait, if that was not done yet, for the ids and then for the multiple."""
        if not self._waited:
            self._waited = True
            self._clock.note(token_ids)
            hold_back(self._started, self._pad)


class _HeldStreamer(BaseStreamer):
    """Hands tokens on, the first when it may be seen: assisted decoding streams before it asks whether to stop."""

    def __init__(self, streamer: Any, hold: _Hold) -> None:
        self._streamer, self._hold = streamer, hold
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:  # which comes first
            self._hold.wait(value)
        self._prompt = False
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
