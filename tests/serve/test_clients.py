"""Clients that people use, over real HTTP: OpenAI's Responses API, LangChain, LlamaIndex."""

from __future__ import annotations

import json

import pytest
from langchain_openai import ChatOpenAI
from llama_index.llms.openai_like import OpenAILike
from support.llm import QUESTION, TEXTS
from support.server import MODEL


@pytest.fixture(scope="module")
def wanted(server):
    return server[1].llm.generate(QUESTION, TEXTS, max_new_tokens=8, do_sample=False)


def test_responses(client, wanted):
    response = client.responses.create(
        model=MODEL, input=QUESTION, max_output_tokens=8, temperature=0, extra_body={"documents": list(TEXTS)}
    )
    assert response.output_text.strip() == wanted.text
    assert response.usage.input_tokens == wanted.stats.tokens
    assert response.usage.input_tokens_details.cached_tokens > 0
    assert (response.status == "completed") == (len(wanted.token_ids) < 8)


def test_responses_by_events(client, wanted):
    events = list(
        client.responses.create(
            model=MODEL, max_output_tokens=8, temperature=0, stream=True, extra_body={"documents": list(TEXTS)},
            input=[{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
        )
    )  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert text == last.output_text
    assert text.strip() == wanted.text
    assert last.usage.total_tokens == wanted.stats.tokens + len(wanted.token_ids)


def test_responses_by_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    how = {"format": {"type": "json_schema", "name": "one", "schema": schema}}
    response = client.responses.create(model=MODEL, input="a?", instructions="Be brief.", text=how, temperature=0)
    assert json.loads(response.output_text)["a"] in (1, 2)


def test_langchain(server, wanted):
    chat = ChatOpenAI(
        base_url=f"{server[0]}/v1", api_key="none", model=MODEL, temperature=0, max_completion_tokens=8,
        extra_body={"documents": list(TEXTS)},
    )  # fmt: skip
    message = chat.invoke(QUESTION)
    assert message.content.strip() == wanted.text
    assert message.usage_metadata["input_tokens"] == wanted.stats.tokens
    assert message.usage_metadata["input_token_details"]["cache_read"] > 0
    assert "".join(str(piece.content) for piece in chat.stream(QUESTION)).strip() == wanted.text


def test_llama_index(server, wanted):
    llm = OpenAILike(
        model=MODEL, api_base=f"{server[0]}/v1", api_key="none", is_chat_model=True, temperature=0, max_tokens=8,
        additional_kwargs={"extra_body": {"documents": list(TEXTS)}},
    )  # fmt: skip
    assert llm.complete(QUESTION).text.strip() == wanted.text
    assert "".join(piece.delta for piece in llm.stream_complete(QUESTION)).strip() == wanted.text
