"""A chat over documents in vLLM's server, with an app in vLLM's place that answers as `/v1/completions` does.

`tests/vllm/test_server.py` has the real server.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from helpers_tokenizer import tiny_tokenizer

from chunkcache.integrations.vllm.middleware import ChunkMiddleware
from chunkcache.integrations.vllm.spec import ChunkSpec
from chunkcache.prompt import PromptBuilder

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
DOCUMENTS = [{"title": "Bread", "text": "Bread is made with flour."}, "The ferry sails twice a day."]
PASSAGES = ["Bread\nBread is made with flour.", "The ferry sails twice a day."]
QUESTION = "How often does it sail?"
ASKED = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], "documents": DOCUMENTS}
CONTEXT = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None  # it is shared with other tests
    return folder


@pytest.fixture
def server(tokenizer):
    """An app that keeps what it was asked for as `app.seen`, behind a key as vLLM's."""
    app = FastAPI()
    app.seen = []
    model = SimpleNamespace(
        tokenizer=str(tokenizer), tokenizer_revision=None, trust_remote_code=False, max_model_len=CONTEXT,
        get_diff_sampling_param=dict,
    )  # fmt: skip
    app.state.vllm_config = SimpleNamespace(model_config=model)
    app.state.online_renderer = SimpleNamespace(chat_template=None)
    app.state.args = SimpleNamespace(default_chat_template_kwargs=None)

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        app.seen.append(("chat", await request.body()))
        return {"object": "chat.completion"}

    @app.post("/v1/completions")
    async def complete(asked: dict):
        app.seen.append(("completion", asked))
        if asked["model"] != "m":
            return JSONResponse({"error": {"message": "no such model", "code": 404}}, 404)
        answer = {"id": "cmpl-1", "object": "text_completion", "model": "m"}
        likely = {"tokens": ["é"], "token_logprobs": [-1.0], "top_logprobs": [{"é": -1.0, "b": -2.0}]}
        if not asked.get("stream"):
            choice = {"index": 0, "text": "é", "finish_reason": "stop"}
            choice["logprobs"] = likely if "logprobs" in asked else None
            return {**answer, "choices": [choice], "usage": {"prompt_tokens": len(asked["prompt"])}}

        async def pieces():
            for text, end in (("é", None), ("b", "stop")):
                piece = {**answer, "choices": [{"index": 0, "text": text, "finish_reason": end}]}
                data = f"data: {json.dumps(piece, ensure_ascii=False)}\n\n".encode()
                yield data[:70]  # a network may cut an event anywhere
                yield data[70:]
            yield b": still here\n\n"
            yield f"data: {json.dumps({**answer, 'choices': [], 'usage': {'prompt_tokens': 1}})}\n\n".encode()
            yield b'data: {"error": {"message": "broken"}}\n\n'
            yield b"data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")

    app.add_middleware(_Keyed)
    app.add_middleware(ChunkMiddleware)
    return app


