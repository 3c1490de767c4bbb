"""Requests that share their beginning are found, and put in an order in which neighbours share most."""

from __future__ import annotations

import pytest

from chunkcache.engine import grouping
from chunkcache.engine.grouping import Request, checked, grouped, ordered, reordered
from chunkcache.errors import PromptError
from chunkcache.prompt import Prompt, PromptChunk
from chunkcache.prompt.prompt import PromptIds


def prompt(*chunks: int, question: int = 9, prefix: tuple[int, ...] = (1, 2)) -> Prompt:
    ids = PromptIds(prefix)
    for chunk in chunks:
        ids.add_chunk((chunk,) * 5)
    ids.add([question])
    return ids.build(len(prefix))


def test_only_the_question_may_differ_in_a_group():
    prompts = [prompt(3, 4), prompt(4, 3), prompt(3, 4, question=8), prompt(3), prompt(3, prefix=(1,))]
    assert grouped(prompts) == [[0, 2], [1], [3], [4]]
    assert prompts[0].end == 12


def test_prompts_without_a_beginning_share_nothing():
    assert grouped([prompt(prefix=()), prompt(prefix=())]) == [[0], [1]]


def test_neighbours_have_most_chunks_in_common():
    prompts = [prompt(3, 4, 5), prompt(6, 7, 8), prompt(4, 7, 6), prompt(3, 4, 6), prompt(10)]
    assert ordered(grouped(prompts), prompts) == [[0], [3], [2], [1], [4]]


def test_between_equals_the_longer_common_beginning_comes_first():
    prompts = [prompt(3, 4, 5), prompt(4, 3, 6), prompt(3, 4, 6)]
    assert ordered(grouped(prompts), prompts) == [[0], [2], [1]]
    assert ordered([], []) == []


def test_reordered_prompts_begin_with_what_most_of_them_have():
    requests = [Request("a", ["x", "common"]), Request("b", ("y", "common")), Request("c", ("common", "x"))]
    assert [tuple(each.chunks) for each in reordered(requests)] == [("common", "x"), ("common", "y"), ("common", "x")]


def test_a_passage_is_not_moved():
    with pytest.raises(PromptError, match="PromptChunk"):
        reordered([Request("a", [PromptChunk("text")])])


@pytest.mark.parametrize("wrong", ["a question", b"q", (), ("q", (), None, "more"), {"question": "q"}, 7, {"q"}])
def test_what_is_no_request_is_named(wrong):
    with pytest.raises(PromptError, match="request 1 is no"):
        checked([("q",), wrong])


@pytest.mark.parametrize("chunks", ["one text", b"bytes", {"text": "a"}, PromptChunk("text"), None, 3])
def test_chunks_that_are_no_list_are_refused(chunks):
    with pytest.raises(PromptError, match="request 1: its chunks are a"):
        checked([("q",), ("q", chunks)])


def test_requests_may_come_from_anywhere_once():
    assert checked((str(n), iter(["a", "b"])) for n in range(2)) == [
        Request("0", ("a", "b")),
        Request("1", ("a", "b")),
    ]
    with pytest.raises(PromptError, match="request 0 is no"):
        checked("why")
    with pytest.raises(PromptError, match="pass them as texts"):
        reordered([Request("a", (["nested"],))])


def test_a_chunk_that_all_groups_have_costs_no_more_than_a_few_looks(monkeypatch):
    looks = []
    real = grouping._alike
    monkeypatch.setattr(grouping, "_alike", lambda *args: looks.append(1) or real(*args))
    prompts = [prompt(0, 10 + number // 2, 5000 + number) for number in range(2000)]
    groups = ordered(grouped(prompts), prompts)
    assert groups == [[number] for number in range(2000)]
    assert len(looks) <= 2000 * (grouping.NEIGHBOURS + 2)
