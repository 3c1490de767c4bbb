"""Adapters of peft as models of their own, over real HTTP; runs where the package is: `make test-adapters`."""

from __future__ import annotations

import threading

import httpx
import pytest
import zoo
from support.changing import fill_lora
from support.llm import QUESTION, TEXTS, VOCAB, chat_tokenizer
from support.server import MODEL, served

import chunkcache
from chunkcache.errors import InputError
from chunkcache.serve.service import Service
from chunkcache.serve.tenants import Tenant, Tenants, digest

peft = pytest.importorskip("peft", reason="needs peft: run make test-adapters")

pytestmark = pytest.mark.filterwarnings("ignore")  # what this package warns of is its own

ADMIN, OTHER = "key-of-the-administrator", "key-of-somebody-else"
KEYS = {digest(ADMIN): Tenant("admin", admin=True), digest(OTHER): Tenant("other")}
ASK = {
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 8,
    "temperature": 0,
    "documents": list(TEXTS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("legal", "medical"), start=1):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=32 * number, target_modules=["q_proj", "v_proj"]
        )
        fill_lora(peft.get_peft_model(zoo.new("llama", vocab_size=VOCAB), config)).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def server(folder):
    llm = chunkcache.wrap(zoo.new("llama", vocab_size=VOCAB), chat_tokenizer())
    with served(llm, tenants=Tenants(KEYS), adapter_dir=folder, adapter_updates=True) as running:
        yield running


def post(server, path, body, key=ADMIN):
    return httpx.post(f"{server[0]}/v1/{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def answer(server, model):
    return post(server, "chat/completions", {**ASK, "model": model})


def models(server):
    told = httpx.get(f"{server[0]}/v1/models", headers={"Authorization": f"Bearer {OTHER}"}).json()["data"]
    return {each["id"]: each.get("parent") for each in told}


def alone(folder, name):
    model = peft.PeftModel.from_pretrained(zoo.new("llama", vocab_size=VOCAB), folder / name).eval()
    llm = chunkcache.wrap(model, chat_tokenizer())
    return llm.generate(QUESTION, TEXTS, max_new_tokens=8, do_sample=False).text


def test_adapters_come_answer_and_go(server, folder):
    base = answer(server, MODEL).json()
    assert answer(server, "legal").status_code == 404
    for name in ("legal", "medical"):
        loaded = post(server, "load_lora_adapter", {"lora_name": name, "lora_path": name})
        assert (loaded.status_code, loaded.json()["parent"]) == (200, MODEL)
    assert models(server) == {MODEL: None, "legal": MODEL, "medical": MODEL}
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: answer(server, name).json()}))
        for name in (MODEL, "legal", "medical")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = {name: body["choices"][0]["message"]["content"] for name, body in found.items()}
    assert {name: body["model"] for name, body in found.items()} == {name: name for name in texts}
    assert texts[MODEL] == base["choices"][0]["message"]["content"]
    assert {name: texts[name].strip() for name in ("legal", "medical")} == {
        name: alone(folder, name) for name in ("legal", "medical")
    }
    usage = answer(server, "legal").json()["usage"]["prompt_tokens_details"]["chunkcache"][0]
    assert usage["hits"] == 3  # of its own KV
    computed = post(server, "chunks", {"texts": [f"{TEXTS[0]} And so on."], "model": "legal"})
    assert computed.json() == {"chunks": 1, "computed": 1}
    for name in ("legal", "medical"):
        assert post(server, "unload_lora_adapter", {"lora_name": name}).json()["deleted"]
        assert answer(server, name).status_code == 404
    assert models(server) == {MODEL: None}
    assert answer(server, MODEL).json()["choices"] == base["choices"]


@pytest.mark.parametrize(
    ("path", "asked", "status", "key"),
    [
        ("load_lora_adapter", {"lora_name": "legal"}, 403, OTHER),
        ("unload_lora_adapter", {"lora_name": "legal"}, 403, OTHER),
        ("load_lora_adapter", {"lora_name": "legal"}, 401, "nobody's"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "../legal"}, 404, ADMIN),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 404, ADMIN),
        ("load_lora_adapter", {"lora_name": "nothing"}, 404, ADMIN),
        ("load_lora_adapter", {"lora_name": "a/b", "lora_path": "legal"}, 400, ADMIN),
        ("load_lora_adapter", {"lora_name": MODEL, "lora_path": "legal"}, 400, ADMIN),
        ("unload_lora_adapter", {"lora_name": "legal"}, 404, ADMIN),
    ],
)
def test_what_is_refused(server, path, asked, status, key):
    assert post(server, path, asked, key).status_code == status


def test_an_adapter_that_cannot_go_is_served_on(folder):
    peft_model = peft.PeftModel.from_pretrained(zoo.new("llama", vocab_size=VOCAB), folder / "medical").eval()
    llm = chunkcache.wrap(peft_model, chat_tokenizer())
    service = Service(llm, MODEL)
    service.adapters.load("legal", folder / "legal")
    peft_model.set_adapter("legal")  # by somebody beside the server
    with pytest.raises(InputError, match="is active"):
        service.adapters.unload("legal")
    assert service.adapters.names == ["legal"]
    peft_model.set_adapter("default")
    service.adapters.unload("legal")
    assert service.adapters.names == []
    service.background.close()
    service.scheduler.close()


def test_without_the_option_there_are_no_such_routes():
    with served() as running:
        assert post(running, "load_lora_adapter", {"lora_name": "legal"}).status_code == 404
        assert post(running, "chat/completions", {**ASK, "model": "legal"}).status_code == 404
