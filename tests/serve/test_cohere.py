"""Cohere's own client at `/v2/chat`."""

from __future__ import annotations

import json

import cohere
import httpx
import pytest
from cohere.core.api_error import ApiError
from support.llm import QUESTION, TEXTS, tiny_model, wrapped
from support.server import MODEL, served

from chunkcache.serve.cohere import CohereChat
from chunkcache.serve.cohere_protocol import CohereRequest, passage
from chunkcache.serve.tenants import Tenant, Tenants, digest

KEY = "key-of-the-first-tenant"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
DOCUMENTS = [TEXTS[0], {"id": "ferry", "data": {"title": "Ferry", "text": TEXTS[1]}}, {"data": {"snippet": TEXTS[2]}}]


@pytest.fixture(scope="module")
def server():
    with served(wrapped(tiny_model()), tenants=Tenants({digest(KEY): Tenant("one")})) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(timeout=60) as http:
        yield cohere.ClientV2(api_key=KEY, base_url=server[0], max_retries=0, httpx_client=http)


@pytest.fixture
def parrot(server, monkeypatch):
    """Let every answer say what a document says: a tiny model of random weights says nothing of the kind."""
    said = f"Well: {TEXTS[0][:43]}; and {TEXTS[1][:40]}"
    monkeypatch.setattr(CohereChat, "_citations", _citing(CohereChat._citations, said))
    return said


def _citing(cite, said):
    return lambda self, text: cite(self, said)


def test_an_answer_over_documents_is_that_of_generate(client, server):
    llm = server[1].view(Tenant("one"))
    wanted = llm.generate(QUESTION, [TEXTS[0], f"Ferry\n{TEXTS[1]}", TEXTS[2]], max_new_tokens=8, do_sample=False)
    answer = client.chat(**ASK, documents=DOCUMENTS)
    assert answer.message.role == "assistant"
    assert answer.message.content[0].text.strip() == wanted.text
    assert answer.finish_reason in ("COMPLETE", "MAX_TOKENS")
    assert answer.usage.tokens.input_tokens == wanted.stats.tokens
    assert answer.usage.tokens.output_tokens == len(wanted.token_ids)
    assert answer.usage.cached_tokens > 0
    assert answer.usage.chunkcache[0]["hits"] == 3


def test_a_stream_has_coheres_events(client):
    whole = client.chat(**ASK, documents=DOCUMENTS)
    events = list(client.chat_stream(**ASK, documents=DOCUMENTS))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message-start", "content-start"]
    assert kinds[-2:] == ["content-end", "message-end"]
    assert set(kinds[2:-2]) == {"content-delta"}
    text = "".join(event.delta.message.content.text for event in events[2:-2])
    assert text == whole.message.content[0].text
    assert events[-1].delta.finish_reason == whole.finish_reason
    assert events[-1].delta.usage.tokens.output_tokens == whole.usage.tokens.output_tokens
    assert events[0].delta.message.role == "assistant"


def test_citations_name_the_document_of_each_span(client, parrot):
    answer = client.chat(**ASK, documents=DOCUMENTS)
    first, second = answer.message.citations
    assert (first.text, first.start, first.end) == (parrot[6:49], 6, 49)
    assert [source.id for source in first.sources] == ["doc:0"]
    assert first.sources[0].document == {"id": "doc:0", "text": TEXTS[0]}
    assert [source.id for source in second.sources] == ["ferry"]
    assert second.sources[0].document == {"id": "ferry", "title": "Ferry", "text": TEXTS[1]}
    events = list(client.chat_stream(**ASK, documents=DOCUMENTS))
    starts = [event for event in events if event.type == "citation-start"]
    assert [event.delta.message.citations for event in starts] == [first, second]
    assert [event.index for event in events if event.type == "citation-end"] == [0, 1]
    off = client.chat(**ASK, documents=DOCUMENTS, citation_options={"mode": "off"})
    assert off.message.citations is None


def test_what_is_found_in_an_index_is_cited(client, server, parrot):
    documents = [{"id": "bridge.md", "title": "Bridge", "text": TEXTS[0]}]
    headers = {"Authorization": f"Bearer {KEY}"}
    put = {"index": "harbour", "documents": documents}
    httpx.post(f"{server[0]}/v1/documents", json=put, headers=headers, timeout=60).raise_for_status()
    more = {"additional_body_parameters": {"rag": {"index": "harbour"}}}
    [citation] = client.chat(**ASK, request_options=more).message.citations
    assert [source.id for source in citation.sources] == ["bridge.md"]
    assert citation.sources[0].document["text"] == TEXTS[0]
    last = list(client.chat_stream(**ASK, request_options=more))[-1]
    assert last.chunkcache["documents"][0]["id"] == "bridge.md"


def test_a_number_that_tells_of_a_find_is_not_cited_from_it(client, server, monkeypatch):
    headers = {"Authorization": f"Bearer {KEY}"}
    put = {"index": "numbers", "documents": [{"id": "keeper.md", "title": "Keeper", "text": TEXTS[2]}]}
    httpx.post(f"{server[0]}/v1/documents", json=put, headers=headers, timeout=60).raise_for_status()
    more = {"additional_body_parameters": {"rag": {"index": "numbers"}}}
    [found] = client.chat(**ASK, request_options=more).chunkcache["documents"]
    said = f"It is {found['chunk']} or {found['score']}, and {TEXTS[2][:43]}"
    monkeypatch.setattr(CohereChat, "_citations", _citing(CohereChat._citations, said))
    [citation] = client.chat(**ASK, request_options=more).message.citations
    assert citation.start == said.index(TEXTS[2][:43])


