"""The router, over real servers: where requests go, what comes back, and what becomes of them when a server dies."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack

import httpx
import openai
import pytest
from support.fleet import ASK, CHAT, LONG, ServeProcess, Stream, for_each, routed, running, until
from support.llm import QUESTION, TEXTS, saved_model, wrapped
from support.server import MODEL, served

from chunkcache.serve.tenants import Tenant, Tenants, digest

KEY = "key-of-the-first-tenant"


@pytest.fixture(scope="module")
def two():
    """Two servers of this process, and a router over them."""
    with served(wrapped()) as (one, first), served(wrapped()) as (other, second), routed(one, other) as (url, router):
        yield url, router, {one: first, other: second}


def events(text):
    return [line[6:] for line in text.splitlines() if line.startswith("data: ")]


def test_a_chunk_is_computed_once_and_found_where_it_is(two):
    url, _, services = two
    for target, body in for_each(services).items():
        for hits in (0, 1):
            usage = httpx.post(url + CHAT, json=body, timeout=60).json()["usage"]
            assert usage["prompt_tokens_details"]["chunkcache"][0]["hits"] == hits
        assert httpx.post(target + CHAT, json=body, timeout=60).json()["usage"]["prompt_tokens_details"][
            "cache_write_tokens"
        ] == 0  # fmt: skip


def test_answers_are_those_of_the_server(two):
    url, _, services = two
    direct = next(iter(services))
    for path, body in (
        (CHAT, {**ASK, "documents": list(TEXTS)}),
        (CHAT, {**ASK, "documents": list(TEXTS), "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"model": MODEL, "prompt": "The bridge", "temperature": 0, "stream": True}),
        ("/v1/responses", {"model": MODEL, "input": QUESTION, "temperature": 0, "stream": True}),
    ):
        got, wanted = (httpx.post(each + path, json=body, timeout=60) for each in (url, direct))
        assert got.status_code == 200
        assert got.headers["content-type"] == wanted.headers["content-type"]
        if not body.get("stream"):
            assert got.json()["choices"] == wanted.json()["choices"]
        else:
            assert len(events(got.text)) == len(events(wanted.text))
    for path, body, status in (
        (CHAT, {**ASK, "model": "other"}, 404),
        (CHAT, {"nope": 1}, 400),
        ("/nothing", {}, 404),
    ):
        got, wanted = (httpx.post(each + path, json=body) for each in (url, direct))
        assert (got.status_code, got.json()) == (status, wanted.json())
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == MODEL
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        parts = list(client.chat.completions.create(**{**ASK, "max_tokens": 8}, stream=True))
        assert parts[-1].choices[0].finish_reason in ("length", "stop")


def test_pieces_come_as_they_are_made_and_a_client_that_goes_away_ends_its_answer(two):
    url, _, services = two
    target, body = next(iter(for_each(services).items()))
    body = {**LONG, "documents": body["documents"]}
    with httpx.stream("POST", url + CHAT, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        for _ in range(5):
            next(lines)
        assert services[target].scheduler.load != (0, 0)
    until(lambda: services[target].scheduler.load == (0, 0))
    assert services[target].scheduler.steps < 300
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + CHAT, json={**body, **LONG, "documents": body["documents"], "stream": False}, timeout=0.2)
    until(lambda: all(service.scheduler.load == (0, 0) for service in services.values()))


def test_chunks_that_are_computed_ahead_are_known_to_all(two):
    url, router, services = two
    text = "A text that both of the servers are told of ahead, and that is long enough to be found again."
    assert httpx.post(f"{url}/v1/chunks", json={"texts": [text]}, timeout=60).json() == {"chunks": 1, "computed": 1}
    said = {**ASK, "messages": [{"role": "user", "content": f"{text}\n\nWhat is known?"}]}
    for each in services:
        details = httpx.post(each + CHAT, json=said, timeout=60).json()["usage"]["prompt_tokens_details"]
        assert details["chunkcache"][0]["hits"] == 1
    assert httpx.post(f"{url}/v1/chunks", json={"texts": []}).status_code == 400
    assert httpx.post(url + CHAT, content=b"x" * (8 * 2**20 + 1)).status_code == 413
    assert [replica.load for replica in router.replicas] == [0, 0]


def test_a_request_goes_to_no_other_host(two):
    url, router, _ = two
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.5)
        there = f"127.0.0.1:{elsewhere.getsockname()[1]}"
        for target in (f"@{there}/", f"http://{there}/", f"//{there}/"):
            host, _, port = url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                assert b" 40" in connection.recv(64)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert all(replica.up for replica in router.replicas)


def test_no_dashboard_is_reached_through_the_router():
    with served(dashboard=True) as (direct, _), routed(direct) as (url, _):
        assert httpx.get(f"{direct}/dashboard/api/state").status_code == 200
        host, _, port = url.removeprefix("http://").partition(":")
        for target in (
            "/", "/?a=b", "//", "/dashboard", "/dashboard/api/state", "/dashboard/page.js", "/%64ashboard/api/state",
            "/v1/../dashboard/api/state", "/v1/%2e%2e/dashboard/api/state", "/.//dashboard/api/state",
            "/dashboard/api/state#/../../../v1/models",
        ):  # fmt: skip
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"GET {target} HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n".encode())
                assert connection.recv(64).startswith(b"HTTP/1.1 404"), target
        assert httpx.delete(f"{url}/dashboard/api/store", params={"document": "a"}).status_code == 404
        assert httpx.get(f"{url}/v1/models").status_code == 200
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET /x?" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert connection.recv(64).startswith(b"HTTP/1.1 4")


async def breaks_off(scope, receive, send):
    """Answer as a replica that goes away within its answer."""
    assert scope["type"] == "http"
    streams = scope["path"] != "/health"
    headers = [(b"content-type", b"text/event-stream" if streams else b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send(
        {"type": "http.response.body", "body": b'data: {"a":1}\n\n' if streams else b"{}", "more_body": streams}
    )
    if streams:
        raise ConnectionError


def test_a_stream_that_is_cut_ends_as_its_api_ends_streams():
    with running(breaks_off) as replica, routed(replica) as (url, router):
        texts = []
        for path in (CHAT, "/v2/chat"):
            until(lambda: all(each.up for each in router.replicas))
            texts.append(httpx.post(url + path, json={**ASK, "stream": True}).text)
    of_openai, of_cohere = texts
    assert events(of_openai)[-1] == "[DONE]"
    assert json.loads(events(of_openai)[-2])["error"]["code"] == "replica_lost"
    assert of_cohere.split("\n\n")[-2].startswith("event: message-end\n")
    told = json.loads(events(of_cohere)[-1])
    assert (told["type"], told["delta"]["finish_reason"]) == ("message-end", "ERROR")
    assert "went away" in told["delta"]["error"]


def test_the_routers_own_errors_have_the_shape_of_the_api():
    with routed(body_bytes=100) as (url, _):
        for content, status in ((b"{}", 503), (b"x" * 101, 413)):
            told = httpx.post(f"{url}/v2/chat", content=content)
            assert (told.status_code, list(told.json())) == (status, ["message"])
            assert list(httpx.post(url + CHAT, content=content).json()) == ["error"]


def test_what_the_router_tells_of_itself(two):
    url, router, services = two
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "replicas": 2, "up": 2}
    httpx.post(url + CHAT, json=ASK, timeout=60)
    told = httpx.get(f"{url}/metrics").text
    for replica in services:
        assert f'chunkcache_router_replica_up{{replica="{replica}"}} 1.0' in told
    assert "chunkcache_router_requests_total" in told
    router.replicas.set(services)
    assert all(replica.up for replica in router.replicas)


def test_keys_are_the_servers_and_servers_without_are_left_out_where_they_must_be():
    with ExitStack() as stack:
        keyed, _ = stack.enter_context(served(tenants=Tenants({digest(KEY): Tenant("one")})))
        open_, _ = stack.enter_context(served())
        url, router = stack.enter_context(routed(keyed, open_, keyed=True))
        assert [replica.up for replica in router.replicas] == [True, False]
        known = {"Authorization": f"Bearer {KEY}"}
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers=known).status_code == 200
        refused = httpx.post(url + CHAT, json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.post(url + CHAT, json=ASK, headers=known, timeout=60).status_code == 200


def test_one_of_two_dies_under_load(tmp_path):
    model, store = saved_model(tmp_path / "model"), f"disk://{tmp_path / 'store'}"
    replicas = [ServeProcess(model, "--store", store, "--running", "1") for _ in range(2)]
    with ExitStack() as stack:
        for replica in replicas:
            stack.callback(replica.kill)
        for replica in replicas:
            replica.ready()
        url, router = stack.enter_context(routed(*(replica.url for replica in replicas)))
        lost, kept = replicas
        bodies = for_each([lost.url, kept.url], **LONG)
        cut = Stream(url, bodies[lost.url])
        until(lambda: cut.has_text)
        waiting = Stream(url, bodies[lost.url])  # behind it, and without a token
        whole = Stream(url, bodies[kept.url])
        until(lambda: whole.has_text and sorted(each.load for each in router.replicas) == [1, 2])
        assert cut.events[-1] != "[DONE]"
        lost.kill()
        for stream in (cut, waiting, whole):
            stream.join(60)
        assert json.loads(cut.events[-2])["error"]["code"] == "replica_lost"
        assert cut.events[-1] == "[DONE]"
        assert waiting.status == whole.status == 200
        for stream in (waiting, whole):
            assert "error" not in "".join(stream.events)
            assert json.loads(stream.events[-2])["choices"][0]["finish_reason"] == "length"
        assert waiting.texts().startswith(cut.texts())  # the same answer, by the other
        for body in bodies.values():
            assert (
                httpx.post(url + CHAT, json={**body, "stream": False, "max_tokens": 3}, timeout=60).status_code == 200
            )
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "replicas": 2, "up": 1}
        told = httpx.get(f"{url}/metrics").text
        assert 'chunkcache_router_lost_total{outcome="cut short"} 1.0' in told
        assert 'chunkcache_router_lost_total{outcome="asked again"} 1.0' in told

        lost.start()
        until(lambda: all(replica.up for replica in router.replicas), 120)
        kept.kill()
        lost.kill()
        refused = httpx.post(url + CHAT, json=ASK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/health").status_code == 503


@pytest.mark.parametrize(("arguments", "says"), [([], "Missing argument 'URL...'"), (["host:1"], "is no URL")])
def test_bad_options_of_the_command_are_told(command_line, arguments, says):
    code, _, error = command_line("route", *arguments)
    assert code == 2
    assert says in error
