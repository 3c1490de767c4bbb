"""Policies whose chunks are computed behind their nearest of the data set, beside the same without."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model

from chunkcache.errors import PolicyError
from chunkcache.eval import Case, Comparison, compare
from chunkcache.eval.contenders import parse_contender
from chunkcache.eval.neighbours import ChunkPool

OTHERS = (
    "The bridge was opened in 1931.",
    "The bridge has a toll of one penny.",
    "Bread is baked with rye.",
)


def test_a_name_says_what_chunks_are_computed_behind():
    assert parse_contender("query:ratio=0@neighbours")[1] == "neighbours"
    assert parse_contender("query:ratio=0")[1] == ""
    for name in ("reuse@neighbours", "query@friends", "query@"):
        with pytest.raises(PolicyError, match=name):
            parse_contender(name)


def test_where_nothing_is_known_of_neighbours_they_are_refused():
    with pytest.raises(PolicyError, match="query@neighbours"):
        compare(tiny_model(), chat_tokenizer(), [Case(QUESTION, TEXTS)], Comparison(["query@neighbours"]))


def test_neighbours_and_the_lead_in_alone_are_measured_side_by_side_and_apart():
    cases = [Case(QUESTION, TEXTS[:2])]
    nearest = {text: [other for other in (*TEXTS, *OTHERS) if other != text] for text in TEXTS}
    names = ["query:ratio=0@neighbours", "query:ratio=0", "fusionrag:ratio=0.5@neighbours"]
    comparison = Comparison(names, nearest=lambda texts: [nearest[text] for text in texts])
    rows = {row["policy"]: row for row in compare(tiny_model(), chat_tokenizer(), cases, comparison).rows}
    assert {row["hits"] for name, row in rows.items() if name != "full"} == {2}
    near, packaged = (rows[name]["kl_mean"] for name in names[:2])
    assert near > 0
    assert packaged > 0
    assert near != packaged


def test_the_pool_knows_the_nearest_of_its_chunks():
    pool = ChunkPool([*OTHERS, OTHERS[0]])
    first, third = pool.nearest([OTHERS[0], OTHERS[2]])
    assert first[0] == OTHERS[1]
    assert sorted(third) == sorted(OTHERS[:2])
