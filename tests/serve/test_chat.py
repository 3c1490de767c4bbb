"""Real clients over real HTTP get the answers that the wrapper gives."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from support.llm import QUESTION, TEXTS
from support.server import MODEL

ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
DOCUMENTS = [{"title": "", "text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def llm(server):
    return server[1].llm


def test_an_answer_over_documents_is_that_of_generate(client, llm):
    wanted = llm.generate(QUESTION, TEXTS, max_new_tokens=8, do_sample=False)
    answer = client.chat.completions.create(**ASK, extra_body={"documents": DOCUMENTS})
    assert answer.choices[0].message.content.strip() == wanted.text
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens == wanted.stats.tokens
    assert usage.completion_tokens == len(wanted.token_ids)
    told = usage.prompt_tokens_details.model_extra["chunkcache"][0]
    assert told["hits"] == 3
    assert usage.prompt_tokens_details.cached_tokens <= told["reused_tokens"]
    assert usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("reuse", ["exact", "off", "fused"])
def test_a_request_says_which_kv_it_takes(client, llm, reuse):
    policy = {"exact": "exact", "off": "full", "fused": None}[reuse]
    wanted = llm.generate(QUESTION, TEXTS, max_new_tokens=8, do_sample=False, policy=policy)
    answer = client.chat.completions.create(**ASK, extra_body={"documents": list(TEXTS), "reuse": reuse})
    assert answer.choices[0].message.content.strip() == wanted.text
    assert (answer.usage.prompt_tokens_details.cached_tokens == 0) == (reuse == "off")


def test_parts_with_a_breakpoint_are_chunks(client, llm):
    parts = [{"type": "text", "text": text, "prompt_cache_breakpoint": {"mode": "explicit"}} for text in TEXTS]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]
    answer = client.chat.completions.create(**{**ASK, "messages": messages})
    told = answer.usage.prompt_tokens_details.model_extra["chunkcache"][0]
    assert told["chunks"] == 3
    wanted = llm.generate(QUESTION, TEXTS, max_new_tokens=8, do_sample=False)
    assert answer.choices[0].message.content.strip() == wanted.text


def test_known_chunks_are_found_in_what_is_said(client, server):
    text = "A passage that was computed ahead, about a mill by the lake that grinds in spring and autumn alone."
    response = httpx.post(f"{server[0]}/v1/chunks", json={"texts": [text]})
    assert response.json() == {"chunks": 1, "computed": 1}
    for path, asked in (
        ("chat/completions", {"messages": [{"role": "user", "content": f"Read this:\n\n{text}\n\nWhat grinds?"}]}),
        ("completions", {"prompt": f"Read this:\n\n{text}\n\nThe mill"}),
    ):
        body = httpx.post(f"{server[0]}/v1/{path}", json={"model": MODEL, "max_tokens": 2, **asked}).json()
        assert body["usage"]["prompt_tokens_details"]["chunkcache"][0]["chunks"] == 1


def test_a_stream_has_the_pieces_of_the_answer(client):
    whole = client.chat.completions.create(**ASK, extra_body={"documents": DOCUMENTS})
    parts = list(
        client.chat.completions.create(
            **ASK, stream=True, stream_options={"include_usage": True}, extra_body={"documents": DOCUMENTS}
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert parts[-1].choices == []
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(part.usage is None for part in parts[:-1])


def test_a_stream_ends_as_openai_ends_it(server):
    body = {**ASK, "stream": True}
    with httpx.stream("POST", f"{server[0]}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])


def test_completions_of_text_and_of_token_ids(client, llm):
    ids = [5, 6, 7, 8, 9]
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=4, temperature=0)
    assert by_ids.usage.prompt_tokens == 5
    several = client.completions.create(
        model=MODEL, prompt=["The bridge", "A ferry"], max_tokens=4, temperature=0, n=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text
    alone = client.completions.create(model=MODEL, prompt="A ferry", max_tokens=4, temperature=0)
    assert alone.choices[0].text == several.choices[2].text


def test_log_probabilities(client):
    chat = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3)
    told = chat.choices[0].logprobs.content
    assert len(told) == chat.usage.completion_tokens
    assert all(each.top_logprobs[0].logprob == pytest.approx(each.logprob) for each in told)  # greedy
    assert [len(each.top_logprobs) for each in told] == [3] * len(told)
    text = client.completions.create(model=MODEL, prompt="The bridge", max_tokens=4, temperature=0, logprobs=2)
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client):
    whole = client.chat.completions.create(**{**ASK, "max_tokens": 30}).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 30}, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_makes_answers_repeatable(client):
    options = {**ASK, "temperature": 1.9, "max_tokens": 20}
    first, again, other = (
        client.chat.completions.create(**options, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == again != other


def test_an_answer_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"year": {"type": "integer"}, "open": {"type": "boolean"}},
        "required": ["year", "open"],
        "additionalProperties": False,
    }
    how = {"type": "json_schema", "json_schema": {"name": "bridge", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            **{**ASK, "max_tokens": 60, "temperature": 1.0}, response_format=how, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content)
        assert found.keys() == {"year", "open"}
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(**ASK, response_format=bad)


@pytest.mark.parametrize(
    ("asked", "status", "code", "says"),
    [
        ({"model": "other"}, 404, "model_not_found", "'other'"),
        ({"messages": []}, 400, None, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None, "no text"),
        ({"temperature": 3}, 400, None, "temperature"),
        ({"nonsense": 1}, 400, None, "nonsense"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded", "do not fit"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_schema"}}, 400, None, "json_schema"),
        ({"presence_penalty": 1.0}, 400, "unsupported_parameter", "presence_penalty"),
        ({"logit_bias": {"x": 1}}, 400, None, "token ids"),
        ({"logit_bias": {"1" * 5000: 1}}, 400, None, "token ids"),
        ({"documents": [""]}, 400, None, "empty"),
    ],
)
def test_bad_requests_are_told_in_openais_shape(server, asked, status, code, says):
    response = httpx.post(f"{server[0]}/v1/chat/completions", json={**ASK, **asked})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert says in error["message"] or says == error["param"]


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "chunkcache"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok"}
    client.chat.completions.create(**ASK, extra_body={"documents": DOCUMENTS})
    text = httpx.get(f"{server[0]}/metrics").text
    assert "chunkcache_time_to_first_token_seconds_count" in text
    assert 'chunkcache_prompt_tokens_by_fidelity_total{fidelity="exact"}' in text
    assert "bridge" not in text


def test_a_path_that_there_is_not(server):
    response = httpx.get(f"{server[0]}/v1/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"
