"""One engine: what is missing, malformed, aborted or failing costs no request, and no other request notices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.vllm_engine import ask, counted, drain, engine, figures, ids_of, made_prompt, sides

from chunkcache.errors import SelfCheckError

POLICY = "link:k=4"


@pytest.fixture(scope="module")
def llm(folders):
    with engine(folders("llama"), extra={"policy": POLICY, "find": True, "fresh_tokens": 400}) as llm:
        yield llm


def test_what_is_not_stored_is_left_to_the_engine_and_computed_afterwards(llm, reference):
    prompt = made_prompt(1, pool=1)
    (cold,) = ask(llm, (prompt, POLICY))
    assert ids_of(cold) == reference.answer(prompt, "full")
    assert figures(cold) is None
    drain(llm)
    (warm,) = ask(llm, (prompt, POLICY))
    assert ids_of(warm) == reference.answer(prompt, POLICY)
    assert figures(warm)["hits"] == 4


def test_blocks_of_a_request_that_was_left_to_the_engine_serve_plain_ones(llm):
    prompt = made_prompt(2, pool=2)
    ask(llm, (prompt, POLICY))
    (plain,) = ask(llm, (prompt, False))
    assert plain.num_cached_tokens > 500


def test_one_missing_chunk_is_computed_with_the_prompt(llm):
    stored, longer = made_prompt(3, pool=3), made_prompt(3, chunks=5, pool=3)
    ask(llm, (stored, POLICY), warm=True)
    (output,) = ask(llm, (longer, POLICY))
    assert (figures(output)["hits"], figures(output)["chunks"]) == (4, 5)
    assert figures(output)["fresh"] > 180
    drain(llm)
    assert figures(ask(llm, (longer, POLICY))[0])["hits"] == 5


def test_what_a_policy_leaves_for_later_is_left_out(llm, reference):
    prompt = made_prompt(8, pool=8)
    (output,) = ask(llm, (prompt, "query:ratio=0.1,later=0.3"), warm=True)
    assert ids_of(output) == reference.answer(prompt, "query:ratio=0.1")
    assert "later" not in figures(output)["policy"]


def test_requests_together_with_and_without_chunks(llm, reference):
    prompts = [made_prompt(seed, pool=4) for seed in range(5)]
    ask(llm, (prompts[0], POLICY), warm=True)
    policies = [POLICY, False, "reuse", POLICY, False]
    outputs = ask(llm, *zip(prompts, policies, strict=True))
    wanted = [reference.answer(prompt, policy or "full") for prompt, policy in zip(prompts, policies, strict=True)]
    assert [ids_of(output) for output in outputs] == wanted


def test_a_plain_request_after_a_fused_one_gets_the_engines_own_answer(llm, reference):
    prompt = made_prompt(5, pool=5)
    (fused,) = ask(llm, (prompt, "reuse"), warm=True)
    (plain,) = ask(llm, (prompt, False))
    assert ids_of(fused) == reference.answer(prompt, "reuse")
    assert ids_of(plain) == reference.answer(prompt, "full") != ids_of(fused)
    assert plain.num_cached_tokens == 0


def test_a_fusion_that_fails_is_computed_by_the_engine(llm, reference, monkeypatch):
    prompts = [made_prompt(seed, pool=6) for seed in range(3)]
    ask(llm, (prompts[0], POLICY), warm=True)
    fusion = sides(llm)[1]._working._fusion
    run, calls = fusion.run, []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("gone")
        return run(*args)

    monkeypatch.setattr(fusion, "run", fails_once)
    outputs = ask(llm, *((prompt, POLICY) for prompt in prompts))
    assert len(calls) == 3
    assert [figures(output) is None for output in outputs] == [False, True, False]
    policies = [POLICY, "full", POLICY]
    wanted = [reference.answer(prompt, policy) for prompt, policy in zip(prompts, policies, strict=True)]
    assert [ids_of(output) for output in outputs] == wanted


@pytest.mark.parametrize("side", ["add", "matched", "allocated", "orders", "hear", "finished"])
def test_no_error_of_the_schedulers_side_ends_the_engine(side, llm, reference, monkeypatch):
    prompt = made_prompt(7, pool=7)
    scheduling = sides(llm)[0]._scheduling

    def fails(*_):
        raise RuntimeError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(scheduling, side, fails)
        if side in ("allocated", "orders"):
            ask(llm, (prompt, False))  # fused requests cannot do without them
        else:
            patch.setattr(scheduling, "_options", replace(scheduling._options, lookup_s=0.2))
            assert len(ids_of(ask(llm, (prompt, POLICY))[0])) > 0
    assert ids_of(ask(llm, (prompt, False))[0]) == reference.answer(prompt, "full")


@pytest.mark.parametrize(
    "given",
    [
        "text",
        {},
        {"spans": []},
        {"spans": [[5, 3]]},
        {"spans": [[0, 10], [5, 20]]},
        {"spans": [[0, 99999]]},
        {"spans": [[True, 4]]},
        {"prefix": 50, "spans": [[0, 10]]},
        {"prefix": -1, "spans": [[0, 10]]},
        {"spans": [[0, 16, 0, [1, 2, 3]]]},
        {"chunks": "many"},
        {"spans": [[0, 16]], "policy": 3},
        {"spans": [[0, 16]], "policy": "nonsense"},
        {"spans": [[0, 16]], "policy": "cacheblend"},
    ],
)
def test_a_malformed_request_is_answered_without_reuse(given, llm, reference):
    from vllm import SamplingParams

    prompt = made_prompt(8, pool=8)
    params = SamplingParams(
        max_tokens=4, temperature=0, extra_args={"kv_transfer_params": {"chunkcache": given}}, ignore_eos=True
    )
    (output,) = llm.generate([{"prompt_token_ids": list(prompt.token_ids)}], params, use_tqdm=False)
    assert ids_of(output) == reference.answer(prompt, "full", 4)


def test_known_chunks_are_found_in_a_prompt_that_does_not_name_them(llm, reference):
    named, other = made_prompt(9, pool=9), made_prompt(10, pool=9)
    ask(llm, (named, POLICY), warm=True)
    (found,) = ask(llm, (other, None))
    assert ids_of(found) == reference.answer(other, POLICY)
    assert figures(found)["hits"] == 4
    (own,) = ask(llm, (other, False))
    assert figures(own) is None
    assert ids_of(own) == reference.answer(other, "full")


@pytest.mark.parametrize("sabotaged", ["stored rows", "rotation"])
def test_the_self_check_refuses_what_is_not_right(sabotaged, llm, monkeypatch):
    from chunkcache.integrations.vllm.outline import check

    served = sides(llm)[1]._working._served
    monkeypatch.setattr(served.outline, "rotaries", list(served.outline.rotaries))
    if sabotaged == "rotation":
        rotary = served.outline.rotaries[0]
        monkeypatch.setattr(rotary, "shift", lambda keys, delta, out: out.copy_(keys.flip(-1)))
    else:
        monkeypatch.setattr(served.paged, "write", lambda *_: None)
    with pytest.raises(SelfCheckError):
        check(served.paged, served.outline, 512)


def test_counters_are_among_the_engines_metrics(llm):
    prompt, before = made_prompt(13, pool=13), counted(llm)
    ask(llm, (prompt, POLICY), warm=True)
    after = counted(llm)
    names = [(f"chunkcache_{name}", None) for name in ("fused", "hits", "misses", "computed", "failed")]
    assert [after[name] - before[name] for name in names] == [1, 4, 4, 5, 0]  # computed is the prefix, too
