"""BackgroundPrecompute: texts of a retriever become findable, come nearer, and are computed when they shall be."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.llm import QUESTION, TEXTS, wrapped

from chunkcache.errors import InputError, PolicyError
from chunkcache.integrations import precomputing as module
from chunkcache.integrations.precomputing import BackgroundPrecompute

LONG = "word " * 600  # more than the 512 tokens of the tiny model


def stored(llm, texts=TEXTS):
    return [key in llm.store for key in llm.keys(texts)]


class Gate:
    """Stands in the way of `llm.precompute` until it is opened."""

    def __init__(self, llm, monkeypatch):
        self.llm, self.inside, self.opened = llm, threading.Event(), threading.Event()
        self.compute = llm.precompute
        self.calls = []
        monkeypatch.setattr(llm, "precompute", self)

    def __call__(self, texts, *args, **options):
        self.calls.append(list(texts))
        self.inside.set()
        assert self.opened.wait(20)
        return self.compute(texts, *args, **options)


@pytest.fixture
def llm():
    return wrapped()


@pytest.fixture
def gate(llm, monkeypatch):
    gate = Gate(llm, monkeypatch)
    yield gate
    gate.opened.set()


def test_now_means_before_take_returns(llm):
    assert BackgroundPrecompute(llm).take(TEXTS) == [key.digest for key in llm.keys(TEXTS)]
    assert stored(llm) == [True] * 3


def test_never_leaves_it_to_the_request_which_finds_the_texts(llm):
    ahead = BackgroundPrecompute(llm, "never")
    assert ahead.take(TEXTS) == [key.digest for key in llm.keys(TEXTS)]
    ahead.flush()
    assert stored(llm) == [False] * 3
    prompt = llm.chat_prompt([{"role": "user", "content": f"{TEXTS[1]}\n\n{QUESTION}"}])
    assert prompt.chunks == (llm.prompts.chunk(TEXTS[1]),)


def test_in_the_background_take_returns_at_once(llm, gate):
    ahead = BackgroundPrecompute(llm, "background")
    assert ahead.take(TEXTS) == [key.digest for key in llm.keys(TEXTS)]
    assert gate.inside.wait(20)
    assert stored(llm) == [False] * 3
    gate.opened.set()
    ahead.flush()
    assert stored(llm) == [True] * 3
    assert ahead.errors == ahead.dropped == 0


def test_what_is_stored_already_is_not_computed_again(llm, gate):
    gate.opened.set()
    gate.compute(TEXTS[:2])
    BackgroundPrecompute(llm).take([*TEXTS, TEXTS[2]])
    assert gate.calls == [[TEXTS[2]]]


def test_system_prompt_and_policy_are_those_of_the_requests(llm):
    ahead = BackgroundPrecompute(llm, "now", "Be brief.", "cacheblend")
    digests = ahead.take(TEXTS)
    assert digests == [key.digest for key in llm.keys(TEXTS, system="Be brief.", policy="cacheblend")]
    assert not set(digests) & {key.digest for key in llm.keys(TEXTS)}
    assert llm.generate(QUESTION, TEXTS, system="Be brief.", policy="cacheblend", max_new_tokens=1).stats.hits == 3


@pytest.mark.parametrize("how", ["now", "background"])
def test_by_their_document_texts_are_deleted(llm, how):
    ahead = BackgroundPrecompute(llm, how)
    ahead.take(TEXTS, ["a", None, "b"])
    ahead.flush()
    llm.delete(document="a")
    assert stored(llm) == [False, True, True]


def test_what_was_stored_without_its_document_gets_it_once(llm, gate):
    gate.opened.set()
    gate.compute(TEXTS)
    ahead = BackgroundPrecompute(llm)
    for _ in range(3):
        ahead.take(TEXTS, ["a", "a", None])
    assert gate.calls == [list(TEXTS[:2])]
    llm.delete(document="a")
    assert stored(llm) == [False, False, True]


def test_what_it_remembers_is_bounded(llm, gate, monkeypatch):
    monkeypatch.setattr(module, "_LABELLED", 2)
    gate.opened.set()
    ahead = BackgroundPrecompute(llm)
    for texts in (TEXTS, TEXTS[:1], TEXTS[:1]):
        ahead.take(texts, ["a"] * len(texts))
    assert gate.calls == [list(TEXTS), [TEXTS[0]]]


def test_a_text_of_two_documents_stays_until_both_are_gone(llm):
    ahead = BackgroundPrecompute(llm)
    ahead.take([TEXTS[0], TEXTS[0]], ["a", "b"])
    llm.update_document("a", [])
    assert stored(llm, TEXTS[:1]) == [True]
    llm.update_document("b", [])
    assert stored(llm, TEXTS[:1]) == [False]


def test_white_space_and_what_is_too_long_are_left_out_and_said_once(llm, caplog):
    ahead = BackgroundPrecompute(llm)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            digests = ahead.take(["", TEXTS[0], " \n", LONG], ["a", "b", "c", "d"])
    assert [digest is None for digest in digests] == [True, False, True, True]
    assert ahead.skipped == 6
    assert [record.message for record in caplog.records if record.name == "chunkcache.retriever"] == [
        "a retrieved text cannot be cached, because it is white space alone; further ones are only counted"
    ]


def test_the_reason_for_a_long_text_has_its_length_and_not_its_words(llm, caplog):
    assert BackgroundPrecompute(llm).take([LONG]) == [None]
    tokens = len(llm.prompts.chunk(LONG))
    assert f"it has {tokens} tokens, and does not fit the model's context of {llm.max_tokens}" in caplog.text
    assert "word word" not in caplog.text


def test_the_longest_text_that_fits_is_cached(llm):
    room = llm.max_tokens - len(llm.prompts.prefix())
    texts = [" ".join(["a"] * count) for count in range(1, room)]
    fitting = [text for text in texts if len(llm.prompts.chunk(text)) == room - 1][:1]
    over = [text for text in texts if len(llm.prompts.chunk(text)) >= room][:1]
    assert fitting
    assert over
    assert [digest is None for digest in BackgroundPrecompute(llm).take([*fitting, *over])] == [False, True]


def test_nothing_at_all(llm, gate):
    assert BackgroundPrecompute(llm).take([]) == []
    assert BackgroundPrecompute(llm, "background").take([" "], ["a"]) == [None]
    assert gate.calls == []


def test_what_waits_is_not_queued_again_and_what_is_too_much_is_dropped(llm, gate, monkeypatch, caplog):
    monkeypatch.setattr(module, "WAITING", 2)
    ahead = BackgroundPrecompute(llm, "background")
    ahead.take(TEXTS[:1])
    assert gate.inside.wait(20)
    more = [f"{TEXTS[0]} Number {number}." for number in range(4)]
    for _ in range(2):
        ahead.take(more)
    assert ahead.dropped == 4
    assert caplog.text.count("wait to be precomputed") == 1
    gate.opened.set()
    ahead.flush()
    assert stored(llm, more) == [True, True, False, False]
    assert gate.calls == [list(TEXTS[:1]), more[:2]]


def test_an_error_in_the_background_is_logged_once_and_ends_nothing(llm, monkeypatch, caplog):
    compute = llm.precompute

    def fail(texts, *args, **options):
        if TEXTS[2] in texts:
            return compute(texts, *args, **options)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llm, "precompute", fail)
    ahead = BackgroundPrecompute(llm, "background")
    for text in TEXTS:
        ahead.take([text])
        ahead.flush()
    assert ahead.errors == 2
    assert caplog.text.count("precomputing retrieved texts failed") == 1
    assert stored(llm) == [False, False, True]


def test_an_error_now_is_the_callers(llm, monkeypatch):
    monkeypatch.setattr(llm, "precompute", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        BackgroundPrecompute(llm).take(TEXTS)


def test_close_drops_what_waits_and_takes_nothing_more(llm, gate):
    ahead = BackgroundPrecompute(llm, "background")
    ahead.take(TEXTS[:1])
    assert gate.inside.wait(20)
    ahead.take(TEXTS[1:2])
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(ahead.close)
        gate.opened.set()
        closing.result(20)
    ahead.take(TEXTS[2:])
    ahead.flush()
    assert stored(llm) == [True, False, False]
    ahead.close()


def test_there_is_a_thread_only_while_there_is_work(llm, gate):
    ahead = BackgroundPrecompute(llm, "background")
    assert not workers()
    ahead.take(TEXTS)
    assert len(workers()) == 1
    gate.opened.set()
    ahead.flush()
    for thread in workers():  # on its way out
        thread.join(20)
    assert not workers()


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "chunkcache-ahead"]


def test_several_threads_may_take_at_once(llm):
    ahead = BackgroundPrecompute(llm, "background")
    texts = [f"{text} Number {number}." for number in range(4) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        for digests in pool.map(lambda start: ahead.take(texts[start:], ["a"] * len(texts[start:])), range(8)):
            assert None not in digests
    ahead.flush()
    assert stored(llm, texts) == [True] * len(texts)


def test_nobody_keeps_it_alive(llm):
    ahead = BackgroundPrecompute(llm, "background")
    ahead.take(TEXTS)
    ahead.flush()
    for thread in workers():
        thread.join(20)
    gone = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None


def test_a_process_that_ends_meanwhile_ends_well():
    program = (
        "from support.llm import TEXTS, wrapped\n"
        "from chunkcache.integrations.precomputing import BackgroundPrecompute\n"
        "BackgroundPrecompute(wrapped(), 'background').take([f'{t} {n}' for n in range(200) for t in TEXTS])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_makes_no_sense_is_refused(llm):
    with pytest.raises(InputError, match="precompute is 'later': choose one of now, background, never"):
        BackgroundPrecompute(llm, "later")
    with pytest.raises(PolicyError):
        BackgroundPrecompute(llm, policy="nonsense")
    with pytest.raises(InputError, match="2 documents for 3 texts"):
        BackgroundPrecompute(llm).take(TEXTS, ["a", "b"])


def test_what_is_retrieved_is_credited_in_the_store(llm):
    credited = []
    credit = llm.store.credit
    llm.store.credit = lambda key, worth: credited.append(key) or credit(key, worth)
    BackgroundPrecompute(llm).take(TEXTS)
    assert credited == llm.keys(TEXTS)


def test_a_negative_number_of_ranks_is_refused(llm):
    with pytest.raises(InputError, match="reorder = -1"):
        BackgroundPrecompute(llm, reorder=-1)
