"""The indexes that a server begins with."""

from __future__ import annotations

import time

import pytest
from support.llm import QUESTION, TEXTS, wrapped
from support.server import MODEL

from chunkcache.cli.indexes import fill_indexes, read_indexes
from chunkcache.engine.scheduler import Limits
from chunkcache.errors import DocumentError, InputError
from chunkcache.llm import CachedLLM
from chunkcache.serve.protocol import ChatRequest
from chunkcache.serve.service import Service
from chunkcache.serve.tenants import Tenant, Tenants

KEYED = Tenants({"0" * 64: Tenant("one"), "1" * 64: Tenant("two")})


@pytest.fixture
def folder(tmp_path):
    for name, text in zip(("bridge", "ferry", "keeper"), TEXTS, strict=True):
        (tmp_path / f"{name}.md").write_text(text)
    return tmp_path


def test_an_index_is_there_before_the_first_request_and_its_kv_soon_after(folder):
    service = Service(wrapped(), MODEL)
    fill_indexes(service, read_indexes([f"one/harbour={folder}", f"two/a.b={folder / 'ferry.md'}"], KEYED))
    asked = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "rag": {"index": "harbour"}}
    [choice] = service.chat(ChatRequest.model_validate(asked), Tenant("one"))
    assert choice.found.told[0]["id"] == "bridge.md"
    assert [each["documents"] for each in service.indexes.names(Tenant("two"), ())] == [1]
    service.background.submit("last", iter_once()).result(60)
    while service.background.under_way:
        service.background.submit("last", iter_once()).result(60)
    keys = service.view(Tenant("one")).keys(TEXTS)
    assert all(key in service.llm.store for key in keys)
    service.background.close()
    service.scheduler.close()


def test_there_may_be_more_indexes_than_requests_may_wait(folder, monkeypatch, caplog):
    service = Service(wrapped(), MODEL, Limits(waiting=1))
    names = ("first", "second", "third")
    precompute, calls = CachedLLM.precompute, []

    def failing(*args, **options):
        calls.append(options)
        if len(calls) == 1:
            raise OSError("no room")
        return precompute(*args, **options)

    monkeypatch.setattr(CachedLLM, "precompute", failing)
    fill_indexes(service, read_indexes([f"{name}={folder / 'ferry.md'}" for name in names], Tenants()))
    assert [each["id"] for each in service.indexes.names(Tenant(), ())] == list(names)
    while service.background.under_way:
        time.sleep(0.01)
    assert len(calls) == 3  # the one that failed ended no other
    [said] = caplog.messages
    assert "could not be computed ahead" in said
    service.background.close()
    service.scheduler.close()


def iter_once():
    yield


@pytest.mark.parametrize(
    ("spec", "tenants", "says"),
    [
        ("harbour", Tenants(), "NAME=PATH"),
        ("harbour=", Tenants(), "NAME=PATH"),
        ("a name=x", Tenants(), "NAME=PATH"),
        ("one/harbour=x", Tenants(), "'one'"),
        ("harbour=x", KEYED, "TENANT/NAME=PATH"),
    ],
)
def test_what_is_no_index_is_refused(spec, tenants, says):
    with pytest.raises(InputError, match=says):
        read_indexes([spec], tenants)


def test_a_folder_that_there_is_not(tmp_path):
    with pytest.raises(DocumentError):
        read_indexes([f"harbour={tmp_path / 'none'}"], Tenants())
