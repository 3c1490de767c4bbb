"""What of an answer stands in a document word for word."""

from __future__ import annotations

import pytest

from chunkcache.serve.citations import cite

HILLS = "Mawdle Fell is 412 metres high. It was first climbed in 1931 by the sisters Anna and Ruth Tarrow."
BOATS = "In winter the ferry sails only when the sea is calm. It was first painted red."


def cited(answer, *documents, question=""):
    """Return the text of each citation with its sources."""
    return [(answer[each.start : each.end], each.sources) for each in cite(answer, documents, question)]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("It sails only when the sea is calm, they say.", [("sails only when the sea is calm", (1,))]),
        ("SAILS ONLY, when the sea: is calm!", [("SAILS ONLY, when the sea: is calm", (1,))]),
        ("It was first climbed long ago.", [("It was first climbed", (0,))]),
        ("It was first of all a hill.", [("It was first", (0, 1))]),
        ("That was in 1931.", [("in 1931", (0,))]),
        ("Ask Ruth about it.", [("Ruth", (0,))]),
        ("It is a hill.", []),
        ("The sisters rowed.", []),
        ("They say 41 or 2, in 19 or 31.", []),
        ("by the way, in the end, it was", []),
        ("", []),
        ("?!", []),
    ],
)
def test_runs_of_words_names_and_numbers_are_cited(answer, wanted):
    assert cited(answer, HILLS, BOATS) == wanted


def test_what_the_question_says_is_not_cited_by_itself():
    assert cited("Mawdle, they say.", HILLS, question="How high is Mawdle Fell?") == []
    assert cited("Of Mawdle Fell is 412.", HILLS, question="How high is Mawdle Fell?") == [
        ("Mawdle Fell is 412", (0,))
    ]


def test_a_name_in_several_documents_points_to_none():
    assert cited("Ask Ruth.", "We saw Ruth.", "They saw Ruth.") == []


def test_the_longer_of_two_runs_that_meet_is_cited():
    documents = ("grey stone bridge over", "the bridge over the river was opened early")
    assert cited("a grey stone bridge over the river was opened", *documents) == [
        ("bridge over the river was opened", (1,))
    ]


def test_no_run_goes_on_from_one_document_to_the_next():
    assert cited("the last word the first word", "the last word", "the first word") == [
        ("the last word", (0,)),
        ("the first word", (1,)),
    ]


def test_documents_without_words_have_no_citations():
    assert cited("the last word is said", "", " \n", "the last word") == [("the last word", (2,))]
    assert cited("the last word is said") == []
    assert cited("the last word is said", "", "...") == []


def test_offsets_are_those_of_the_answer_whatever_its_letters_are():
    answer = "Straße — ﬁne: Das Fährboot fährt um 12:30 Uhr 🚢 ab."
    assert cited(answer, "das fährboot FÄHRT um 12:30 uhr") == [("Das Fährboot fährt um 12:30 Uhr", (0,))]


def test_words_that_repeat_are_one_run():
    assert cited("the " * 2000, "the " * 8000) == []
    assert cited("word " * 2000, "word " * 8000) == [(("word " * 2000).strip(), (0,))]
