"""`Check`: what the sections of a check share: device and sizes, the time they have, the model, the report."""

from __future__ import annotations

import gc
import random
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import chunkcache
from chunkcache.eval.gpu.made import make_model, make_question, make_texts, make_tokenizer
from chunkcache.eval.gpu.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

OWN = re.compile(r"/(blend|store|chunkcache|retriever)/[\w/]+\.py$")


class OutOfTime(BaseException):  # not an Exception: what is measured may catch those
    """Ends a section that runs far beyond its share of the time."""


@dataclass(frozen=True)
class Options:
    """What a check was asked for.

    Attributes:
        smoke: toy sizes, and any problem counts as a failure.
        device: where it runs; None for the first CUDA device, and for the CPU where there is none.
        size: of the main model, a key of `made.SIZES`.
        budget: seconds for everything.
        out: the JSON file.
    """

    smoke: bool = False
    device: str | None = None
    size: str = "8b"
    budget: float = 450.0
    out: Path = Path("gpu-check.json")


class Check:
    """What the sections share.

    Args:
        options: what was asked for.

    Attributes:
        options: as given.
        report: where figures go.
        device: where it runs.
        dtype: of the main model.
        counts: numbers of chunks in a prompt that are measured.
        chunk_tokens: tokens of a chunk.
        rounds: prompts that are measured of each kind, after one to warm up.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.report = Report(options.out)
        self.device = torch.device(options.device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16
        self.counts = (2, 4) if options.smoke else (5, 17, 50)
        self.chunk_tokens = 40 if options.smoke else 600
        self.rounds = 1 if options.smoke else 3
        self.tokenizer: PreTrainedTokenizerFast = make_tokenizer()
        self._model: PreTrainedModel | None = None
        self._until = time.perf_counter() + options.budget

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA device."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that the section has left."""
        return self._until - time.perf_counter()

    @contextmanager
    def within(self, seconds: float, at_most: float) -> Iterator[None]:
        """Give the block this many seconds to keep to; end it with `OutOfTime` after `at_most`."""
        before, self._until = self._until, time.perf_counter() + seconds
        timed = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGALRM, _end) if timed else None
        if timed:
            signal.setitimer(signal.ITIMER_REAL, at_most)
        try:
            yield
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, handler)
            self._until = before

    def has(self, seconds: float, what: str) -> bool:
        """Return whether the section has this much time left; where not, note what is left out."""
        enough = self.options.smoke or self.left >= seconds
        if not enough:
            self.report.add_left_out(what)
        return enough

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Note an error in the block as a problem, and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the rest of the check is worth having
            self.report.add_problem(f"{what}: {described(error)}")
            self.free()

    def model(self) -> PreTrainedModel:
        """Return the main model, made once."""
        if self._model is None:
            started = time.perf_counter()
            self._model = make_model("toy" if self.options.smoke else self.options.size, self.dtype, self.device)
            self.wait()
            nbytes = sum(parameter.nbytes for parameter in self._model.parameters())
            self.report.say(f"model of {nbytes / 1e9:.2f} GB made in {time.perf_counter() - started:.1f} s")
        return self._model

    def change_dtype(self, dtype: torch.dtype) -> None:
        """Make the main model anew in another dtype."""
        self.dtype, self._model = dtype, None
        self.free()

    @contextmanager
    def wrapped(self, store: str, **options: Any) -> Iterator[chunkcache.CachedLLM]:
        """Wrap the main model, and free what the wrapper held at the end."""
        llm = chunkcache.wrap(self.model(), self.tokenizer, store=store, **options)
        try:
            yield llm
        finally:
            llm.close()
            del llm
            self.free()

    def device_store(self, options: str = "") -> str:
        """Return the URL of a store on the device that holds all chunks of the longest prompt, several times."""
        return f"device://?max_bytes=40GiB{options}" if self.cuda else f"device://?device=cpu{options}"

    def texts(self, count: int, seed: int) -> list[str]:
        """Return `count` texts of `chunk_tokens` tokens each."""
        return make_texts(count, seed, self.chunk_tokens)

    def shuffled(self, texts: list[str], number: int) -> list[str]:
        """Return the texts in the order of prompt `number`."""
        return random.Random(number).sample(texts, len(texts))

    def question(self, number: int) -> str:
        """Return the question of prompt `number`."""
        return make_question(number)

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give memory back that nothing refers to."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def milliseconds(self, logits: Callable[[], Tensor]) -> float:
        """Return the milliseconds until the token of these logits is on the host."""
        self.wait()
        started = time.perf_counter()
        int(logits().argmax())
        return (time.perf_counter() - started) * 1e3

    def each_milliseconds(self, work: Callable[[], object], times: int = 10, warm_up: bool = True) -> float:
        """Return the milliseconds of a call, on average over several, after one to warm up."""
        if warm_up:
            work()
        self.wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - started) / times * 1e3


def described(error: BaseException) -> str:
    """Return an error in one line, with the last line of chunkcache that it came through."""
    through = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in through if OWN.search(frame.filename) and frame.name != "step"]
    where = f" at {'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}{where}"


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return `|value - reference| / |reference|` over the whole tensor, on the CPU."""
    value, reference = value.float().cpu(), reference.float().cpu()
    return float((value - reference).norm() / reference.norm())


def _end(*_: object) -> None:
    raise OutOfTime
