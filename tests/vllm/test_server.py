"""vLLM's own server with the connector and the middleware: a chat over documents, against chunkcache's own answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from helpers_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import chunkcache
from chunkcache.integrations.vllm import transfer_config

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PASSAGES = [
    "In spring the ferry sails twice a day, in summer four times. " * 4,
    "Bread is made with flour, water, salt and yeast. " * 5,
    "The bridge over the river was opened in 1931. " * 5,
]
QUESTION = "In which year was the bridge opened to the public?"
POLICIES = ("query:ratio=0.1", "reuse")  # a ratio of its own choosing depends on how fast the machine is
TOKENS = 16
START_S = 480  # of a busy machine; half a minute otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model, whose heads are of a size that vLLM's CPU attention has."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None  # answers have all the tokens that they may have
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None  # it is shared with other tests
    return folder


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """A client of the server, which is started once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = transfer_config(store="memory://?max_bytes=64MiB", policy="query")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "m",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--host", "127.0.0.1",
        "--port", str(port), "--api-key", "key", "--enable-prompt-tokens-details",
        "--kv-transfer-config", json.dumps(transfer),
        "--middleware", "chunkcache.integrations.vllm.middleware.ChunkMiddleware",
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT)
    headers = {"Authorization": "Bearer key"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=START_S) as client:
        try:
            _wait(client, server, log)
            yield client
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:  # it takes no signal while it starts
                server.kill()
                server.wait()


def _wait(client, server, log):
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")


def ask(client, **fields):
    asked = {
        "model": "m", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS,
        "documents": [{"text": text} for text in PASSAGES], "ignore_eos": True, "return_token_ids": True, **fields,
    }  # fmt: skip
    return client.post("/v1/chat/completions", json={k: v for k, v in asked.items() if v is not None})


@pytest.fixture(scope="module")
def own(folder):
    """What chunkcache answers, by policy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    llm = chunkcache.wrap(model, AutoTokenizer.from_pretrained(folder))
    llm.precompute(PASSAGES)

    def answer(policy):
        return list(llm.generate(QUESTION, PASSAGES, policy=policy, max_new_tokens=TOKENS, do_sample=False).token_ids)

    return answer


def told(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def ids(answer):
    """Return the token ids of an answer; the texts of a random model may end in half a character."""
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def test_a_chat_over_documents_is_answered_as_chunkcache_does(client, own):
    first, again = (
        ask(client, kv_transfer_params={"chunkcache": {"policy": policy, "warm": True}}) for policy in POLICIES
    )
    assert first.json()["object"] == "chat.completion"
    assert ids(first) == own(POLICIES[0]) != ids(again)
    assert ids(again) == own(POLICIES[1])
    usage = again.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_stream_has_the_same_text(client):
    whole = told(ask(client))
    lines = ask(client, stream=True, stream_options={"include_usage": True}).text.splitlines()
    assert lines[-2] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    texts = [choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"]]
    assert "".join(texts) == whole
    assert pieces[-1]["usage"]["completion_tokens"] == TOKENS


def test_a_chat_without_documents_is_vllms_own(client, own):
    answer = ask(client, documents=None, max_tokens=4)
    assert len(ids(answer)) == 4
    assert answer.json()["usage"]["prompt_tokens"] < 100


def test_what_is_wrong_is_told(client):
    wrong = ask(client, documents=[{"title": "no text"}])
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, 400)
    unknown = ask(client, model="other")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
    assert ask(client, max_tokens=5000).status_code == 400
    assert (
        client.post("/v1/chat/completions", json={"documents": ["a"]}, headers={"Authorization": "x"}).status_code
        == 401
    )


def test_what_was_reused_is_among_the_servers_metrics(client):
    fields = {"kv_transfer_params": {"chunkcache": {"policy": "reuse", "warm": True}}}
    ask(client, **fields)
    placed = ask(client, **fields).json()["kv_transfer_params"]["chunkcache"]["placed"]
    lines = client.get("/metrics").text.splitlines()
    told = {line.split("{")[0]: line for line in lines if line.startswith("vllm:chunkcache_")}
    assert float(told["vllm:chunkcache_fused_total"].split()[-1]) > 0
    assert 'tier="memory"' in told["vllm:chunkcache_tier_tokens_total"]
    assert float(told["vllm:chunkcache_tier_tokens_total"].split()[-1]) >= placed > 0
