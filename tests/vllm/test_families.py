"""The same answers as chunkcache's own, for each family and policy; second askings and plain ones alike."""

from __future__ import annotations

import pytest
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


def test_bfloat16_passes_the_self_check_and_is_fused(folders):
    with engine(folders("llama"), dtype="bfloat16") as llm:
        (output,) = ask(llm, (made_prompt(0), POLICIES[-1]), warm=True)
    assert output.kv_transfer_params["chunkcache"]["hits"] == 4
