"""Keyword search: words of any language, BM25's order, and no output of its own."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest

from chunkcache.retriever.keywords import Keywords, words


def index(*texts):
    return Keywords([words(text) for text in texts])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Größe of C3-po's 3.5 x", ["the", "grösse", "of", "c3", "po", "s", "3", "5", "x"]),
        ("Ｆｕｌｌ ＷＩＤＴＨ ﬁne", ["full", "width", "fine"]),
        ("Привет, МИР", ["привет", "мир"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("தமிழ்", ["தமிழ்"]),
        ("مَرْحَبًا بك", ["مَرْحَبًا", "بك"]),
        ("東京の塔abc漢", ["東京", "京の", "の塔", "abc", "漢"]),
        ("한국어 말", ["한국", "국어", "말"]),
        (" \n—!", []),
    ],
)
def test_words_are_folded_and_whole(text, expected):
    assert words(text) == expected


def test_the_text_with_the_rare_word_comes_first_and_texts_without_any_do_not_come():
    found = index("the ferry sails", "bread", "a comet and the moon", "the ferry").search("the COMET!", 9)
    assert [position for position, _ in found] == [2, 3, 0]
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert found[-1][1] > 0


def test_scores_are_those_of_bm25():
    [(position, score)] = index("ferry ferry bread", "comet").search("ferry", 5)
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    assert position == 0
    assert score == pytest.approx(idf * 2 / (1.5 * (1 - 0.75 + 0.75 * 3 / 2) + 2), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_equal_scores_come_in_order_and_k_cuts(k):
    found = index(*["ferry boat"] * 5, "ferry ferry").search("ferry", k)
    assert [position for position, _ in found] == [5, 0, 1, 2, 3, 4][:k]


def test_a_query_of_unknown_words_and_texts_without_words_find_nothing():
    assert index("ferry").search("zebra", 5) == []
    assert index("ferry").search("?!", 5) == []
    assert Keywords([]).search("ferry", 5) == []
    assert index("...", "!").search("ferry", 5) == []
    assert index("...", "ferry").search("ferry", 5)[0][0] == 1


def test_other_scripts_are_found():
    found = index("東京タワーは高い", "大阪城は古い", "हिन्दी में लिखा").search("大阪の城", 3)
    assert found[0][0] == 1
    assert index("東京タワーは高い", "हिन्दी में लिखा").search("हिन्दी", 3)[0][0] == 1


def test_nothing_is_printed_or_logged(capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        index("ferry", "bread").search("ferry", 1)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert logging.getLogger("bm25s").level == logging.NOTSET


def test_importing_the_room_does_not_import_bm25s():
    code = "import sys, chunkcache.retriever; print('bm25s' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
