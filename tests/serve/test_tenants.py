"""Who may ask, what each finds, and what a client that goes away leaves behind."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
from support.llm import QUESTION, TEXTS, wrapped
from support.server import MODEL, served

from chunkcache.engine.scheduler import Limits
from chunkcache.errors import InputError
from chunkcache.serve.tenants import Tenant, Tenants, digest

ONE, TWO = "key-of-the-first-tenant", "key-of-the-second-one"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
ENDLESS = {"logit_bias": {"2": -100}}  # the token that ends an answer
LONG = {**ASK, **ENDLESS, "max_tokens": 380, "stream": True}
HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))  # ready before anything runs


def ask(url, key=None, **asked):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return HTTP.post(f"{url}/v1/chat/completions", json={**ASK, **asked}, headers=headers)


@contextmanager
def begun(url, key=None, **asked):
    """Have a long answer under way, its first token there if it does not wait."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={**LONG, **asked}, headers=headers) as response:
        lines = response.iter_lines()
        for _ in range(3 if asked.get("n", 1) == 1 else 1):
            next(lines)
        yield


def hits(response):
    return response.json()["usage"]["prompt_tokens_details"]["chunkcache"][0]["hits"]


def test_without_the_right_key_nothing_is_told():
    with served(tenants=Tenants({digest(ONE): Tenant("one")})) as (url, _):
        for key in (None, TWO, ONE + "x", ""):
            response = ask(url, key)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        assert ask(url, ONE).status_code == 200


def test_tenants_and_salts_do_not_find_one_anothers_chunks():
    with served(tenants=Tenants({digest(ONE): Tenant("one"), digest(TWO): Tenant("two")})) as (url, _):
        documents = {"documents": list(TEXTS)}
        assert [hits(ask(url, ONE, **documents)) for _ in range(2)] == [0, 3]
        assert [hits(ask(url, TWO, **documents)) for _ in range(2)] == [0, 3]
        assert [hits(ask(url, ONE, cache_salt="s", **documents)) for _ in range(2)] == [0, 3]
        assert hits(ask(url, ONE, prompt_cache_key="k", **documents)) == 0
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in (
            ask(url, ONE, temperature=0, **documents), ask(url, TWO, temperature=0, **documents)
        )}) == 1  # fmt: skip
        known = {"texts": ["A text that only the first tenant knows, and that is long enough to be found again."]}
        httpx.post(f"{url}/v1/chunks", json=known, headers={"Authorization": f"Bearer {ONE}"})
        said = {"messages": [{"role": "user", "content": f"{known['texts'][0]}\n\nWhat is known?"}]}
        chunks = [
            ask(url, key, **said).json()["usage"]["prompt_tokens_details"]["chunkcache"][0]["chunks"]
            for key in (ONE, TWO)
        ]
        assert chunks == [1, 0]


def test_a_tenant_has_no_more_requests_under_way_than_it_may():
    tenants = Tenants({digest(ONE): Tenant("one", requests=1), digest(TWO): Tenant("two")})
    with served(tenants=tenants) as (url, _):
        with begun(url, ONE):
            refused = ask(url, ONE)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert ask(url, TWO).status_code == 200
        until(lambda: ask(url, ONE).status_code == 200)


def test_a_client_that_goes_away_ends_its_answer():
    with served() as (url, service):
        for stream in (True, False):
            client = httpx.Client(timeout=60)
            body = {**LONG, "stream": stream}
            if stream:
                with begun(url):
                    pass
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{url}/v1/chat/completions", json=body, timeout=0.1)
            client.close()
            until(lambda: service.scheduler.load == (0, 0))
        assert service.scheduler.steps < 2 * 300


def test_one_too_many_is_told_to_come_back():
    with served(limits=Limits(running=1, waiting=4)) as (url, service):
        with begun(url, n=1), begun(url, n=4):  # one answer runs, and four wait
            refused = ask(url)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "1"
        until(lambda: service.scheduler.load == (0, 0))
        assert ask(url).status_code == 200


def test_one_tenant_does_not_keep_another_out_and_is_refused_early(monkeypatch):
    tenants = Tenants({digest(ONE): Tenant("one"), digest(TWO): Tenant("two")})
    limits = Limits(running=1, waiting=4)
    with served(tenants=tenants, limits=limits) as (url, service), begun(url, ONE), begun(url, ONE, n=4):
        prepared, chat = [], service.chat
        monkeypatch.setattr(service, "chat", lambda *asked: prepared.append(asked[1].name) or chat(*asked))
        assert ask(url, ONE).status_code == 429
        assert prepared == []
        with begun(url, TWO, n=2):
            assert ask(url, TWO).status_code == 429
        assert prepared == ["two"]


def test_openais_client_tries_again_where_it_is_told_to():
    with served(limits=Limits(running=2, waiting=1)) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8) as client:
            answers = []
            threads = [
                threading.Thread(target=lambda: answers.append(client.chat.completions.create(**ASK)))
                for _ in range(6)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(answers) == 6


def test_too_large_a_request_is_refused():
    with served(body_bytes=2000) as (url, _):
        assert ask(url).status_code == 200
        big = {"messages": [{"role": "user", "content": "x" * 3000}]}
        assert ask(url, **big).status_code == 413

        def slowly():
            for _ in range(50):
                yield b" " * 100

        response = httpx.post(f"{url}/v1/chat/completions", content=slowly())
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_an_answer_ends_at_its_deadline():
    with served(timeout_s=0.0) as (url, _):
        body = ask(url).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 0


def test_what_fails_inside_is_told_without_its_text(monkeypatch, caplog):
    llm = wrapped()
    with served(llm) as (url, _):

        def broken(*args, **kwargs):
            raise RuntimeError("the text of a secret prompt")

        monkeypatch.setattr(llm.engine, "prefilled", broken)
        response = ask(url)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


def test_a_server_that_stops_lets_answers_end():
    with served(drain_s=30.0) as (url, service):
        done = []
        asking = threading.Thread(target=lambda: done.append(ask(url, max_tokens=50)))
        asking.start()
        until(lambda: service.scheduler.load != (0, 0) or done)
    asking.join()
    assert done[0].status_code == 200


def test_a_file_of_keys(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(f'[[key]]\nsha256 = "{digest(ONE)}"\ntenant = "one"\nrequests = 3\n')
    assert Tenants.read(path).find(f"Bearer {ONE}") == Tenant("one", 3)
    for wrong in (
        "",
        "key = 1",
        '[[key]]\nsha256 = "00"\ntenant = "one"',
        '[[key]]\nsha256 = 5\ntenant = "one"',
        f'[[key]]\nsha256 = "{"x" * 64}"\ntenant = "one"',
        f'[[key]]\nsha256 = "{"0" * 64}"\ntenant = ""',
    ):
        path.write_text(wrong)
        with pytest.raises(InputError, match="key"):
            Tenants.read(path)
    with pytest.raises(InputError, match="16 or more"):
        Tenants.of_key("short")
    assert Tenants.of_key(f"{ONE}\n").find(f"Bearer {ONE}") == Tenant()  # as files of secrets end
    assert not Tenants()
    assert Tenants().find(None) == Tenant()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
