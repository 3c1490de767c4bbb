"""Two tensor-parallel ranks, each with its heads and its store: one plan for both, and one rank's answers."""

from __future__ import annotations

import pytest
from support.vllm_engine import (
    POLICIES,
    ask,
    drain,
    engine,
    figures,
    finish,
    generation,
    ids_of,
    made_prompt,
)

POLICY = "link:k=4"
LOST = 181  # tokens of the chunks that a rank loses


@pytest.fixture(scope="module")
def llm(folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each rank wants a memory node of its own
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for what the tests run in the workers
        with engine(folders("llama"), tensor_parallel_size=2) as llm:
            yield llm


def test_two_ranks_answer_as_chunkcache_does(llm, reference):
    prompts = [made_prompt(seed) for seed in range(3)]
    for policy in POLICIES:
        wanted = [reference.answer(prompt, policy) for prompt in prompts]
        outputs = [ask(llm, (prompt, policy), warm=True)[0] for prompt in prompts]
        assert [ids_of(output) for output in outputs] == wanted
        assert all(figures(output)["hits"] == 4 for output in outputs)
        assert [ids_of(output) for output in ask(llm, *((prompt, policy) for prompt in prompts))] == wanted
    outputs = ask(llm, *((prompt, None) for prompt in prompts))
    assert [ids_of(output) for output in outputs] == [reference.answer(prompt, "full") for prompt in prompts]


def test_the_ranks_have_keys_of_their_own(llm):
    ask(llm, (made_prompt(0), POLICY), warm=True)

    def names(worker):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return sorted({entry.model for entry in get_kv_transfer_group()._working._served.store.entries()})

    one, other = llm.collective_rpc(names)
    assert (len(one), len(other)) == (1, 1)
    assert one != other


def test_what_one_rank_has_lost_is_reused_by_none(llm):
    prompt = made_prompt(3, pool=3)
    (whole,) = ask(llm, (prompt, POLICY), warm=True)
    answers = []
    for ranks in ([1], [0, 1]):
        assert [lost > 0 for lost in llm.collective_rpc(losing(ranks))] == [rank in ranks for rank in (0, 1)]
        (output,) = ask(llm, (prompt, POLICY))
        answers.append(ids_of(output))
        assert figures(output)["hits"] == 3
        assert figures(output)["placed"] == figures(whole)["placed"] - LOST
        drain(llm)  # it is computed anew
    assert answers[0] == answers[1] != ids_of(whole)
    assert ids_of(ask(llm, (prompt, POLICY))[0]) == ids_of(whole)


def test_a_rank_that_has_let_go_of_a_request_is_followed_by_the_other(llm, reference):
    prompt = made_prompt(4, pool=3)
    ask(llm, (prompt, POLICY), warm=True)

    def lets_go(worker):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        if worker.rank == 1:
            get_kv_transfer_group()._working._found.clear()

    llm.enqueue(*generation(prompt, POLICY), use_tqdm=False)
    llm.llm_engine.step()  # in which it is looked up
    llm.collective_rpc(lets_go)
    (output,) = finish(llm)
    assert figures(output) is None
    assert ids_of(output) == reference.answer(prompt, "full")


def test_a_rank_that_cannot_place_kv_does_not_leave_the_other_waiting(llm, reference):
    prompt = made_prompt(5, pool=3)
    ask(llm, (prompt, POLICY), warm=True)

    def breaks(worker):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        def fails_once(*_):
            del fusion._place
            raise OSError("gone")

        if worker.rank == 1:
            fusion = get_kv_transfer_group()._working._fusion
            fusion._place = fails_once

    llm.collective_rpc(breaks)
    (output,) = ask(llm, (prompt, POLICY))
    assert figures(output) is None
    assert ids_of(output) == reference.answer(prompt, "full")
    assert ids_of(ask(llm, (prompt, POLICY))[0]) == reference.answer(prompt, POLICY)


def test_what_ranks_found_differently_is_what_all_of_them_found():
    from chunkcache.integrations.vllm.messages import News, Report

    one = Report(frozenset({1}), 500, frozenset({0, 2}), {0: "memory", 2: "disk", 3: "disk"})
    other = Report(frozenset({3}), 400, frozenset({0, 1}), {0: "memory", 1: "disk", 2: "disk"})
    both = News({"a": one}).aggregate(News({"a": other})).reports["a"]
    assert (both.missing, both.reused, both.exact, both.ranks) == (frozenset({1, 3}), 400, frozenset({0}), 2)


def losing(ranks):
    """Return what removes chunks from the stores of some ranks, and says how many."""

    def lose(worker):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        store = get_kv_transfer_group()._working._served.store
        keys = [entry.key for entry in store.entries() if entry.tokens == LOST and worker.rank in ranks]
        return sum(map(store.delete, keys))

    return lose
