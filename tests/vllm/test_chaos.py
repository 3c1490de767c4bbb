"""Redis killed and started again, entries damaged and requests aborted: no answer fails, none is wrong."""

from __future__ import annotations

import asyncio

from helpers_redis import Valkey
from support.vllm_engine import ask, counted, drain, engine, made_prompt, sides

from chunkcache.eval.vllm_answers import Kind
from chunkcache.eval.vllm_chaos import Chaos


def test_no_request_fails_and_none_is_wrong(folders):
    kinds = [Kind(made_prompt(seed, 3, 40, 12, 10, pool=seed // 2), "link:k=4") for seed in range(4)]
    chaos = Chaos(model=folders("llama"), requests=48, clients=4, tokens=6, kills=1, pause_s=0.2)
    found = asyncio.run(chaos.run(kinds))
    assert [found[name] for name in ("failed", "wrong", "hanging", "unfinished")] == [0] * 4
    assert found["kills"] == found["restarts"] == 1
    assert found["damaged"] > 0
    assert found["fused"] > 0
    told = ("fused", "fused_in_part", "left_to_the_engine", "aborted")
    assert sum(found[name] for name in told) == found["requests"]


def test_while_the_store_takes_nothing_no_chunks_are_computed_for_it(folders):
    valkey = Valkey()

    with engine(folders("llama"), valkey.url, extra={"share": False}) as llm:
        sides(llm)[1]._working._keeping.pause_s = 600.0
        ask(llm, (made_prompt(1, pool=1), "link:k=4"), warm=True)
        drain(llm)
        before = counted(llm)
        valkey.close()
        outputs = ask(llm, *((made_prompt(seed, pool=seed), "link:k=4") for seed in (2, 3, 4)), warm=True)
        drain(llm)
        assert [output.kv_transfer_params for output in outputs] == [None] * 3
        after = counted(llm)
    computed, failed = ("chunkcache_computed", None), ("chunkcache_failed", None)
    assert before[computed] == after[computed] == 5
    assert after[failed] - before[failed] == 1
