"""Adapters of peft that answer requests beside one another; runs where the package is: `make test-adapters`."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import Any

import pytest
import zoo
from support.changing import OPTIONS, fill_lora
from support.llm import QUESTION, TEXTS, VOCAB, chat_tokenizer

import chunkcache
from chunkcache.engine.sampling import Sampled, Sampler
from chunkcache.engine.scheduler import Scheduler
from chunkcache.engine.ticket import Failed
from chunkcache.errors import InputError, UnsupportedModelError

peft = pytest.importorskip("peft", reason="needs peft: run make test-adapters")

pytestmark = pytest.mark.filterwarnings("ignore")  # what this package warns of is its own


def saved(folder: Any, scale: float) -> Any:
    """Save a LoRA of the tiny Llama in a folder."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"])
    model = fill_lora(peft.get_peft_model(zoo.new("llama", vocab_size=VOCAB), config))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.mul_(scale)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: saved(root / name, scale) for name, scale in (("legal", 1.0), ("medical", 3.0))}


@pytest.fixture
def llm(folders):
    wrapped = chunkcache.wrap(zoo.new("llama", vocab_size=VOCAB), chat_tokenizer())
    for name, folder in folders.items():
        wrapped.engine.served.adapters.add(name, folder)
    return wrapped


def alone(name: str | None, folders) -> list[int]:
    """Return what a model with this one adapter answers."""
    model = zoo.new("llama", vocab_size=VOCAB)
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, folders[name]).eval()
    return chunkcache.wrap(model, chat_tokenizer()).generate(QUESTION, TEXTS, max_new_tokens=12, **OPTIONS).token_ids


def test_an_adapter_that_is_loaded_answers_and_leaves_the_model_as_it_is(llm, folders):
    wanted = {name: alone(name, folders) for name in (None, *folders)}
    assert len({tuple(ids) for ids in wanted.values()}) == 3
    for name in (None, "medical", "legal", None):
        found = llm.generate(QUESTION, TEXTS, adapter=name, max_new_tokens=12, **OPTIONS)
        assert found.token_ids == wanted[name]


def test_sequences_of_several_adapters_decode_beside_one_another(llm, folders):
    wanted = {name: alone(name, folders) for name in (None, *folders)}
    scheduler = Scheduler(llm.engine)
    answers: dict[int, list[int]] = {}
    ended: queue.Queue = queue.Queue()

    def deliver(index, event):
        if isinstance(event, Sampled):
            answers.setdefault(index, []).append(event.token_id)
        else:
            ended.put(event)

    names = [None, "legal", "medical", "legal", None, "medical"]
    for index, name in enumerate(names):
        request = llm.engine.prepare(
            lambda: llm.prompts.build(QUESTION, TEXTS), None, 12, {**OPTIONS, "adapter": name}
        )
        sampler = Sampler(llm.model, request.options, request.prompt.token_ids)
        scheduler.submit(request, sampler, lambda event, index=index: deliver(index, event))
    ends = [ended.get(timeout=60) for _ in names]
    scheduler.close()
    assert not [end.error for end in ends if isinstance(end, Failed)]
    assert [answers[index] for index in range(len(names))] == [wanted[name] for name in names]


def test_an_adapter_comes_and_goes_while_others_answer(llm, folders):
    wanted = alone("legal", folders)
    adapters = llm.engine.served.adapters
    wrong = []

    def ask():
        for _ in range(4):
            found = llm.generate(QUESTION, TEXTS, adapter="legal", max_new_tokens=12, **OPTIONS).token_ids
            if found != wanted:
                wrong.append(found)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(4):
        adapters.remove("medical")
        adapters.add("medical", folders["medical"])
    asking.join()
    assert not wrong
    assert adapters.names == ["legal", "medical"]


def test_what_cannot_be_loaded_is_told(llm, folders, tmp_path):
    adapters = llm.engine.served.adapters
    with pytest.raises(InputError, match="already"):
        adapters.add("legal", folders["legal"])
    with pytest.raises(InputError, match="safetensors"):
        adapters.add("other", tmp_path)
    with pytest.raises(InputError, match="no adapter 'other'"):
        adapters.remove("other")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(zoo.new("llama", vocab_size=VOCAB), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        adapters.add("prompt", tmp_path / "prompt")
    wide = peft.get_peft_model(
        zoo.new("llama", vocab_size=VOCAB, hidden_size=32), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="does not fit"):
        adapters.add("wide", tmp_path / "wide")
    assert adapters.names == ["legal", "medical"]
    assert llm.generate(QUESTION, TEXTS, max_new_tokens=12, **OPTIONS).token_ids == alone(None, folders)


def test_a_deletion_while_an_adapter_is_active_does_not_take_the_model_for_another(llm):
    base, name = llm.engine.served, llm.fingerprint
    deleted = threading.Thread(target=llm.delete, kwargs={"texts": TEXTS[:1]})
    with base.held("legal"):
        base.latest = replace(base.latest, state=-1)  # so that it looks at the model anew
        deleted.start()
        deleted.join(0.3)
    deleted.join(30)
    assert not deleted.is_alive()
    assert base.latest.library.fingerprint == llm.fingerprint == name
