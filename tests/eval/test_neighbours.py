"""Policies whose chunks are computed behind their nearest of the data set, beside the same without."""

from __future__ import annotations

import pytest
import zoo
from support.llm import QUESTION, TEXTS, VOCAB, chat_tokenizer, tiny_model

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
    assert parse_contender("query:ratio=0@nearest")[1] == "nearest"
    assert parse_contender("query:ratio=0@first")[1] == "first"
    assert parse_contender("query:ratio=0")[1] == ""
    for name in ("reuse@neighbours", "reuse@first", "query@friends", "query@"):
        with pytest.raises(PolicyError, match=name):
            parse_contender(name)


def test_where_nothing_is_known_of_neighbours_they_are_refused():
    with pytest.raises(PolicyError, match="query@neighbours"):
        compare(tiny_model(), chat_tokenizer(), [Case(QUESTION, TEXTS)], Comparison(["query@neighbours"]))


def test_neighbours_and_the_lead_in_alone_are_measured_side_by_side_and_apart():
    cases = [Case(QUESTION, TEXTS[:2])]
    nearest = {text: [other for other in (*TEXTS, *OTHERS) if other != text] for text in TEXTS}
    names = ["query:ratio=0@neighbours", "query:ratio=0", "query:ratio=0@nearest", "fusionrag:ratio=0.5@neighbours"]
    comparison = Comparison(names, nearest=lambda texts: [nearest[text] for text in texts])
    model = zoo.new("llama", vocab_size=VOCAB, max_position_embeddings=4096)  # room for the lead-in
    rows = {row["policy"]: row for row in compare(model, chat_tokenizer(), cases, comparison).rows}
    assert {row["hits"] for name, row in rows.items() if name != "full"} == {2}
    near, packaged, first_near = (rows[name]["kl_mean"] for name in names[:3])
    assert min(near, packaged, first_near) > 0
    assert len({near, packaged, first_near}) == 3  # exact in the first place, nowhere, and behind its nearest there


def test_the_lead_in_with_the_first_chunk_exact_is_measured_without_knowing_any_neighbours():
    names = ["query:ratio=0@first", "query:ratio=0"]
    model = zoo.new("llama", vocab_size=VOCAB, max_position_embeddings=4096)  # room for the lead-in
    rows = compare(model, chat_tokenizer(), [Case(QUESTION, TEXTS[:2])], Comparison(names)).rows
    first, packaged = (next(row for row in rows if row["policy"] == name) for name in names)
    assert first["hits"] == packaged["hits"] == 2
    assert first["kl_mean"] != packaged["kl_mean"]
    [alone] = compare(model, chat_tokenizer(), [Case(QUESTION, TEXTS[:1])], Comparison(names[:1])).rows[1:]
    assert alone["kl_mean"] == pytest.approx(0, abs=1e-9)  # the only chunk is exact


def test_the_pool_knows_the_nearest_of_its_chunks():
    pool = ChunkPool([*OTHERS, OTHERS[0]])
    first, third = pool.nearest([OTHERS[0], OTHERS[2]])
    assert first[0] == OTHERS[1]
    assert sorted(third) == sorted(OTHERS[:2])
