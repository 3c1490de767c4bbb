"""A guarded policy: passes are accepted as chunkcache itself does, and else the engine computes the prompt."""

from __future__ import annotations

import pytest
from support.vllm_engine import NEW, Reference, ask, counted, engine, figures, ids_of, made_prompt

from chunkcache.blend.guard import GuardModel
from chunkcache.engine.calibration import Calibration

PROMPTS = [made_prompt(seed) for seed in range(4)]
# of the first pass 148 nats are predicted, of the second a twentieth of what it moved, of the third all of that
GUARD = GuardModel(((5.0, 0.0, 0.0), (-3.0, 1.0, 0.0), (0.0, 1.0, 0.0)), ((1e-9, 0.0), (1e9, 0.0)))
BOUNDS = (1e-9, 0.3, 200.0)


@pytest.fixture(scope="module")
def calibrated(folders, tmp_path_factory):
    """chunkcache with a calibration, and the calibration's file."""
    import chunkcache

    reference, file = Reference(folders("llama")), tmp_path_factory.mktemp("calibration") / "llama.json"
    Calibration(reference.llm.fingerprint, guard=GUARD).save(file)
    model, tokenizer = chunkcache.load_model(folders("llama"), device="cpu", dtype="float32")
    reference.llm = chunkcache.wrap(model, tokenizer, calibration=file)
    return reference, str(file)


@pytest.fixture(scope="module")
def llm(folders, calibrated, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with engine(folders("llama"), extra={"calibration": calibrated[1]}) as llm:
            yield llm


def policy(bound):
    return f"query:ratio=0.1,lead=64,guard={bound}"


def test_passes_and_answers_are_those_of_chunkcache(llm, calibrated):
    reference, _ = calibrated
    passes = set()
    for bound in BOUNDS:
        for prompt in PROMPTS:
            request = reference.llm.engine.prepare(
                lambda prompt=prompt: prompt, policy(bound), NEW, {"do_sample": False}
            )
            wanted = reference.llm.engine.generate(request)
            (output,) = ask(llm, (prompt, policy(bound)), warm=True)
            assert ids_of(output) == list(wanted.token_ids)
            told = figures(output)
            assert (told["guard_passes"], told["guard_full"]) == (wanted.stats.guard_passes, wanted.stats.guard_full)
            passes.add((told["guard_passes"], told["guard_full"]))
    assert len(passes) >= 3  # accepted at once, accepted later, and not at all


def test_a_prompt_that_no_pass_is_accepted_for_is_the_engines(llm, calibrated):
    prompt = PROMPTS[0]
    ask(llm, (prompt, policy(BOUNDS[0])), warm=True)
    before = counted(llm)
    (output,) = ask(llm, (prompt, policy(BOUNDS[0])))
    after = counted(llm)
    assert ids_of(output) == calibrated[0].answer(prompt, "full")
    assert (output.num_cached_tokens, figures(output)["placed"]) == (0, 0)
    names = [(f"chunkcache_{name}", None) for name in ("unaccepted", "failed", "fused")]
    assert [after[name] - before[name] for name in names] == [1, 0, 0]


def test_a_policy_that_is_not_guarded_is_as_ever(llm, calibrated):
    plain = "query:ratio=0.1,lead=64"
    outputs = ask(llm, *((prompt, plain) for prompt in PROMPTS))
    assert [ids_of(output) for output in outputs] == [calibrated[0].answer(prompt, plain) for prompt in PROMPTS]
