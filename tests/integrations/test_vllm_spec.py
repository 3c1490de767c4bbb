"""What a request tells vLLM about its chunks, and the options of the connector; vLLM is not needed for these."""

from __future__ import annotations

import json

import pytest
from helpers_tokenizer import tiny_tokenizer

from chunkcache.errors import InputError, PolicyError, PromptError
from chunkcache.integrations.vllm import ChunkSpec, request_params
from chunkcache.integrations.vllm.options import Options, check_engine
from chunkcache.integrations.vllm.spec import salt_of
from chunkcache.prompt import PromptBuilder
from chunkcache.prompt.prompt import PromptIds


def built():
    return PromptBuilder(tiny_tokenizer()).build(
        "Who built the bridge?", ["The ferry sails twice.", "Bread is baked."]
    )


def given(prompt, *args, **options):
    return json.loads(json.dumps(request_params(prompt, *args, **options)))["kv_transfer_params"]["chunkcache"]


def test_a_prompt_comes_out_as_it_went_in():
    prompt = built()
    spec = ChunkSpec.parse(given(prompt, "link:k=4"), len(prompt.token_ids))
    assert spec.prompt(prompt.token_ids) == prompt
    assert (spec.policy, spec.warm, spec.end) == ("link:k=4", False, prompt.end)


def test_a_part_of_a_chunk_brings_the_whole_chunk_along():
    ids = PromptIds([5, 6])
    ids.add_chunk((7, 8, 9, 10), 1, 3)
    ids.add([11])
    prompt = ids.build(2)
    spec = ChunkSpec.parse(given(prompt, warm=True), 5)
    assert spec.prompt(prompt.token_ids) == prompt
    assert spec.warm


def test_lengths_stand_for_chunks_one_behind_the_other():
    assert ChunkSpec.parse({"prefix": 3, "chunks": [4, 5]}, 20).spans == ((3, 7), (7, 12))


def test_a_prompt_without_chunks_brings_nothing_along():
    assert request_params(PromptIds([5, 6, 7]).build(2)) == {}


def test_fused_kv_are_kept_from_an_lmcache_that_knows_prompts_by_their_tokens():
    assert request_params(built())["kv_transfer_params"]["lmcache.skip_save"] is True


def test_a_conversation_that_goes_on_is_refused():
    ids = PromptIds([5, 6, 7])
    ids.add_chunk((8, 9))
    ids.add([10])
    with pytest.raises(PromptError, match="conversation"):
        request_params(ids.build(3, (5, 9)))


@pytest.mark.parametrize(
    "spec", [None, [], {"spans": [[3, 3]]}, {"spans": [[0, 20]]}, {"spans": [["a", 2]]}, {"spans": [[1, 2, 3]]}]
)
def test_a_malformed_one_is_refused(spec):
    with pytest.raises(InputError, match="chunkcache"):
        ChunkSpec.parse(spec, 20)


def test_each_prompt_policy_caller_and_request_has_a_namespace_of_its_own():
    prompt = built()
    ids = prompt.token_ids
    spec, other = (ChunkSpec.parse(given(prompt, policy), len(ids)) for policy in ("reuse", "link:k=4"))
    salts = {
        salt_of(spec, ids, None, "a"),
        salt_of(spec, ids, None, "b"),
        salt_of(spec, ids, "tenant", "a"),
        salt_of(spec, (*ids, 5), None, "a"),
        salt_of(other, ids, None, "a"),
    }
    assert len(salts) == 5


def test_options_are_checked():
    assert Options.of({"policy": "reuse", "lookup_s": 1}).policy == "reuse"
    for wrong in ({"polcy": "reuse"}, {"find": "yes"}, {"store": 3}):
        with pytest.raises(InputError, match="kv_connector_extra_config"):
            Options.of(wrong)
    with pytest.raises(PolicyError):
        Options.of({"policy": "nonsense"})


def test_an_engine_that_was_not_tested_is_refused():
    check_engine("0.32.0+cpu", "recompute", Options())
    check_engine("9.1", "recompute", Options(untested_vllm=True))
    with pytest.raises(InputError, match="tested with vLLM"):
        check_engine("9.1", "recompute", Options())
    with pytest.raises(InputError, match="recompute"):
        check_engine("0.32.1", "fail", Options())
