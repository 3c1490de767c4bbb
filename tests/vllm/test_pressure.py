"""Chunked prefill, preemption, damaged and removed entries of a disk, and models that differ in a few weights."""

from __future__ import annotations

import shutil

import torch
from support.vllm_engine import NEW, Reference, ask, counted, drain, engine, ids_of, made_prompt

from chunkcache.engine.calibration import Calibration

POLICY = "link:k=4"
ALONE = {"share": False}  # without asking transformers, which takes half of the time


def test_small_steps_and_too_few_blocks(folders, reference):
    prompts = [made_prompt(seed, pool=1) for seed in range(3)]
    wanted = [reference.answer(prompt, POLICY, 80) for prompt in prompts]
    with engine(
        folders("llama"), max_num_batched_tokens=256, enable_chunked_prefill=True, num_gpu_blocks_override=20
    ) as llm:
        ask(llm, (prompts[0], POLICY), warm=True)
        outputs = ask(llm, *((prompt, POLICY) for prompt in prompts), new=80)
        counts = counted(llm)
    assert counts["num_preemptions", None] > 0
    assert [ids_of(output) for output in outputs] == wanted


def test_a_store_on_disk_that_is_damaged_and_removed(folders, reference, tmp_path):
    prompts = [made_prompt(seed, pool=2) for seed in range(4)]
    wanted = [reference.answer(prompt, POLICY) for prompt in prompts]
    full = [reference.answer(prompt, "full") for prompt in prompts]
    with engine(folders("llama"), f"disk://{tmp_path}/kv", extra=ALONE) as llm:
        ask(llm, (prompts[0], POLICY), warm=True)
        drain(llm)
        assert [ids_of(output) for output in ask(llm, *((prompt, POLICY) for prompt in prompts))] == wanted
        files = [path for path in (tmp_path / "kv").rglob("*") if path.is_file() and path.stat().st_size > 50_000]
        assert files
        for path in files:
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            path.write_bytes(data)
        assert all(len(ids_of(output)) == NEW for output in ask(llm, *((prompt, POLICY) for prompt in prompts)))
        drain(llm)
        shutil.rmtree(tmp_path / "kv")
        outputs = ask(llm, *((prompt, POLICY) for prompt in prompts))
        allowed = zip(outputs, wanted, full, strict=True)
        assert all(ids_of(output) in (fused, plain) for output, fused, plain in allowed)


def test_two_models_that_share_their_norms_share_no_chunks(folders, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = made_prompt(1, pool=3)
    model = AutoModelForCausalLM.from_pretrained(folders("llama"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    tuned = str(tmp_path / "tuned")
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(folders("llama")).save_pretrained(tuned)
    for folder in (folders("llama"), tuned):
        wanted = Reference(folder).answer(prompt, POLICY)
        with engine(folder, f"disk://{tmp_path}/kv", extra=ALONE) as llm:
            (first,) = ask(llm, (prompt, POLICY))
            assert first.kv_transfer_params is None  # nothing of the other model was found
            drain(llm)
            assert ids_of(ask(llm, (prompt, POLICY))[0]) == wanted


def test_an_engine_started_again_finds_its_chunks_on_disk(folders, tmp_path):
    prompt = made_prompt(1, pool=4)
    answers = []
    for hits in (None, 4):
        with engine(folders("llama"), f"disk://{tmp_path}/kv", extra=ALONE) as llm:
            (output,) = ask(llm, (prompt, POLICY), warm=hits is None)
            answers.append(ids_of(output))
            assert hits is None or output.kv_transfer_params["chunkcache"]["hits"] == hits
    assert answers[0] == answers[1]


def test_chunks_that_transformers_computed_are_found_by_the_engine(folders, tmp_path, monkeypatch):
    import chunkcache

    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "cache"))
    prompt, policy = made_prompt(1, pool=6), "query:ratio=0.1,lead=64"
    model, tokenizer = chunkcache.load_model(folders("llama"), device="cpu", dtype="float32")
    with chunkcache.wrap(model, tokenizer, store=f"disk://{tmp_path}/kv", policy=policy) as llm:
        request = llm.engine.prepare(lambda: prompt, policy, NEW, {"do_sample": False})
        wanted = list(llm.engine.generate(request).token_ids)
    with engine(folders("llama"), f"disk://{tmp_path}/kv") as llm:
        (output,) = ask(llm, (prompt, policy))
        assert output.kv_transfer_params["chunkcache"]["hits"] == 4
        assert ids_of(output) == wanted


def test_what_cannot_be_served_is_served_without_reuse(folders, caplog):
    prompt = made_prompt(1, pool=5)
    with engine(folders("mistral-sliding")) as llm:
        assert "SlidingWindowSpec: not served" in caplog.text
        (output,) = ask(llm, (prompt, POLICY), warm=True)
        assert output.kv_transfer_params is None
        assert ids_of(output) == Reference(folders("mistral-sliding")).answer(prompt, "full")


def test_a_guard_without_a_calibration_is_served_without_reuse(folders, reference):
    prompt = made_prompt(1, pool=7)
    with engine(folders("llama")) as llm:
        (output,) = ask(llm, (prompt, "query:ratio=0.1,lead=64,guard=1"), warm=True)
        assert output.kv_transfer_params is None
        assert ids_of(output) == reference.answer(prompt, "full")


def test_another_models_calibration_is_told_at_the_start(folders, tmp_path, caplog):
    prompt = made_prompt(1, pool=7)
    Calibration("0" * 64, lead=64).save(tmp_path / "other.json")
    with engine(folders("llama"), extra={"calibration": str(tmp_path / "other.json"), "share": False}) as llm:
        assert ask(llm, (prompt, "reuse"), warm=True)[0].kv_transfer_params is None
    assert "was made for another model" in caplog.text
