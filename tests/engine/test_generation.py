"""The clock, the stream that can be left early, and which keywords of `generate()` are refused."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.llm import QUESTION, TEXTS, chat_tokenizer, own_model, wrapped
from transformers import GenerationConfig

from chunkcache.engine.generation import (
    FirstTokenClock,
    Generation,
    check_options,
    needs_finished_cache,
    pad_token_id,
    setting,
)
from chunkcache.engine.stats import RequestStats
from chunkcache.engine.streaming import StopWhenSet, TextStream
from chunkcache.errors import InputError

IDS = torch.tensor([[5, 6, 7]])


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "chunkcache-stream"]


def speak(words: list[str]):
    """Return what a `TextStream` runs: it feeds `words` until told to stop."""

    def run(streamer, stop) -> Generation:
        streamer.put(IDS)  # the prompt, to be skipped
        ids: list[int] = []
        for word in words:
            new = chat_tokenizer()(word).input_ids
            streamer.put(torch.tensor(new))
            ids += new
            if stop(IDS, None).all():
                break
        streamer.end()
        return Generation(chat_tokenizer().decode(ids), ids, 0.1, RequestStats("full"), None)

    return run


def test_the_clock_keeps_the_first_time_and_never_stops():
    clock = FirstTokenClock()
    assert clock.first_token_at is None
    assert clock(IDS, None).tolist() == [False]
    first = clock.first_token_at
    assert clock(IDS.repeat(3, 1), None).tolist() == [False] * 3
    assert clock.first_token_at == first


def test_a_set_event_stops_every_sequence():
    event = threading.Event()
    stop = StopWhenSet(event)
    assert stop(IDS.repeat(2, 1), None).tolist() == [False, False]
    event.set()
    assert stop(IDS.repeat(2, 1), None).tolist() == [True, True]


def test_a_stream_gives_pieces_and_then_the_result():
    stream = TextStream(chat_tokenizer(), speak(["The bridge ", "was opened ", "in 1931."]))
    pieces = list(stream)
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces) == stream.result.text == "The bridge was opened in 1931."
    assert not stream_threads()


def test_a_stream_that_is_read_again_says_so():
    llm = wrapped()
    stream = llm.stream(QUESTION, TEXTS, max_new_tokens=4)
    text = "".join(stream)
    with pytest.raises(InputError, match=r"has been read; .* \.result\.text"):
        iter(stream)
    assert stream.result.text == text.strip()


@pytest.mark.parametrize(("pad", "expected"), [(0, 0), (3, 3), (None, 2)])
def test_the_pad_id_is_the_tokenizers_though_it_be_0(pad, expected):
    assert pad_token_id(SimpleNamespace(pad_token_id=pad, eos_token_id=2)) == expected


def test_a_pad_id_of_0_reaches_generate():
    llm = wrapped(own_model())
    llm.model.generation_config.pad_token_id = None
    llm.tokenizer = llm.engine.tokenizer = copy.deepcopy(llm.tokenizer)
    llm.tokenizer.pad_token_id = 0
    assert llm.engine.generate_options({}, FirstTokenClock())["pad_token_id"] == 0


def test_leaving_early_ends_the_thread():
    stream = TextStream(chat_tokenizer(), speak(["on and "] * 20_000))
    for _ in stream:
        break
    assert not stream_threads()
    assert 0 < len(stream.result.text) < 20_000 * len("on and ")


def test_closing_unread_ends_the_thread():
    stream = TextStream(chat_tokenizer(), speak(["on and "] * 20_000))
    stream.close()
    assert not stream_threads()
    assert len(stream.result.text) < 20_000 * len("on and ")


def test_an_error_is_raised_in_the_loop_after_the_pieces():
    def fail(streamer, stop):
        streamer.put(IDS)
        streamer.put(torch.tensor(chat_tokenizer()("so far so good ").input_ids))
        raise ZeroDivisionError("in the thread")

    stream = TextStream(chat_tokenizer(), fail)
    pieces = iter(stream)
    assert next(pieces).startswith("so")
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        list(pieces)
    assert stream.result is None
    assert not stream_threads()


@pytest.mark.parametrize(
    "name", ["input_ids", "inputs", "inputs_embeds", "attention_mask", "past_key_values", "cache_implementation"]
)
def test_what_chunkcache_sets_itself_is_refused(name):
    with pytest.raises(InputError, match=rf"{name}= is set by chunkcache; .*llm\.prepare_inputs"):
        check_options({name: None})


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prefill_chunk_size": 64}, {"num_return_sequences": 3}], ids=str
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        check_options(options)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": True}, {"num_return_sequences": 1}, {"num_return_sequences": None}, {"do_sample": True}],
    ids=str,
)
def test_the_rest_is_let_pass(options):
    check_options(options)


def test_a_keyword_goes_before_the_config_before_the_model():
    model = own_model()
    model.generation_config.top_k = 3
    config = GenerationConfig(top_k=5)
    assert setting(model, {}, "top_k") == 3
    assert setting(model, {"generation_config": config}, "top_k") == 5
    assert setting(model, {"generation_config": config, "top_k": 7}, "top_k") == 7


def test_what_the_given_config_leaves_open_is_the_models():
    model = own_model()
    model.generation_config.num_beams = 3
    assert setting(model, {"generation_config": GenerationConfig(top_k=5)}, "num_beams") == 3


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, False),
        ({"num_beams": 1}, False),
        ({"num_beams": 2}, True),
        ({"generation_config": GenerationConfig(num_beams=2)}, True),
    ],
    ids=str,
)
def test_beams_need_a_finished_cache(options, needed):
    assert needs_finished_cache(own_model(), options) is needed


@pytest.mark.parametrize("listened", ["next(iter(stream))", "pass"], ids=["begun", "never read"])
def test_a_process_may_end_while_a_stream_runs(listened):
    program = (
        "from support.llm import QUESTION, TEXTS, wrapped\n"
        "stream = wrapped().stream(QUESTION, TEXTS, max_new_tokens=300, min_new_tokens=300)\n"
        f"{listened}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
