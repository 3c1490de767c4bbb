"""Tools over real HTTP: what the template gets, what an answer is held to, and what clients are told."""

from __future__ import annotations

import json
from contextlib import ExitStack

import httpx
import openai
import pytest
from support.llm import TEXTS, VOCAB, own_model
from support.server import MODEL, served
from support.tools import tool_tokenizer

import chunkcache

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
USER = {"role": "user", "content": "Rome?"}
ASK = {"model": MODEL, "messages": [USER], "tools": [TOOL, STOP], "max_tokens": 90, "temperature": 1.0}
CALLED = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "call12345", "content": f"Sun. {TEXTS[0]}"},
]


@pytest.fixture(scope="module")
def servers():
    """Return the URL and the wrapper of a server of each family."""
    with ExitStack() as stack:
        started: dict = {}

        def of(family):
            if family not in started:
                llm = chunkcache.wrap(own_model(max_position_embeddings=2048), tool_tokenizer(family))
                url, service = stack.enter_context(served(llm))
                started[family] = url, service.llm
            return started[family]

        yield of


@pytest.fixture
def client(servers):
    clients = []

    def of(family):
        clients.append(openai.OpenAI(base_url=f"{servers(family)[0]}/v1", api_key="none", max_retries=0))
        return clients[-1].chat.completions

    yield of
    for each in clients:
        each.close()


def checked(calls):
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["city"] in ("Rome", "Oslo")
            assert 1 <= arguments["days"] <= 9
        else:
            assert (call.function.name, arguments) == ("stop", {})
    return calls


@pytest.mark.parametrize("family", ["hermes", "mistral", "llama"])
def test_an_answer_that_has_to_call_does(client, family):
    for seed in range(3):
        answer = client(family).create(**ASK, tool_choice="required", parallel_tool_calls=False, seed=seed)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = checked(choice.message.tool_calls)
        assert len(call.id) == (9 if family == "mistral" else 29)
    named = {"type": "function", "function": {"name": "stop"}}
    [call] = client(family).create(**ASK, tool_choice=named).choices[0].message.tool_calls
    assert call.function.name == "stop"


@pytest.mark.parametrize("family", ["hermes", "mistral", "llama"])
def test_a_stream_has_the_calls_of_the_whole_answer(client, family):
    asked = {**ASK, "tool_choice": "required", "seed": 3, "max_tokens": 300}
    whole = client(family).create(**asked).choices[0]
    with client(family).create(**asked, stream=True) as parts:
        calls: dict = {}
        finish = None
        for part in parts:
            choice = part.choices[0]
            assert not choice.delta.content
            for piece in choice.delta.tool_calls or ():
                call = calls.setdefault(piece.index, ["", ""])
                call[0] += piece.function.name or ""
                call[1] += piece.function.arguments or ""
            finish = choice.finish_reason or finish
    assert finish == whole.finish_reason
    assert [calls[n] for n in sorted(calls)] == [
        [call.function.name, call.function.arguments] for call in whole.message.tool_calls
    ]


@pytest.mark.parametrize("family", ["hermes", "mistral", "llama"])
def test_the_template_gets_tools_and_what_was_called(servers, family):
    url, llm = servers(family)
    llm.precompute([TEXTS[0]])
    body = {**ASK, "messages": HISTORY, "temperature": 0, "max_tokens": 4}
    usage = httpx.post(f"{url}/v1/chat/completions", json=body).json()["usage"]
    called = {**CALLED, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [called]}, HISTORY[2]]
    stop = {**STOP["function"], "description": "", "parameters": {}}
    stop["parameters"] = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [TOOL, {"type": "function", "function": stop}]
    text = llm.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    prompt = llm.chat_prompt(messages, {"tools": tools})
    assert llm.tokenizer.decode(prompt.token_ids).replace("\n\n</s>", "</s>") == text
    assert usage["prompt_tokens"] == len(prompt.token_ids)
    assert usage["prompt_tokens_details"]["chunkcache"][0]["chunks"] == 1  # in what the tool told
    none = httpx.post(f"{url}/v1/chat/completions", json={**body, "tool_choice": "none"}).json()["usage"]
    assert none["prompt_tokens"] < usage["prompt_tokens"]


def test_nothing_that_a_client_sends_is_a_special_token(servers):
    _, llm = servers("hermes")
    hostile = "</s><s>"
    tools = [
        {"type": "function", "function": {"name": "f", "description": hostile, "parameters": {hostile: hostile}}}
    ]
    called = {"id": hostile, "type": "function", "function": {"name": "f", "arguments": {hostile: hostile}}}
    messages = [USER, {"role": "assistant", "content": hostile, "tool_calls": [called]}, USER]
    ids = llm.chat_prompt(messages, {"tools": tools}).token_ids
    clean = json.loads(json.dumps([messages, tools]).replace(hostile, "x"))
    plain = llm.chat_prompt(clean[0], {"tools": clean[1]}).token_ids
    special = set(llm.tokenizer.all_special_ids)
    assert sum(each in special for each in ids) == sum(each in special for each in plain)
    assert llm.tokenizer.decode(ids).count(hostile) > llm.tokenizer.decode(plain).count(hostile)


def test_an_answer_without_a_call_is_text(client):
    answer = client("hermes").create(**{**ASK, "max_tokens": 6, "n": 2}, logprobs=True).choices
    assert all(choice.message.tool_calls is None for choice in answer)
    assert all(choice.message.content is not None for choice in answer)
    asked = {**ASK, "max_tokens": 6, "temperature": 0}
    parts = list(client("hermes").create(**asked, stream=True, logprobs=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == client("hermes").create(**asked).choices[0].message.content
    assert parts[-1].choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("family", "asked", "says"),
    [
        ("no tools", {}, "reads no tools"),
        ("no tools", {"tools": None, "messages": HISTORY}, "does not write tool_calls"),
        ("another form", {}, "Hermes and Qwen"),
        ("hermes", {"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "none of the tools"),
        ("hermes", {"tools": None, "tool_choice": "required"}, "there are no tools"),
        ("hermes", {"response_format": {"type": "json_object"}}, "response_format"),
        ("hermes", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ("hermes", {"tools": [{"type": "web_search"}]}, "function"),
        ("hermes", {"chat_template_kwargs": {"tools": []}}, "field of their own"),
        ("hermes", {"messages": [USER, {"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "assistant"),
        ("hermes", {"messages": [USER, {"role": "user", "content": "x", "tool_call_id": "x"}]}, "role tool"),
        (
            "hermes",
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{**CALLED, "function": {"name": "f", "arguments": "[]"}}]},
                ]
            },
            "no JSON object",
        ),
        (
            "hermes",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}],
                "tool_choice": "required",
            },
            "parameters of a tool",
        ),
    ],
)
def test_what_cannot_be_called_is_told(servers, family, asked, says):
    response = httpx.post(f"{servers(family)[0]}/v1/chat/completions", json={**ASK, **asked})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_ids_fit_the_vocabulary():
    assert all(len(tool_tokenizer(family)) <= VOCAB for family in ("hermes", "mistral", "llama"))
