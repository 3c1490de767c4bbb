"""The same answers as chunkcache's own, for each family and policy; second askings and plain ones alike."""

from __future__ import annotations

import pytest
import torch
from support.vllm_engine import FAMILIES, POLICIES, Reference, ask, engine, ids_of, made_prompt


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral-sliding"])
def test_answers_are_those_of_chunkcache(family, folders):
    prompts = [made_prompt(seed) for seed in range(3)]
    reference = Reference(folders(family))
    full = [reference.answer(prompt, "full") for prompt in prompts]
    assert len(set(map(tuple, full))) == len(full)  # the answers depend on the prompt: they are evidence
    with engine(folders(family)) as llm:
        for policy in POLICIES:
            wanted = [reference.answer(prompt, policy) for prompt in prompts]
            for warm in (True, False):
                outputs = [ask(llm, (prompt, policy), warm=warm)[0] for prompt in prompts]
                assert [ids_of(output) for output in outputs] == wanted
                assert all(output.kv_transfer_params["chunkcache"]["hits"] == 4 for output in outputs)
        outputs = [ask(llm, (prompt, None))[0] for prompt in prompts]
        assert [ids_of(output) for output in outputs] == full
        assert outputs[0].num_cached_tokens == 0  # what was fused is served to no other


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe", "mistral-wide"])
def test_bfloat16_is_as_exact_as_in_chunkcache(family, folders):
    prompts = [made_prompt(seed) for seed in range(4)]
    exact, rounded = Reference(folders(family)), Reference(folders(family), "bfloat16")
    with engine(folders(family), dtype="bfloat16", max_logprobs=-1) as llm:
        for policy in POLICIES:
            wanted = torch.stack([exact.log_probs(prompt, policy) for prompt in prompts])
            outputs = [ask(llm, (prompt, policy), new=1, warm=True, logprobs=-1)[0] for prompt in prompts]
            noise = torch.stack([rounded.log_probs(prompt, policy) for prompt in prompts]) - wanted
            error = torch.stack(list(map(first_log_probs, outputs))) - wanted
            otherwise = torch.stack([exact.log_probs(prompt, "full") for prompt in prompts]) - wanted
            assert error.norm() < 2 * noise.norm()
            assert error.norm() < 0.5 * otherwise.norm()  # another policy's would not pass for it


def first_log_probs(output):
    (first,) = output.outputs[0].logprobs
    return torch.tensor([first[token].logprob for token in range(len(first))])
