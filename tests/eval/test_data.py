"""Every known format gives the same kind of cases; what is no data set is refused by name."""

from __future__ import annotations

import json

import pytest

from chunkcache.errors import DocumentError
from chunkcache.eval.data import MERGED_WORDS, DataSet, load_cases

PARAGRAPHS = [[f"Title {i}", ["One sentence. ", "Another one."]] for i in range(3)]
ROWS = {
    "cacheblend": {
        "question": "q",
        "answers": ["a"],
        "ctxs": [{"title": "T", "text": "x"}, {"title": "", "text": "y"}],
    },
    "hotpotqa": {"question": "q", "answer": "a", "context": PARAGRAPHS},
    "musique": {"question": "q", "answer": "a", "paragraphs": [{"title": "T", "paragraph_text": "x"}]},
    "longbench": {"input": "q", "answers": ["a"], "context": "Passage 1:\nx\nPassage 2:\ny"},
    "mtrag": {
        "input": [{"speaker": "user", "text": "q"}],
        "contexts": [{"document_id": "1", "text": "\nx"}, {"document_id": "2", "text": "y", "title": "T"}],
        "targets": [{"speaker": "agent", "text": "a"}],
    },
    "squad": {"question": "q", "context": "x", "answers": {"text": ["a", "a"], "answer_start": [0, 0]}},
}
CHUNKS = {
    "cacheblend": ("T\nx", "y"),
    "musique": ("T\nx",),
    "longbench": ("x", "y"),
    "mtrag": ("x", "y"),
    "squad": ("x",),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("lines", [False, True])
def test_a_format_is_told_by_its_fields(tmp_path, name, lines):
    path = tmp_path / "data"
    path.write_text(json.dumps(ROWS[name]) if lines else json.dumps([ROWS[name]]))
    [case] = load_cases(path)
    assert case.question == "q"
    assert case.answers == ("a",)
    if name in CHUNKS:
        assert case.chunks == CHUNKS[name]


def test_short_paragraphs_are_merged_and_long_ones_are_not(tmp_path):
    long = [["Long", ["word " * MERGED_WORDS]]]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**ROWS["hotpotqa"], "context": [*PARAGRAPHS, *long]}]))
    [case] = load_cases(path)
    assert len(case.chunks) == 2
    assert case.chunks[0].count("Title") == 3


def test_cases_with_too_few_chunks_are_left_out(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ROWS["cacheblend"]]))
    assert [len(case.chunks) for case in load_cases(path, chunks=1)] == [1]
    with pytest.raises(DocumentError, match="has 3 chunks"):
        load_cases(path, chunks=3)


@pytest.mark.parametrize(("text", "reason"), [("{", "cannot be read"), ("[]", "no rows"), ('[{"x": 1}]', "fields x")])
def test_what_is_no_data_set_is_refused(tmp_path, text, reason):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DocumentError, match=reason):
        load_cases(path)


def saved(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_conversation_stands_before_its_last_question(tmp_path):
    said = [("user", "Who built it?"), ("agent", "Two brothers.\nIn 1931."), ("user", "Why?")]
    turns = [{"speaker": speaker, "text": text} for speaker, text in said]
    [case] = load_cases(saved(tmp_path / "data", {**ROWS["mtrag"], "input": turns}))
    assert case.question == "user: Who built it?\nagent: Two brothers.\nIn 1931.\nWhy?"


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"answerability": ["ANSWERABLE"]}, ("a",)),
        ({"answerability": ["UNANSWERABLE"]}, ()),
        ({"Answerability": ["UNANSWERABLE"]}, ()),
        ({"targets": []}, ()),
        ({"targets": [{"text": " "}, {"text": "b"}]}, ("b",)),
    ],
)
def test_what_cannot_be_answered_has_no_accepted_answers(tmp_path, fields, answers):
    [case] = load_cases(saved(tmp_path / "data", {**ROWS["mtrag"], **fields}))
    assert case.answers == answers


def test_a_question_over_no_context_is_no_prompt(tmp_path):
    rows = [{**ROWS["mtrag"], "contexts": []}, ROWS["mtrag"]]
    path = saved(tmp_path / "data", *rows)
    assert len(DataSet.read(path).cases) == 2
    assert len(load_cases(path)) == len(load_cases(path, chunks=2, fill=True)) == 1


def test_a_data_set_without_questions_asks_for_a_summary_and_is_filled_up(tmp_path):
    rows = [
        {**ROWS["longbench"], "input": "", "context": "".join(f"Passage {n}:\n{name} {n}\n" for n in range(1, 4))}
        for name in ("hill", "sea")
    ]
    path = saved(tmp_path / "data", *rows)
    for case, name in zip(load_cases(path, chunks=5, fill=True), ("hill", "sea"), strict=True):
        assert case.question == "Write a summary of all the passages."
        assert len(set(case.chunks)) == 5
        assert {f"{name} {n}" for n in (1, 2, 3)} <= set(case.chunks)


def test_the_chunks_of_a_data_set_are_those_of_all_cases_each_once(tmp_path):
    rows = [{**ROWS["longbench"], "context": f"Passage 1:\n{a}\nPassage 2:\n{b}"} for a, b in ("xy", "zx", "wz")]
    assert DataSet.read(saved(tmp_path / "data", *rows)).chunks() == ("x", "y", "z", "w")
