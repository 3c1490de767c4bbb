"""What clients send wrongly or oddly, and what the numbers of an answer say where it ends oddly."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import pytest
from support.llm import QUESTION, TEXTS, own_model, wrapped
from support.server import MODEL, served

from chunkcache.engine.scheduler import Limits
from chunkcache.errors import InputError
from chunkcache.serve.app import ServeOptions, create_app
from chunkcache.serve.openai import data
from chunkcache.serve.service import Service

ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
HALF = "half a pair: \ud83d"  # a text that JSON can carry and UTF-8 cannot


def post(server, body, path="chat/completions"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server[0]}/v1/{path}", content=content, headers=headers, timeout=60)


def refused(response):
    """Return the error of a request that was the client's fault."""
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    return response.json()["error"]


@pytest.mark.parametrize(
    "asked",
    [
        {"messages": [{"role": "user", "content": HALF}]},
        {"documents": [HALF]},
        {"documents": [{"title": HALF, "text": "A text."}]},
        {"documents": [{"data": {"text": HALF}}]},
        {"chat_template_kwargs": {"mood": HALF}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": HALF}}}},
        {"logit_bias": {"5": float("nan")}},
        {"logit_bias": {"5": 1e9}},
        {"logit_bias": {"100000": 1}},
        {"repetition_penalty": float("inf")},
        {"chat_template_kwargs": {"chat_template": "{% for each in range(9) %}{% endfor %}"}},
    ],
)
def test_what_would_fail_inside_is_refused_before(server, asked):
    assert HALF not in refused(post(server, {**ASK, **asked}))["message"]


def test_a_body_that_is_no_json(server):
    for body in (b'{"messages": secret}', b"[" * 10_000, b'{"model": "\xff"}', b'{"seed": ' + b"9" * 6000 + b"}"):
        error = refused(post(server, body))
        assert "JSON" in error["message"] or "parsing" in error["message"]
        assert error["param"] is None
        assert "secret" not in error["message"]


@pytest.mark.parametrize("how", [{"type": "json_schema"}, {"type": "text", "schema": {"type": "object"}}])
def test_a_response_by_a_schema_needs_one(server, how):
    error = refused(post(server, {"model": MODEL, "input": "secret", "text": {"format": how}}, "responses"))
    assert "json_schema" in error["message"]
    assert "secret" not in error["message"]


def test_a_null_is_as_if_the_field_were_not_there(server):
    wanted = post(server, ASK).json()["choices"]
    assert post(server, {**ASK, "n": None, "stream": None, "stop": None, "tools": None}).json()["choices"] == wanted
    said = {"role": "assistant", "content": "In 1931.", "audio": None, "tool_calls": None, "annotations": None}
    asked = {**ASK, "messages": [*ASK["messages"], said, *ASK["messages"]]}
    assert post(server, asked).status_code == 200


def test_more_answers_than_may_wait_are_refused_at_once(server):
    error = refused(post(server, {"model": MODEL, "prompt": ["a"] * 10_000, "n": 16}, "completions"))
    assert error["param"] == "prompt"
    assert "64 or fewer" in error["message"]
    with served(limits=Limits(waiting=2)) as small:
        assert refused(post(small, {**ASK, "n": 3}))["param"] == "n"
        assert len(post(small, {**ASK, "n": 2}).json()["choices"]) == 2


def test_a_method_that_there_is_not(server):
    for method in ("GET", "HEAD", "OPTIONS"):
        response = httpx.request(method, f"{server[0]}/v1/chat/completions")
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"


def test_a_query_that_is_no_utf8_is_answered():
    """Some servers beneath hand on raw bytes, so the application is asked itself."""
    service = Service(wrapped(), MODEL)
    app = create_app(service, ServeOptions(dashboard=True))

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def status(path):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"a=\xff",
            "headers": [(b"host", b"127.0.0.1")], "server": ("127.0.0.1", 80), "http_version": "1.1",
        }  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"]

    async def statuses():
        return [await status(path) for path in ("/nothing", "/dashboard/nothing", "/dashboard/page.js")]

    assert asyncio.run(statuses()) == [404, 404, 200]
    service.background.close()
    service.scheduler.close()


