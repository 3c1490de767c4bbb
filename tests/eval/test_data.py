"""Every known format gives the same kind of cases; what is no data set is refused by name."""

from __future__ import annotations

import json

import pytest

from chunkcache.errors import DocumentError
from chunkcache.eval.data import MERGED_WORDS, load_cases

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
    "squad": {"question": "q", "context": "x", "answers": {"text": ["a", "a"], "answer_start": [0, 0]}},
}
CHUNKS = {"cacheblend": ("T\nx", "y"), "musique": ("T\nx",), "longbench": ("x", "y"), "squad": ("x",)}


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