def test_a_conversation_goes_on_with_what_the_client_got(client):
    first = client.chat(**ASK, documents=DOCUMENTS)
    messages = [
        {"role": "system", "content": "Be brief."},
        *ASK["messages"],
        first.message,
        {"role": "user", "content": [{"type": "text", "text": "And why?"}]},
    ]
    assert client.chat(**{**ASK, "messages": messages}).message.content


def test_sampling_is_as_cohere_names_it(client):
    how = {**ASK, "temperature": 1.9, "max_tokens": 20}
    first, again, other = (client.chat(**how, k=0, p=0.99, seed=seed).message.content[0].text for seed in (1, 1, 2))
    assert first == again != other
    whole = client.chat(**{**ASK, "max_tokens": 30}).message.content[0].text
    stop = whole[len(whole) // 2 :][:3]
    cut = client.chat(**{**ASK, "max_tokens": 30}, stop_sequences=[stop])
    assert cut.message.content[0].text == whole[: whole.index(stop)]
    assert cut.finish_reason == "STOP_SEQUENCE"
    greedy = client.chat(**{**how, "k": 1}).message.content[0].text
    assert greedy == client.chat(**{**how, "temperature": 0}).message.content[0].text
    schema = {"type": "object", "properties": {"open": {"type": "boolean"}}, "required": ["open"],
              "additionalProperties": False}  # fmt: skip
    formed = client.chat(**{**ASK, "max_tokens": 40}, response_format={"type": "json_object", "json_schema": schema})
    assert json.loads(formed.message.content[0].text).keys() == {"open"}


def test_log_probabilities(client):
    answer = client.chat(**ASK, logprobs=True)
    assert sum(len(each.token_ids) for each in answer.logprobs) == answer.usage.tokens.output_tokens
    events = list(client.chat_stream(**ASK, logprobs=True))
    ids = [i for event in events if event.type == "content-delta" for i in event.logprobs.token_ids]
    assert ids == [i for each in answer.logprobs for i in each.token_ids]


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"model": "other"}, cohere.NotFoundError, "no model 'other'"),
        ({"messages": []}, cohere.BadRequestError, "messages"),
        ({"temperature": 5}, cohere.BadRequestError, "temperature"),
        ({"k": 501}, cohere.BadRequestError, "k: "),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, cohere.BadRequestError, "tools"),
        ({"thinking": {"type": "enabled"}}, cohere.BadRequestError, "thinking"),
        ({"frequency_penalty": 0.5}, cohere.BadRequestError, "frequency_penalty"),
        ({"documents": [""]}, cohere.BadRequestError, "empty"),
        ({"max_tokens": 100_000}, cohere.BadRequestError, "do not fit"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "x"}]}, cohere.BadRequestError, "role"),
    ],
)
def test_errors_have_coheres_shape(client, asked, error, says):
    for call in (client.chat, lambda **how: list(client.chat_stream(**how))):
        with pytest.raises(error) as raised:
            call(**{**ASK, **asked})
        assert list(raised.value.body) == ["message"]
        assert says in raised.value.body["message"]


def test_a_key_and_a_body_are_refused_in_coheres_shape(server):
    url = server[0]
    with httpx.Client() as http:
        stranger = cohere.ClientV2(api_key="another-key", base_url=url, max_retries=0, httpx_client=http)
        with pytest.raises(cohere.UnauthorizedError) as raised:
            stranger.chat(**ASK)
    assert list(raised.value.body) == ["message"]
    headers = {"Authorization": f"Bearer {KEY}"}
    for response in (
        httpx.post(f"{url}/v2/chat", content=b"{", headers=headers),
        httpx.post(f"{url}/v2/chat", content=b" " * (9 * 2**20), headers=headers),
        httpx.get(f"{url}/v2/chat", headers=headers),
        httpx.post(f"{url}/v2/embed", headers=headers),
    ):
        assert list(response.json()) == ["message"]


def test_what_fails_inside_is_told_in_a_streams_last_event(client, server, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the text of a secret prompt")

    monkeypatch.setattr(server[1].view(Tenant("one")).engine, "prefilled", broken)
    last = list(client.chat_stream(**ASK))[-1]
    assert (last.type, last.delta.finish_reason) == ("message-end", "ERROR")
    assert "secret" not in last.delta.error
    with pytest.raises(ApiError) as raised:
        client.chat(**ASK)
    assert (raised.value.status_code, list(raised.value.body)) == (500, ["message"])


def test_a_document_stands_in_the_prompt_with_all_its_fields():
    asked = CohereRequest.model_validate({
        **ASK,
        "documents": ["plain", {"id": "a", "data": "text"}, {"data": {"title": "T", "text": "x", "year": 1931}}],
    })  # fmt: skip
    assert [passage(source) for source in asked.sources()] == ["plain", "text", "T\nx\nyear: 1931"]
    assert [source["id"] for source in asked.sources()] == ["doc:0", "a", "doc:2"]