class _Keyed:
    """Checks the key before anything reads the request, as vLLM's does."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        known = (b"authorization", b"Bearer key") in scope["headers"]
        answer = self.app if known else JSONResponse({"error": "Unauthorized"}, 401)
        await answer(scope, receive, send)


async def post(server, body, path="/v1/chat/completions", key="key"):
    transport = httpx.ASGITransport(server)
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return await client.post(path, content=content, headers=headers)


def expected(tokenizer, question=QUESTION, system=None):
    from transformers import AutoTokenizer

    return PromptBuilder(AutoTokenizer.from_pretrained(tokenizer)).build(question, PASSAGES, system)


async def test_documents_become_chunks_of_a_prompt_in_token_ids(server, tokenizer):
    answer = await post(server, {**ASKED, "temperature": 0, "user": "u"})
    [(kind, asked)] = server.seen
    prompt = expected(tokenizer)
    assert kind == "completion"
    assert asked["prompt"] == list(prompt.token_ids)
    spec = ChunkSpec.parse(asked["kv_transfer_params"]["chunkcache"], len(prompt.token_ids))
    assert spec.prompt(asked["prompt"]) == prompt
    assert asked["max_tokens"] == CONTEXT - len(prompt.token_ids)  # a completion would stop after 16
    assert asked["temperature"] == 0
    assert not {"messages", "documents"} & asked.keys()
    told = answer.json()
    assert told["object"] == "chat.completion"
    assert told["id"] == "chatcmpl-1"
    assert told["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "é"},
        }
    ]
    assert told["usage"] == {"prompt_tokens": len(prompt.token_ids)}


async def test_a_later_turn_has_its_chunks_behind_the_earlier_ones(server, tokenizer):
    system = {"role": "developer", "content": "Be brief."}
    said = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]},
    ]
    await post(server, {**ASKED, "messages": [system, *said, *ASKED["messages"]]})
    asked = server.seen[0][1]
    spec = ChunkSpec.parse(asked["kv_transfer_params"]["chunkcache"], len(asked["prompt"]))
    prompt, alone = spec.prompt(asked["prompt"]), expected(tokenizer, system="Be brief.")
    assert prompt.chunks == alone.chunks
    assert 0 < len(prompt.context_ids) < prompt.spans[0].start
    assert prompt.context_ids == alone.context_ids[: len(prompt.context_ids)]  # as in any conversation with it


async def test_a_client_may_choose_the_policy_and_tell_other_connectors_something(server):
    given = {"other": {"a": 1}, "chunkcache": {"policy": "link"}}
    await post(server, {**ASKED, "kv_transfer_params": given, "max_completion_tokens": 7, "max_tokens": 9})
    asked = server.seen[0][1]
    assert asked["max_tokens"] == 7
    assert asked["kv_transfer_params"]["other"] == {"a": 1}
    assert asked["kv_transfer_params"]["lmcache.skip_save"] is True  # fused KV are not exact
    assert asked["kv_transfer_params"]["chunkcache"]["policy"].startswith("link")


async def test_log_probabilities_come_in_the_shape_of_a_chat(server):
    answer = await post(server, {**ASKED, "logprobs": True, "top_logprobs": 1})
    assert server.seen[0][1]["logprobs"] == 1
    [told] = answer.json()["choices"][0]["logprobs"]["content"]
    assert (told["token"], told["logprob"], told["bytes"]) == ("é", -1.0, [0xC3, 0xA9])
    assert [each["token"] for each in told["top_logprobs"]] == ["é"]


async def test_a_stream_comes_in_the_shape_of_a_chat(server):
    answer = await post(server, {**ASKED, "stream": True})
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert ": still here" in events
    pieces = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: ")]
    assert pieces.pop() == {"error": {"message": "broken"}}
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    deltas = [piece["choices"][0]["delta"] for piece in pieces if piece["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "é"}, {"content": "b"}]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces if piece["choices"]] == [None, None, "stop"]
    assert pieces[-1]["usage"] == {"prompt_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**ASKED, "documents": []}),
        ("/v1/chat/completions", {**ASKED, "documents": None}),
        ("/v1/chat/completions", b'{"documents": [broken'),
        ("/v1/chat/completions", b'["documents"]'),
        ("/v1/completions", {"model": "m", "prompt": [1, 2], "documents": ["a"]}),
    ],
)
async def test_everything_else_passes_untouched(server, path, body):
    await post(server, body, path)
    [(kind, seen)] = server.seen
    sent = body if isinstance(body, bytes) or kind == "completion" else json.dumps(body).encode()
    assert seen == sent
    assert path.endswith("chat/completions") == (kind == "chat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": "text"}, "documents is no list"),
        ({"documents": [{"title": "only"}]}, "document 0 has no text"),
        ({"documents": ["a", 7]}, "document 1 has no text"),
        ({"messages": [{"role": "system", "content": "x"}]}, "pass a message of the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is served"),
        ({"messages": "hello"}, "messages is no list"),
        ({"tools": [{"type": "function"}]}, "tools is not served with documents"),
        ({"add_generation_prompt": False}, "add_generation_prompt=false"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unknown": 1}}, "does not read 'unknown'"),
        ({"kv_transfer_params": {"chunkcache": {"policy": "nonsense"}}}, "nonsense"),
    ],
)
async def test_what_cannot_be_served_is_told_in_openais_shape(server, change, message):
    answer = await post(server, {**ASKED, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, None)
    assert server.seen == []


async def test_an_error_of_the_server_is_told_as_it_is(server):
    answer = await post(server, {**ASKED, "model": "other"})
    assert (answer.status_code, answer.json()) == (404, {"error": {"message": "no such model", "code": 404}})


async def test_who_has_no_key_has_no_prompt_built(server, monkeypatch):
    monkeypatch.setattr(ChunkMiddleware, "_of_server", lambda *_: pytest.fail("it was built"))
    answer = await post(server, ASKED, key="wrong")
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})


async def test_a_chat_that_is_too_large_is_refused(server, monkeypatch):
    monkeypatch.setattr(ChunkMiddleware, "max_body", 100)
    answer = await post(server, ASKED)
    assert answer.status_code == 413
    assert "larger than 100 bytes" in answer.json()["error"]["message"]