def test_a_temperature_next_to_zero_is_greedy(server):
    wanted = post(server, ASK).json()["choices"]
    assert post(server, {**ASK, "temperature": 1e-42}).json()["choices"] == wanted


def test_cached_tokens_are_those_that_no_answer_computed(server):
    texts = [f"{text} So it was told." for text in TEXTS]
    first = post(server, {**ASK, "documents": texts, "n": 3}).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0  # the first answer computed the chunks
    assert [told["hits"] for told in first["prompt_tokens_details"]["chunkcache"]] == [0, 3, 3]
    alone = post(server, {**ASK, "documents": texts}).json()["usage"]
    several = post(server, {**ASK, "documents": texts, "n": 3}).json()["usage"]
    assert 0 < alone["prompt_tokens_details"]["cached_tokens"] < alone["prompt_tokens"] == several["prompt_tokens"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (alone, several)]
    assert cached[0] == cached[1]


def test_what_a_stop_string_ends_is_counted(server):
    def count():
        text = httpx.get(f"{server[0]}/metrics").text
        ends = [line for line in text.splitlines() if 'request_success_total{finished_reason="stop"}' in line]
        return float(ends[0].split()[1]) if ends else 0.0

    whole = post(server, ASK).json()["choices"][0]["message"]["content"]
    before = count()
    answer = post(server, {**ASK, "stop": whole[0], "n": 2}).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["", ""]
    assert len(answer["usage"]["prompt_tokens_details"]["chunkcache"]) == 2
    assert count() == before + 2


def test_bytes_of_a_token_that_is_part_of_a_character_are_not_made_up(server):
    asked = {**ASK, "logprobs": True, "top_logprobs": 20, "max_tokens": 20}
    told = [
        each
        for token in post(server, asked).json()["choices"][0]["logprobs"]["content"]
        for each in token["top_logprobs"]
    ]
    assert {each["bytes"] is None for each in told} == {True, False}
    for each in told:
        assert (each["bytes"] is None) == ("\ufffd" in each["token"])


def test_no_text_ends_a_line_of_a_stream():
    text = "one\u2028two\u0085three\nfour"
    event = data({"text": text}).decode()
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: "))["text"] == text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_server_cuts_short_does_not_look_whole(stream):
    with served() as (url, service):
        closing = threading.Thread(target=service.scheduler.close)
        body = {**ASK, "logit_bias": {"2": -100}, "max_tokens": 400, "stream": stream}

        def close():
            while not service.scheduler.steps:
                time.sleep(0.001)
            closing.start()

        watching = threading.Thread(target=close)
        watching.start()
        response = post((url, service), body)
        watching.join()
        closing.join()
    if stream:
        told, done = response.text.split("\n\n")[-3:-1]
        assert done == "data: [DONE]"
        error = json.loads(told.removeprefix("data: "))["error"]
    else:
        assert response.status_code == 503
        error = response.json()["error"]
    assert error["code"] == "server_is_shutting_down"


@pytest.mark.parametrize(
    "config",
    [
        {"forced_eos_token_id": 2},
        {"stop_strings": ["e"]},
        {"eos_token_id": [2, 7, 40, 41]},
        {"repetition_penalty": 1.4, "do_sample": True, "top_p": 0.5},
    ],
)
def test_the_models_generation_config_counts_as_in_generate(config):
    llm = wrapped(own_model())
    vars(llm.model.generation_config).update(config)
    with served(llm) as running:
        for documents in ([], list(TEXTS)):
            wanted = llm.generate(QUESTION, documents, max_new_tokens=24, do_sample=False)
            body = {**ASK, "max_tokens": 24, "documents": documents}
            if not documents:  # `generate` frames a question over no chunks, too
                wanted = llm.chat(ASK["messages"], max_new_tokens=24, do_sample=False)
            answer = post(running, body).json()
            assert answer["usage"]["completion_tokens"] == len(wanted.token_ids)
            text = answer["choices"][0]["message"]["content"].strip()
            assert wanted.text.startswith(text) if "stop_strings" in config else text == wanted.text


def test_a_generation_config_with_beams_is_not_served():
    llm = wrapped(own_model())
    llm.model.generation_config.num_beams = 3
    with pytest.raises(InputError, match="num_beams"):
        Service(llm, MODEL)
