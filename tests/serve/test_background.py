"""Work that no answer waits for: bounded, taken in turns, and over when its client goes away."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from support.llm import QUESTION, tiny_model, wrapped
from support.server import MODEL, served

from chunkcache.engine.scheduler import Limits
from chunkcache.errors import QueueFullError
from chunkcache.serve.background import Background

MANY = [f"This is passage {number} of a long book, about one of the hills of the island." for number in range(400)]


@pytest.fixture
def background():
    """A server, and what it does in the background."""
    serving = served(wrapped(tiny_model()), limits=Limits(waiting=3), precompute_tokens=20_000)
    with serving as (url, service), httpx.Client(base_url=url, timeout=60) as client:
        yield client, service


def steps(seen, name, count, gate=None):
    """Take `count` steps, noting each."""
    for _ in range(count):
        if gate is not None:
            gate.wait(30)
        seen.append(name)
        yield
    return name


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_jobs_of_tenants_take_turns(background):
    _, service = background
    gate, seen = threading.Event(), []
    jobs = [service.background.submit(name, steps(seen, name, 3, gate)) for name in ("one", "one", "two")]
    gate.set()
    assert [job.result(30) for job in jobs] == ["one", "one", "two"]
    assert seen[1:6].count("two") >= 2  # behind the step that was begun first, as many as both of the other tenant
    assert sorted(seen) == ["one"] * 6 + ["two"] * 3


def test_one_too_many_is_told_to_come_back(background):
    client, service = background
    gate = threading.Event()
    jobs = [service.background.submit("", steps([], "", 1, gate)) for _ in range(3)]
    refused = client.post("/v1/chunks", json={"texts": MANY[:1]})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert client.post("/v1/chat/completions", json={
        "model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2,
    }).status_code == 200  # while a step is under way  # fmt: skip
    gate.set()
    for job in jobs:
        job.result(30)
    until(lambda: client.post("/v1/chunks", json={"texts": MANY[:1]}).status_code == 200)


def test_one_tenant_does_not_keep_the_jobs_of_others_out(background):
    _, service = background
    gate = threading.Event()
    jobs = [service.background.submit("one", steps([], "", 1, gate)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait"):
        service.background.submit("one", steps([], "", 1))
    jobs.append(service.background.submit("two", steps([], "", 1)))
    with pytest.raises(QueueFullError, match="4 requests wait"):
        service.background.submit("two", steps([], "", 1))
    gate.set()
    for job in jobs:
        job.result(30)
    until(lambda: service.background.under_way == 0)


def test_a_client_that_goes_away_ends_its_job(background):
    client, service = background
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chunks", json={"texts": MANY}, timeout=0.3)
    until(lambda: service.background.under_way == 0)
    keys = service.llm.keys(MANY)
    assert sum(key in service.llm.store for key in keys) < len(MANY)


def test_texts_are_bounded_and_those_that_do_not_fit_are_left_out(background):
    client, _ = background
    refused = client.post("/v1/chunks", json={"texts": ["the sea is calm " * 600] * 20})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_many_tokens")
    long = "the sea is calm " * 600
    assert client.post("/v1/chunks", json={"texts": [*MANY[:2], long]}).json() == {
        "chunks": 3, "computed": 2, "skipped": 1,
    }  # fmt: skip
    alone = client.post("/v1/chunks", json={"texts": [long]})
    assert alone.json()["error"]["code"] == "context_length_exceeded"
    assert client.post("/v1/chunks", json={"texts": [" "]}).status_code == 400
    wrong = client.post("/v1/chunks", json={"texts": MANY[:2], "documents": ["one"]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "documents")
    document = {"id": "1", "text": "the sea is calm " * 20_000}
    refused = client.post("/v1/documents", json={"index": "x", "documents": [document]})
    assert refused.status_code == 413


def test_texts_are_computed_behind_their_nearest(background):
    client, _ = background
    asked = {"texts": MANY[:4], "lead": "neighbours"}
    assert client.post("/v1/chunks", json=asked).json()["computed"] == 4


def test_a_step_that_fails_is_told_without_its_text(background):
    _, service = background

    def failing():
        yield
        raise RuntimeError("the text of a secret passage")

    job = service.background.submit("", failing())
    assert isinstance(job.exception(30), RuntimeError)
    assert service.background.submit("", steps([], "next", 1)).result(30) == "next"


def test_what_is_under_way_when_the_server_ends_is_told_so(background):
    _, service = background
    own, gate, begun = Background(service.scheduler), threading.Event(), threading.Event()

    def first():
        begun.set()
        gate.wait(30)
        yield
        yield

    jobs = [own.submit("one", first()), own.submit("two", steps([], "two", 2))]
    begun.wait(30)
    closing = threading.Thread(target=own.close)
    closing.start()
    assert isinstance(jobs[1].exception(30), QueueFullError)
    gate.set()
    closing.join()
    assert isinstance(jobs[0].exception(30), QueueFullError)
    with pytest.raises(QueueFullError, match="shutting down"):
        own.submit("one", first())
