"""An answer piece by piece, decoded in another thread; it can be left early."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import TextIteratorStreamer

from chunkcache.engine.generation import Generation
from chunkcache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopWhenSet(StoppingCriteria):
    """Stops the generation once its event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Stop every sequence if the event is set."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class TextStream:
    """Pieces of an answer as they are decoded, to be iterated over once.

    Raises:
        InputError: it is iterated over again.

    Attributes:
        result: the whole `Generation`, once the iteration is over.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, run: Callable[[Any, StoppingCriteria], Generation]
    ) -> None:
        self.result: Generation | None = None
        self._error: BaseException | None = None
        self._read = False
        self._stop = threading.Event()
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(target=self._work, args=(run,), name="chunkcache-stream", daemon=True)
        _streams.add(self)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        if self._read:
            raise InputError("this stream has been read; its whole text is in .result.text, or ask again")
        self._read = True
        return self._iterate()

    def _iterate(self) -> Iterator[str]:
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
