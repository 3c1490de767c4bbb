"""Settings of a chat model as keywords of `llm.chat`: a call's go before the model's, and answers end at a stop."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, wrapped

from chunkcache.errors import InputError
from chunkcache.integrations.answering import chat_options, strip_stop


@pytest.mark.parametrize(
    ("fields", "given", "expected"),
    [
        ({}, {}, {"policy": None}),
        ({"temperature": 0}, {}, {"policy": None, "do_sample": False}),
        ({"temperature": 0.5}, {}, {"policy": None, "do_sample": True, "temperature": 0.5}),
        ({"temperature": 0}, {"temperature": 1}, {"policy": None, "do_sample": True, "temperature": 1}),
        ({"temperature": 0}, {"temperature": None}, {"policy": None, "do_sample": False}),
        ({"top_p": 0.9}, {}, {"policy": None, "do_sample": True, "top_p": 0.9}),
        ({"top_p": 0.9, "temperature": 0}, {}, {"policy": None, "do_sample": False}),
        ({"max_tokens": 5}, {"max_tokens": 7}, {"policy": None, "max_new_tokens": 7}),
        ({"policy": "full"}, {"policy": "link"}, {"policy": "link"}),
        ({"stop": "a"}, {"stop": ["b", "c"]}, {"policy": None, "stop_strings": ["b", "c"]}),
        ({}, {"min_new_tokens": 3}, {"policy": None, "min_new_tokens": 3}),
    ],
)
def test_settings_become_keywords(fields, given, expected):
    assert chat_options(fields, given) == expected


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="a stop string is ''"):
        chat_options({}, {"stop": [""]})


def test_an_answer_ends_before_its_stop_string():
    llm = wrapped()
    whole = llm.generate(QUESTION, TEXTS, max_new_tokens=12)
    text = llm.tokenizer.decode(whole.token_ids)
    stop = text[4:6]
    assert strip_stop(llm, whole, {"stop_strings": [stop]}) == (text[: text.index(stop)].strip(), True)
    assert strip_stop(llm, whole, {"stop_strings": ["never said"]}) == (whole.text, False)
    assert strip_stop(llm, whole, {}) == (whole.text, False)
