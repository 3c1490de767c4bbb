"""Known texts: found wherever they stand, the longest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.llm import TEXTS

from chunkcache.prompt.known_texts import ANCHOR, TextIndex


def knowing(*texts: str, **options) -> TextIndex:
    known = TextIndex()
    for text in texts:
        known.add(text, name=text[:8], **options)
    return known


def found(known: TextIndex, content: str) -> list[str]:
    return [each.text for each in known.find(content)]


@pytest.mark.parametrize("between", ["\n\n", " ", "\n---\n[2] ", ")("])
def test_texts_are_found_in_any_rendering(between):
    content = f"Context:\n{between.join(TEXTS)}\n\nQuestion: why?"
    assert found(knowing(*TEXTS), content) == list(TEXTS)
    assert [content[each.start : each.end] for each in knowing(*TEXTS).find(content)] == list(TEXTS)


def test_a_text_that_differs_in_one_character_is_not_found():
    assert found(knowing(TEXTS[0]), TEXTS[0].replace("1931", "1932")) == []


SCRIPTS = {
    "Chinese": "港口的起重机在一九〇五年被移到北码头，因为风暴弄弯了它的轨道。从那以后没有人再动过它。",
    "Japanese": "港のクレーンは一九〇五年に北埠頭へ移されました。嵐が線路を曲げたためです。",
    "Thai": "เครนของท่าเรือถูกย้ายไปยังท่าเทียบเรือด้านเหนือหลังพายุ",
    "English": "opening of the bridge over the river was in the year 1931",
    "emoji": "👨‍👩‍👧‍👦" * 8,
    "a half of a pair": "\ud83d" * 40,
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("before", ["The re", "第3", "答", "ก", "_", "\u0301", "-", "\n", ""])
def test_a_text_is_found_behind_whatever_stands_there(text, before):
    content = f"{before}{text}后面"
    assert [(each.start, each.text) for each in knowing(text, *TEXTS).find(content)] == [(len(before), text)]


def test_texts_that_begin_alike_or_share_a_hash_do_not_hide_one_another():
    texts = [f"{number:05} {'the same words follow in each of them'}" for number in range(3000)]
    known = knowing(*texts)
    content = "".join(texts[::7])
    assert found(known, content) == texts[::7]
    for text in texts[::2]:
        known.remove(text)
    assert found(known, content) == texts[7::14]
    for text in texts[1::2]:
        known.remove(text)
    assert found(known, content) == []


def test_of_texts_that_begin_alike_the_longest_is_taken():
    short, long = TEXTS[0], TEXTS[0] + " It is still in use."
    assert found(knowing(short, long), f"{long}\n\n{short}") == [long, short]


def test_found_texts_do_not_overlap():
    inner = TEXTS[0][10:]
    assert found(knowing(TEXTS[0], inner), TEXTS[0]) == [TEXTS[0]]


def test_repeats_are_found_each_time():
    assert found(knowing(TEXTS[0]), f"{TEXTS[0]}\n\n{TEXTS[0]}") == [TEXTS[0]] * 2


def test_a_short_text_is_left_out():
    short = "x" * (ANCHOR - 1)
    assert len(knowing(short)) == 0
    assert found(knowing(short), short) == []


def test_the_system_prompt_is_the_last_one_given():
    known = knowing(TEXTS[0], system="one")
    known.add(TEXTS[0], "name", system="two")
    assert [(each.name, each.system) for each in known.find(TEXTS[0])] == [("name", "two")]


def test_a_removed_text_is_not_found():
    known = knowing(*TEXTS)
    known.remove(TEXTS[0])
    known.remove("never known")
    assert found(known, "\n\n".join(TEXTS)) == list(TEXTS[1:])


words = st.text(st.sampled_from("ab .\n"), min_size=1, max_size=120)


@given(st.lists(words.map(str.strip), max_size=5), st.lists(words, max_size=5))
def test_what_stands_there_is_found(texts, between):
    texts = [text for text in texts if len(text) >= ANCHOR]
    content = "".join(f"{gap}{text}" for gap, text in zip(between, texts, strict=False))
    first = min((content.find(text) for text in texts if text in content), default=None)
    results = knowing(*texts).find(content)
    assert (results[0].start if results else None) == first


@given(st.lists(words, max_size=5), words)
def test_what_is_found_stands_there(texts, content):
    known = knowing(*texts)
    end = 0
    for each in known.find(content):
        assert each.start >= end
        assert content[each.start : each.end] == each.text
        assert each.text in texts
        end = each.end
