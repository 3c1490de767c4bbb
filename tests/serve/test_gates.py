"""What happens before a request is read, and before the first one comes."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from support.llm import QUESTION, TEXTS, own_model, wrapped
from support.server import MODEL, served

from chunkcache.errors import InputError
from chunkcache.serve import service as services
from chunkcache.serve.service import Service
from chunkcache.serve.tenants import Tenant, Tenants, digest

KEY = "key-of-the-first-tenant"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}


def reply(url, head):
    """Return what a server answers to the head of a request, whose body never comes."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall(head.encode())
        return connection.recv(4096).decode()


def test_who_has_no_key_is_refused_before_the_body_comes():
    with served(tenants=Tenants({digest(KEY): Tenant("one")}), body_bytes=1000) as (url, _):
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for length in ("Content-Length: 500", "Content-Length: 5000", "Transfer-Encoding: chunked"):
            told = reply(url, f"{head}{length}\r\n\r\n")
            assert told.startswith("HTTP/1.1 401")
        known = f"{head}Authorization: Bearer {KEY}\r\nContent-Length: 5000\r\n\r\n"
        assert reply(url, known).startswith("HTTP/1.1 413")
        assert 'request_errors_total{status="401"} 3.0' in httpx.get(
            f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}
        ).text  # fmt: skip


@pytest.fixture(scope="module")
def keyless():
    with served() as (url, _), httpx.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://example.com"}, 403),
        ({"Origin": "http://rebound.example.com:8000", "Sec-Fetch-Site": "same-origin"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::"}, 403),
        ({"Origin": "http://[::1]:8000", "Sec-Fetch-Site": "same-origin"}, 400),
        ({"Origin": "http://localhost:8000", "Sec-Fetch-Site": "none"}, 400),
        ({}, 400),
    ],
)
def test_pages_of_other_sites_ask_nothing_of_a_server_without_keys(keyless, headers, status):
    response = keyless.post("/v1/chat/completions", json={}, headers=headers)  # 400 is for who is listened to
    assert response.status_code == status
    assert (response.json()["error"]["type"] == "permission_error") == (status == 403)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_documents_are_json_only_if_they_are_called_so(keyless, kind):
    body = b'{"index": "x", "documents": [{"id": "1", "text": "t"}]}'
    response = keyless.post("/v1/documents", content=body, headers={"Content-Type": kind} if kind else {})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]
    assert keyless.get("/v1/documents").json()["data"] == []


def test_what_can_be_asked_is_told_to_who_has_a_key():
    with served(tenants=Tenants({digest(KEY): Tenant("one")})) as (url, _):
        assert httpx.get(f"{url}/openapi.json").status_code == 401
        told = httpx.get(f"{url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert "/v1/chat/completions" in told["paths"]


def test_salts_of_one_tenant_leave_the_views_of_others(monkeypatch):
    monkeypatch.setattr(services, "VIEWS", 3)
    service = Service(wrapped(), MODEL)
    one, other = Tenant("one"), Tenant("other")
    mine, salted, own = service.view(one), service.view(one, ["s"]), service.view(other)
    for number in range(9):
        service.view(other, [str(number)])
    assert service.view(one) is mine
    assert service.view(one, ["s"]) is salted
    assert service.view(other) is own  # what a tenant has without a salt stays, too
    assert len(service._views["other"]) == 3
    service.scheduler.close()


def test_a_view_that_has_to_wait_holds_up_nobody_else(monkeypatch):
    with served() as (url, service):
        going, begun, make = threading.Event(), threading.Event(), service.llm.for_tenant

        def waiting(key):
            if "/" in key:
                begun.set()
                going.wait(60)
            return make(key)

        monkeypatch.setattr(service.llm, "for_tenant", waiting)
        with ThreadPoolExecutor(2) as threads:
            body = {"texts": [TEXTS[0]], "cache_salt": "s"}
            asked = threads.submit(httpx.post, f"{url}/v1/chunks", json=body, timeout=60)
            made = threads.submit(service.view, Tenant(), ["s"])
            assert begun.wait(60)
            assert httpx.get(f"{url}/health").status_code == 200
            assert service.view(Tenant("other")) is service.view(Tenant("other"))
            going.set()
            assert asked.result().json()["computed"] == 1
            assert made.result() is service.view(Tenant(), ["s"])  # of two that are made at once one is kept


def test_what_the_first_request_would_wait_for_is_there_before_it():
    llm = wrapped()
    service = Service(llm, MODEL)
    tenants = [Tenant("one"), Tenant("two")]
    service.warm(tenants)
    assert service.scheduler.steps == 1
    for tenant in tenants:
        view = service.view(tenant)
        before = llm.store.stats().hits
        assert view.generate(QUESTION, TEXTS, max_new_tokens=1).stats.misses == 3
        assert llm.store.stats().hits > before  # of the lead-in
    service.scheduler.close()


def test_the_models_own_limit_of_time_ends_an_answer():
    llm = wrapped(own_model())
    llm.model.generation_config.max_time = 0.0
    with served(llm, timeout_s=60.0) as (url, service):
        answer = httpx.post(f"{url}/v1/chat/completions", json=ASK).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        assert service.seconds(None) == 0.0


def test_a_generation_config_with_guidance_is_not_served():
    llm = wrapped(own_model())
    llm.model.generation_config.guidance_scale = 1.5
    with pytest.raises(InputError, match="guidance_scale"):
        Service(llm, MODEL)


def test_a_part_with_a_breakpoint_stays_where_it_is():
    with served() as (url, service):
        part = {"type": "text", "text": TEXTS[0], "prompt_cache_breakpoint": {"mode": "explicit"}}
        said = [{"type": "text", "text": "Read this:"}, part, {"type": "text", "text": QUESTION}]
        bodies = [
            httpx.post(
                f"{url}/v1/chat/completions", json={**ASK, "messages": [{"role": "user", "content": said}]}
            ).json()
            for _ in range(2)
        ]
        assert [body["usage"]["prompt_tokens_details"]["chunkcache"][0]["hits"] for body in bodies] == [0, 1]
        wanted = service.llm.chat(
            [{"role": "user", "content": f"Read this:\n{TEXTS[0]}\n\n{QUESTION}"}],
            max_new_tokens=4, do_sample=False, policy="full",
        )  # fmt: skip
        assert bodies[0]["usage"]["prompt_tokens"] == pytest.approx(wanted.stats.tokens, abs=3)
