"""The first token is held back to a multiple of the padding, and not before: what is reported stays as it was."""

from __future__ import annotations

import math
import time

import pytest
import torch
from support.llm import QUESTION, TEXTS, own_model, wrapped
from transformers import TextStreamer

import chunkcache
from chunkcache.engine import padding
from chunkcache.engine.padding import left

GREEDY = {"max_new_tokens": 3, "do_sample": False}
PAD = 0.25


class Waits:
    """The module `time` for `padding`, with what was slept."""

    def __init__(self):
        self.slept = []

    perf_counter = staticmethod(time.perf_counter)

    def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.fixture
def waits(monkeypatch):
    waits = Waits()
    monkeypatch.setattr(padding, "time", waits)
    return waits


@pytest.mark.parametrize("pad", [0, 0.0, -1, math.inf, math.nan, "0.5", True, [1.0]])
def test_what_is_no_time_is_refused(pad):
    with pytest.raises(chunkcache.InputError, match="pad="):
        wrapped(pad=pad)


@pytest.mark.parametrize(
    ("elapsed", "pad", "expected"),
    [(0.0, 0.5, 0.0), (0.2, 0.5, 0.3), (0.5, 0.5, 0.0), (0.7, 0.5, 0.3), (7.25, 2, 0.75)],
)
def test_the_rest_to_the_next_multiple(elapsed, pad, expected):
    assert left(elapsed, pad) == pytest.approx(expected)


def test_without_a_padding_nothing_waits(waits):
    llm = wrapped()
    llm.generate(QUESTION, TEXTS, **GREEDY)
    llm.prefill(QUESTION, TEXTS)
    list(llm.stream(QUESTION, TEXTS, **GREEDY))
    assert waits.slept == []


WAYS = {
    "generate": lambda llm: llm.generate(QUESTION, TEXTS, **GREEDY),
    "beams": lambda llm: llm.generate(QUESTION, TEXTS, num_beams=2, **GREEDY),
    "lookup": lambda llm: llm.generate(QUESTION, TEXTS, prompt_lookup_num_tokens=2, **GREEDY),
    "stream": lambda llm: list(llm.stream(QUESTION, TEXTS, **GREEDY)),
    "prefill": lambda llm: llm.prefill(QUESTION, TEXTS),
    "inputs": lambda llm: llm.prepare_inputs(QUESTION, TEXTS),
    "chat": lambda llm: llm.chat([{"role": "user", "content": QUESTION}], **GREEDY),
    "conversation": lambda llm: llm.conversation().generate(QUESTION, TEXTS, **GREEDY),
}


@pytest.mark.parametrize("precomputed", [False, True], ids=["miss", "hit"])
@pytest.mark.parametrize("way", WAYS)
def test_each_request_is_held_back_once(way, precomputed, waits):
    llm = wrapped(pad=PAD)
    if precomputed:
        llm.precompute(TEXTS)
    WAYS[way](llm)
    [slept] = waits.slept
    assert 0 <= slept < PAD


def test_hits_and_misses_come_at_multiples():
    llm = wrapped(pad=PAD)
    for _ in range(2):
        started = time.perf_counter()
        llm.prefill(QUESTION, TEXTS)
        assert time.perf_counter() - started >= PAD
        llm.precompute(TEXTS)


def test_an_answer_is_the_same(waits):
    plain, held = wrapped(), wrapped(pad=PAD)
    assert plain.generate(QUESTION, TEXTS, **GREEDY).token_ids == held.generate(QUESTION, TEXTS, **GREEDY).token_ids


class SeenStreamer(TextStreamer):
    """A streamer that notes how often had been slept when it got something."""

    def __init__(self, waits, tokenizer):
        super().__init__(tokenizer, skip_prompt=True)
        self._waits, self.at = waits, []

    def put(self, value):
        self.at.append(len(self._waits.slept))
        super().put(value)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=["plain", "lookup"])
def test_a_streamer_gets_the_first_token_after_the_wait(options, waits):
    llm = wrapped(pad=PAD)
    streamer = SeenStreamer(waits, llm.tokenizer)
    llm.generate(QUESTION, TEXTS, streamer=streamer, **options, **GREEDY)
    assert streamer.at[0] == 0  # the prompt
    assert len(streamer.at) > 1
    assert set(streamer.at[1:]) == {1}


class Sleeps(Waits):
    """Sleeps for a while, and notes when it began to."""

    def sleep(self, seconds):
        self.slept.append(time.perf_counter())
        time.sleep(PAD)


@pytest.mark.parametrize("streams", [False, True])
def test_the_reported_time_is_without_the_wait(streams, monkeypatch):
    sleeps = Sleeps()
    monkeypatch.setattr(padding, "time", sleeps)
    llm = wrapped(pad=PAD)
    streamer = SeenStreamer(sleeps, llm.tokenizer) if streams else None
    before = time.perf_counter()
    answer = llm.generate(QUESTION, TEXTS, streamer=streamer, **GREEDY)
    assert answer.stats.ttft_s == answer.ttft_s <= sleeps.slept[0] - before


def test_the_attached_model_is_held_back(waits):
    llm = wrapped(own_model(), pad=PAD)
    llm.precompute(TEXTS)
    prompt = torch.tensor([llm.prompts.build(QUESTION, TEXTS).token_ids])
    with llm.attached():
        llm.model.generate(prompt, **GREEDY)
        assert llm.last_stats.hits
        llm.model.generate(prompt[:, :5], **GREEDY)  # straight through
        assert len(waits.slept) == 2
        with pytest.raises(chunkcache.InputError, match="by name"):
            llm.model.generate(prompt, None)
    llm.model.generate(prompt, **GREEDY)
    assert len(waits.slept) == 2
